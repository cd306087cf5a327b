"""The short ways of the next token, through a block and through all of them, against transformers' own code."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import transformers
from accelerate.hooks import ModelHook, add_hook_to_module
from tiny_models import GROUP_SIZE, PLAIN, WINDOWED, make_tokenizer, save_model, token_ids
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaModel

import matgptq
from matgptq import native
from matgptq.inference import block_stack
from matgptq.inference.block_stack import BlockStack, DecodesTokens, decode_in_one_call
from matgptq.inference.decoding import DecodesRows, RowBlock, decode_in_rows
from matgptq.inference.nested_linear import nested_layers
from matgptq.kernels import kernel_choice
from matgptq.models.families import PlainBlocks
from matgptq.models.kv_cache import CACHE_ARGUMENT

pytestmark = pytest.mark.skipif(not native.available(), reason=f"no native library: {native.reason()}")

OTHERS = ("gemma2", "phi3", "opt", "gpt_neox", "mixtral")
CONTEXT = token_ids(1, 12)


@pytest.fixture
def checkpoint(plain_checkpoint: Callable[..., str]) -> Callable[..., str]:
    return plain_checkpoint


@pytest.fixture(params=["stack", "blocks"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """All blocks in one call, or each by itself; contexts, which are short here, are transformers'."""
    monkeypatch.setattr(block_stack, "MOST_TOKENS", 1)
    if request.param == "blocks":
        monkeypatch.setattr(BlockStack, "run", lambda *_: None)
    return request.param


