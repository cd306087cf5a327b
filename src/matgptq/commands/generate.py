"""The command ``generate``."""

from __future__ import annotations

import itertools
import sys
from typing import Annotated

import typer

from matgptq.commands.options import (
    ActivationsOption,
    Checkpoint,
    DeviceOption,
    DtypeOption,
    HeadBitsOption,
    TrustOption,
    examples,
    progress_bars,
)
from matgptq.errors import ConfigurationError

EPILOG = examples(
    'matgptq generate out --bits 4 --prompt "The capital of France is"',
    'matgptq generate out --bits 4 --chat --prompt "Name three rivers." --max-new-tokens 100',
)


def generate(
    checkpoint: Checkpoint,
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    bits: Annotated[int | None, typer.Option(help="Width, 2 to 8. (default: the checkpoint's)")] = None,
    allocation: Annotated[str | None, typer.Option(metavar="NAME|FILE", help="A width per layer.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest continuation.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    activations: ActivationsOption = "exact",
    head_bits: HeadBitsOption = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt through the chat template.")] = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    trust_remote_code: TrustOption = False,
) -> None:
    """Continue a prompt with one width of a checkpoint."""
    import matgptq
    from matgptq.inference.generation import generate_text
    from matgptq.models.source import load_tokenizer

    with progress_bars() as progress:
        progress.start("load the model", 1)
        model = matgptq.load(
            checkpoint,
            bits,
            allocation,
            device=device,
            dtype=dtype,
            activations=activations,
            head_bits=head_bits,
            trust_remote_code=trust_remote_code,
        )
        tokenizer = load_tokenizer(checkpoint, trust_remote_code=trust_remote_code)
    if chat:
        if not tokenizer.chat_template:
            raise ConfigurationError(f"{checkpoint}: has no chat template; leave --chat out")
        messages = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    pieces = generate_text(
        model, tokenizer, prompt, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, templated=chat
    )
    # Not through the console, which changes tabs and :names: of pictures.
    for piece in itertools.chain([] if chat else [prompt], pieces, ["\n"]):
        sys.stdout.write(piece)
        sys.stdout.flush()
