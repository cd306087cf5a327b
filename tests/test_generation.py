"""Text continued piece by piece."""

from __future__ import annotations

import torch
from tiny_models import build_model, make_tokenizer
from tokenizers.processors import TemplateProcessing

from matgptq.inference.generation import generate_text


def test_a_template_has_written_the_special_tokens_already() -> None:
    tokenizer, model, seen = make_tokenizer(), build_model("llama"), []
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    model.register_forward_pre_hook(lambda _, __, given: seen.append(given["input_ids"]), with_kwargs=True)
    for templated, prompt in ((False, "a"), (True, "<s>a")):
        list(generate_text(model, tokenizer, prompt, max_new_tokens=1, templated=templated))
    assert seen[0][0, 0] == 0
    assert seen[0].shape == (1, 2)
    assert torch.equal(*seen)