@pytest.fixture
def calls(way: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One entry for each block that a token has gone through the short way: which of the two."""
    seen: list[str] = []
    run, run_all = RowBlock.run, BlockStack.run

    def counted(self: RowBlock, *given: object) -> Tensor | None:
        seen.append("blocks")
        return run(self, *given)

    def counted_all(self: BlockStack, *given: object) -> Tensor | None:
        hidden = run_all(self, *given)
        seen.extend([] if hidden is None else ["stack"] * len(self._blocks))
        return hidden

    monkeypatch.setattr(RowBlock, "run", counted)
    monkeypatch.setattr(BlockStack, "run", counted_all)
    return seen


def decode(
    model: nn.Module, steps: int = 6, cache: object = None, context: Tensor = CONTEXT, **options: object
) -> Tensor:
    """Logits ``[steps, sequences, vocabulary]`` of one token after the other, always the same tokens."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    logits = []
    with torch.inference_mode():
        model(context, **{CACHE_ARGUMENT: cache}, use_cache=True)
        for tokens in token_ids(len(context), steps).T:
            output = model(tokens[:, None], **{CACHE_ARGUMENT: cache}, use_cache=True, **options)
            logits.append(output.logits[:, -1].float())
    return torch.stack(logits)


def the_long_way(model: nn.Module, monkeypatch: pytest.MonkeyPatch, **options: object) -> Tensor:
    with monkeypatch.context() as patch:
        close_short_ways(patch)
        return decode(model, **options)


def close_short_ways(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(RowBlock, "takes", lambda *_: False)
    patch.setattr(BlockStack, "run", lambda *_: None)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("head_dim", [16, 32, 96])
@pytest.mark.parametrize("name", PLAIN)
def test_a_token_computes_what_transformers_computes(name, head_dim, dtype, checkpoint, way, calls, monkeypatch):
    """Heads of 16 are PyTorch's to attend with, so there is no call of all blocks; others are the library's."""
    model = matgptq.load(checkpoint(name, head_dim), 4, device="cpu", dtype=dtype)
    attended: list[int] = []  # tokens that PyTorch attended for at once
    attend = nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        nn.functional,
        "scaled_dot_product_attention",
        lambda query, *given, **options: attended.append(query.shape[2]) or attend(query, *given, **options),
    )
    short = decode(model)
    assert calls == ["blocks" if head_dim == 16 else way] * 6 * model.config.num_hidden_layers
    assert attended.count(1) == (len(calls) if head_dim == 16 else 0)
    long = the_long_way(model, monkeypatch)
    # bfloat16 keeps 8 bits: where attention's sum goes the other way, so does all that follows.
    tolerance = 1e-5 if dtype == "float32" else 0.03
    torch.testing.assert_close(short, long, rtol=tolerance, atol=tolerance * float(long.abs().max()))


@pytest.mark.parametrize("way", ["blocks"], indirect=True)
@pytest.mark.parametrize("sequences", [1, 3])
@pytest.mark.parametrize("context", [1, 3, 7, 8, 12], ids=lambda length: f"behind {length}")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("head_dim", [16, 32])
@pytest.mark.parametrize("name", WINDOWED)
def test_layers_that_see_a_window(name, head_dim, dtype, context, sequences, checkpoint, way, calls, monkeypatch):
    """Of 8 tokens; the two kinds of layers have a rotary embedding each, so there is no call of all blocks."""
    model = matgptq.load(checkpoint(name, head_dim), 4, device="cpu", dtype=dtype)
    run = RowBlock.run
    untaken: list[bool] = []

    def seen(*given: object) -> Tensor | None:
        hidden = run(*given)
        untaken.append(hidden is None)
        return hidden

    monkeypatch.setattr(RowBlock, "run", seen)
    tokens = token_ids(sequences, context)
    tolerance = 1e-5 if dtype == "float32" else 0.03
    config = model.config.get_text_config()
    for cache in (DynamicCache(config=config), DynamicCache()):
        untaken.clear()
        found = decode(model, 10, copy.deepcopy(cache), tokens)
        # What a window hides of a cache that keeps everything, a mask does.
        hidden = 0 if len(cache.layers) else max(0, min(10, context + 10 - 8))
        steps = 10 + (context == 1)  # which is the next token of none
        assert untaken == [False] * (2 * steps - hidden)
        expected = the_long_way(model, monkeypatch, steps=10, cache=cache, context=tokens)
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


@pytest.mark.parametrize("name", OTHERS)
def test_other_blocks_are_left_alone(name, checkpoint):
    model = matgptq.load(checkpoint(name), 4, device="cpu")
    assert not any(isinstance(module, DecodesRows | DecodesTokens) for module in model.modules())


def test_widths_and_activations_follow(checkpoint, calls, monkeypatch):
    for activations in ("exact", "int8"):
        model = matgptq.load(checkpoint("llama"), 4, device="cpu", activations=activations)
        for bits in (2, 8, dict.fromkeys(list(nested_layers(model))[:3], 3)):
            model.set_bits(bits)
            short = decode(model, 2)
            assert calls
            calls.clear()
            torch.testing.assert_close(short, the_long_way(model, monkeypatch, steps=2), rtol=1e-5, atol=1e-5)


def test_generate_gives_the_same_text(checkpoint, calls, monkeypatch):
    model = matgptq.load(checkpoint("qwen3"), 8, device="cpu")
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    short = model.generate(CONTEXT, **options)
    assert calls
    with monkeypatch.context() as patch:
        close_short_ways(patch)
        assert torch.equal(short, model.generate(CONTEXT, **options))


def test_other_caches(checkpoint, monkeypatch):
    model = matgptq.load(checkpoint("llama"), 8, device="cpu")
    expected = the_long_way(model, monkeypatch)
    found = decode(model, cache=StaticCache(config=model.config, max_cache_len=32))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_state_of_the_caller_is_not_written_to(checkpoint, calls):
    model = matgptq.load(checkpoint("llama"), 8, device="cpu")
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(CONTEXT, **{CACHE_ARGUMENT: cache}, use_cache=True)
        given = model.get_input_embeddings()(CONTEXT[:, :1])
        before = given.clone()
        model(inputs_embeds=given, **{CACHE_ARGUMENT: cache}, use_cache=True)
    assert calls
    assert torch.equal(given, before)


class Doubling(ModelHook):
    """As accelerate hooks into a module: by another ``forward``."""

    def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
        return 2 * output


def _hooked(model: nn.Module) -> None:
    for block in model.model.layers:
        block.mlp.register_forward_hook(lambda *_: None)


def _replaced(model: nn.Module) -> None:
    for block in model.model.layers:
        block.self_attn.q_proj = nn.Sequential(block.self_attn.q_proj)


def _unpacked(model: nn.Module) -> None:
    for layer in nested_layers(model).values():
        layer.unpack()


def _eager(model: nn.Module) -> None:
    model.set_attn_implementation("eager")


@pytest.mark.parametrize("change", [_hooked, _replaced, _unpacked, _eager], ids=lambda change: change.__name__[1:])
def test_what_the_short_way_would_pass_over_is_not(change, checkpoint, monkeypatch):
    model = matgptq.load(checkpoint("llama"), 8, device="cpu")
    expected = the_long_way(model, monkeypatch)
    change(model)
    seen: list[Tensor | None] = []
    run = RowBlock.run
    monkeypatch.setattr(RowBlock, "run", lambda *given: seen.append(run(*given)) or seen[-1])
    torch.testing.assert_close(decode(model), expected, rtol=1e-4, atol=1e-4)
    assert all(result is None for result in seen)


def _doubled(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *given, **options: 2 * forward(*given, **options)


@pytest.mark.parametrize(
    "where", ["instance", "class", "class of the block", "class, prepared twice", "accelerate", "all modules"]
)
def test_a_forward_that_was_replaced_is_called(where, checkpoint, monkeypatch):
    model = matgptq.load(checkpoint("llama"), 8, device="cpu")
    if where == "class, prepared twice":  # as after a model has been moved and is packed again
        assert decode_in_rows(model, "model.layers", PlainBlocks()) == len(model.model.layers)
        assert decode_in_one_call(model, "model.layers")
    unchanged = decode(model)
    handle = None
    if where == "class":
        own = type(model.model.layers[0].mlp)
        monkeypatch.setattr(own, "forward", _doubled(own.forward))
    elif where in ("class of the block", "class, prepared twice"):
        monkeypatch.setattr(LlamaDecoderLayer, "forward", _doubled(LlamaDecoderLayer.forward))
    elif where == "all modules":
        own = type(model.model.layers[0].mlp)
        handle = nn.modules.module.register_module_forward_hook(
            lambda module, _, output: 2 * output if isinstance(module, own) else None
        )
    else:
        for block in model.model.layers:
            if where == "accelerate":
                add_hook_to_module(block.mlp, Doubling())
            else:
                block.mlp.forward = _doubled(block.mlp.forward)
    try:
        found, expected = decode(model), the_long_way(model, monkeypatch)
    finally:
        if handle is not None:
            handle.remove()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, unchanged)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("qwen3", "input_layernorm"),
        ("qwen3", "post_attention_layernorm"),
        ("qwen3", "self_attn.q_norm"),
        ("gemma3_text", "post_feedforward_layernorm"),
    ],
)
@pytest.mark.parametrize("change", ["cast", "strided", "parametrized", "another eps"])
def test_norms_that_were_changed(change, family, name, checkpoint, monkeypatch):
    model = matgptq.load(checkpoint(family), 8, device="cpu")
    decode(model)
    for block in model.model.layers:
        norm = block.get_submodule(name)
        if change == "cast":
            norm.bfloat16()
        elif change == "strided":
            norm.weight = nn.Parameter(torch.stack([norm.weight, torch.zeros_like(norm.weight)], 1)[:, 0])
        elif change == "another eps":
            setattr(norm, "variance_epsilon" if family == "qwen3" else "eps", 0.5)
        else:
            nn.utils.parametrizations.weight_norm(norm, dim=None)
    found, expected = decode(model), the_long_way(model, monkeypatch)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_activations_of_one_layer(checkpoint, monkeypatch):
    model = matgptq.load(checkpoint("llama"), 8, device="cpu")
    model.model.layers[1].mlp.up_proj.activations = "int8"
    torch.testing.assert_close(decode(model), the_long_way(model, monkeypatch), rtol=1e-5, atol=1e-5)


def test_a_hook_sees_every_token(checkpoint):
    model = matgptq.load(checkpoint("llama"), 8, device="cpu")
    seen = []
    model.model.layers[1].self_attn.register_forward_hook(lambda *_: seen.append(1))
    decode(model, 4)
    assert len(seen) == 1 + 4


def test_hidden_states_and_attentions_are_there_when_asked_for(checkpoint):
    model = matgptq.load(checkpoint("llama"), 8, device="cpu")
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(CONTEXT, **{CACHE_ARGUMENT: cache}, use_cache=True)
        output = model(CONTEXT[:, :1], **{CACHE_ARGUMENT: cache}, use_cache=True, output_hidden_states=True)
    assert len(output.hidden_states) == model.config.num_hidden_layers + 1
    assert not torch.equal(output.hidden_states[0], output.hidden_states[1])


def test_a_forced_kernel_is_used(checkpoint, calls, monkeypatch):
    model = matgptq.load(checkpoint("llama"), 8, device="cpu")
    expected = decode(model)
    monkeypatch.setenv("MATGPTQ_KERNEL", "reference")
    torch.testing.assert_close(decode(model), expected, rtol=1e-4, atol=1e-4)


def test_gradients_go_the_long_way(checkpoint, calls):
    model = matgptq.load(checkpoint("llama"), 8, device="cpu")
    cache = DynamicCache(config=model.config)
    model(CONTEXT, **{CACHE_ARGUMENT: cache}, use_cache=True)
    embedded = model.get_input_embeddings()(CONTEXT[:, :1]).detach().requires_grad_()
    assert torch.isfinite(model(inputs_embeds=embedded, **{CACHE_ARGUMENT: cache}, use_cache=True).logits).all()
    assert not calls


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("head_dim", [16, 32])
@pytest.mark.parametrize("name", PLAIN)
def test_tokens_of_several_sequences(name, head_dim, dtype, checkpoint, way, calls, monkeypatch):
    model = matgptq.load(checkpoint(name, head_dim), 4, device="cpu", dtype=dtype)
    for sequences in (2, 3, 9, 16):
        context = token_ids(sequences, 5, seed=1)
        short = decode(model, 2, context=context)
        assert calls == ["blocks" if head_dim == 16 else way] * 2 * model.config.num_hidden_layers
        calls.clear()
        long = the_long_way(model, monkeypatch, steps=2, context=context)
        tolerance = 1e-5 if dtype == "float32" else 0.03
        torch.testing.assert_close(short, long, rtol=tolerance, atol=tolerance * float(long.abs().max()))


def test_padded_sequences(checkpoint, way, calls, monkeypatch):
    """All blocks in one call pass over the padding; a block by itself is given a mask and leaves it to PyTorch."""
    model = matgptq.load(checkpoint("qwen3"), 8, device="cpu")
    context, mask = token_ids(3, 12), torch.ones(3, 12, dtype=torch.int64)
    mask[0, :4] = mask[2, :11] = 0
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    more = {"output_logits": True, "return_dict_in_generate": True, "eos_token_id": None}

    def generate(chosen: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        found = model.generate(chosen, attention_mask=seen, **options, **more)
        return found.sequences[:, -6:], torch.stack(found.logits, 1)

    tokens, logits = generate(context, mask)
    assert calls == (["stack"] * 5 * model.config.num_hidden_layers if way == "stack" else [])
    with monkeypatch.context() as patch:
        close_short_ways(patch)
        expected_tokens, expected = generate(context, mask)
    assert torch.equal(tokens, expected_tokens)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    for number in range(3):
        seen = mask[number].bool()
        alone_tokens, alone = generate(context[number : number + 1, seen], torch.ones(1, int(seen.sum())))
        assert torch.equal(tokens[number], alone_tokens[0])
        torch.testing.assert_close(logits[number], alone[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("hidden", [[0, 5], [12], [3, 4, 12], list(range(13))], ids=str)
def test_masks_that_hide_others_than_the_first_go_the_long_way(hidden, checkpoint, calls, monkeypatch):
    model = matgptq.load(checkpoint("llama"), 8, device="cpu")
    mask = torch.ones(2, 13, dtype=torch.int64)
    mask[1, hidden] = 0
    context = torch.cat([CONTEXT, CONTEXT])
    found = decode(model, 1, context=context, attention_mask=mask)
    assert not calls
    expected = the_long_way(model, monkeypatch, steps=1, context=context, attention_mask=mask)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_beams(checkpoint, calls, monkeypatch):
    model = matgptq.load(checkpoint("qwen2"), 8, device="cpu")
    options = {"max_new_tokens": 8, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    short = model.generate(torch.cat([CONTEXT, CONTEXT + 1]), **options)
    assert calls
    with monkeypatch.context() as patch:
        close_short_ways(patch)
        assert torch.equal(short, model.generate(torch.cat([CONTEXT, CONTEXT + 1]), **options))


def test_more_sequences_than_are_fused_go_the_long_way(checkpoint, way, calls, monkeypatch):
    model = matgptq.load(checkpoint("llama"), 8, device="cpu")
    monkeypatch.setattr(kernel_choice, "fused_rows", lambda _: 3)
    kernel_choice._choose.cache_clear()
    taken: list[bool] = []
    run = RowBlock.run
    monkeypatch.setattr(RowBlock, "run", lambda *given: (row := run(*given), taken.append(row is not None))[0])
    try:
        for sequences in (3, 4, 3):
            calls.clear()
            taken.clear()
            context = token_ids(sequences, 5)
            found = decode(model, 1, context=context)
            blocks = model.config.num_hidden_layers
            if way == "stack":
                assert calls.count("stack") == (blocks if sequences == 3 else 0)
            assert taken == [True] * (blocks * (way == "blocks")) if sequences == 3 else [False] * blocks
            torch.testing.assert_close(
                found, the_long_way(model, monkeypatch, steps=1, context=context), rtol=1e-5, atol=1e-5
            )
    finally:
        kernel_choice._choose.cache_clear()


def test_a_copy_is_a_model_of_its_own(checkpoint, calls):
    model = matgptq.load(checkpoint("llama"), 8, device="cpu")
    expected = decode(model)
    other = copy.deepcopy(model)
    other.set_bits(2)
    changed = decode(other)
    assert len(calls) == 2 * 6 * model.config.num_hidden_layers
    assert torch.equal(decode(model), expected)
    assert not torch.equal(changed, expected)


def test_saved_and_loaded_again(checkpoint, tmp_path):
    model = matgptq.load(checkpoint("llama"), 8, device="cpu")
    model.save_pretrained(tmp_path / "again")
    make_tokenizer().save_pretrained(tmp_path / "again")
    assert torch.equal(decode(matgptq.load(tmp_path / "again", 8, device="cpu")), decode(model))


@pytest.fixture
def llama(checkpoint: Callable[[str], str]) -> nn.Module:
    return matgptq.load(checkpoint("llama"), 8, device="cpu")


def _block_hooked(model: nn.Module) -> None:
    model.model.layers[0].register_forward_hook(lambda _, __, output: 2 * output)


def _block_replaced(model: nn.Module) -> None:
    model.model.layers[1] = copy.deepcopy(model.model.layers[0])
    model.model.layers[1].self_attn.layer_idx = 1


def _list_replaced(model: nn.Module) -> None:
    model.model.layers = nn.ModuleList(reversed(list(model.model.layers)))


def _fewer(model: nn.Module) -> None:
    model.config.num_hidden_layers = 1


def _wrapped(model: nn.Module) -> None:
    model.model.layers[0].forward = _doubled(model.model.layers[0].forward)


def _widths(model: nn.Module) -> None:
    model.model.layers[1].mlp.down_proj.set_bits(2)


def _rounded(model: nn.Module) -> None:
    model.model.layers[0].self_attn.k_proj.activations = "int8"


def _norm_edited(model: nn.Module) -> None:
    model.model.layers[1].input_layernorm.weight.mul_(2)


def _norm_replaced(model: nn.Module) -> None:
    model.model.layers[1].input_layernorm.weight = nn.Parameter(torch.full((64,), 2.0))


def _last_norm_hooked(model: nn.Module) -> None:
    model.model.norm.register_forward_hook(lambda _, __, output: 2 * output)


CHANGES = [
    _block_hooked,
    _block_replaced,
    _list_replaced,
    _fewer,
    _wrapped,
    _widths,
    _rounded,
    _norm_edited,
    _norm_replaced,
    _last_norm_hooked,
]


@pytest.mark.parametrize("copied", [False, True], ids=["original", "copy"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__[1:])
def test_a_change_between_two_tokens_counts(change, copied, llama, monkeypatch):
    unchanged = decode(llama)
    if copied:
        llama = copy.deepcopy(llama)
        decode(llama, 1)
    with torch.no_grad():
        change(llama)
    found, expected = decode(llama), the_long_way(llama, monkeypatch)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, unchanged)


def test_a_model_whose_forward_is_replaced(llama, monkeypatch):
    forward, seen = LlamaModel.forward, []
    monkeypatch.setattr(LlamaModel, "forward", lambda *given, **options: seen.append(1) or forward(*given, **options))
    decode(llama, 3)
    assert len(seen) == 1 + 3


@pytest.mark.parametrize(
    ("options", "short"),
    [
        ({"attention_mask": torch.ones(1, 13, dtype=torch.int64)}, True),
        ({"attention_mask": torch.ones(1, 13, dtype=torch.bool)}, True),
        ({"attention_mask": torch.arange(13)[None] > 2}, True),
        ({"attention_mask": torch.arange(13)[None] != 2}, False),
        ({"attention_mask": torch.zeros(1, 1, 1, 13)}, False),
        ({"position_ids": torch.tensor([[12]])}, True),
        ({"position_ids": torch.tensor([[40]])}, True),
        ({"output_hidden_states": True}, False),
        ({"output_attentions": True}, False),
        ({"use_cache": False}, True),
        ({"tokenizer": object()}, True),
        ({"something": object()}, False),
    ],
)
def test_what_a_caller_asks_for(options, short, llama, way, calls, monkeypatch):
    def one_token() -> tuple[Tensor, int]:
        cache = DynamicCache(config=llama.config)
        with torch.inference_mode():
            llama(CONTEXT, **{CACHE_ARGUMENT: cache})
            logits = llama(CONTEXT[:, :1], **{CACHE_ARGUMENT: cache}, **options).logits
        return logits, cache.get_seq_length()

    found, length = one_token()
    assert calls.count("stack") == (llama.config.num_hidden_layers if short and way == "stack" else 0)
    with monkeypatch.context() as patch:
        close_short_ways(patch)
        expected, expected_length = one_token()
    assert length == expected_length
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_dropout_of_attention_goes_the_long_way(llama, calls):
    decode(llama, 1)
    calls.clear()
    for block in llama.model.layers:
        block.self_attn.attention_dropout = 0.5
    decode(llama, 1)
    assert calls
    calls.clear()
    decode(llama.train(), 1)
    assert not calls


def test_short_and_long_steps_share_a_cache(llama, monkeypatch):
    cache, logits = DynamicCache(config=llama.config), []
    with torch.inference_mode():
        llama(CONTEXT, **{CACHE_ARGUMENT: cache})
        for step, token in enumerate(token_ids(1, 6)[0]):
            with monkeypatch.context() as patch:
                if step % 2:
                    close_short_ways(patch)
                logits.append(llama(token.view(1, 1), **{CACHE_ARGUMENT: cache}).logits[:, -1])
    torch.testing.assert_close(torch.stack(logits), the_long_way(llama, monkeypatch), rtol=1e-5, atol=1e-5)


def test_a_model_without_its_head(checkpoint, calls, way):
    model = transformers.AutoModel.from_pretrained(checkpoint("llama"))
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(CONTEXT, **{CACHE_ARGUMENT: cache})
        output = model(input_ids=CONTEXT[:, :1], **{CACHE_ARGUMENT: cache})
    assert output.last_hidden_state.shape == (1, 1, 64)
    assert calls == [way] * model.config.num_hidden_layers


def test_windows_that_slide_are_left_to_the_blocks(tmp_path):
    source = save_model("mistral", tmp_path / "source", torch.float32, shape={"head_dim": 32, "sliding_window": 8})
    matgptq.quantize(source, tmp_path / "out", method="rtn", group_size=GROUP_SIZE)
    model = matgptq.load(tmp_path / "out", 8, device="cpu")
    assert not any(isinstance(module, DecodesTokens) for module in model.modules())
