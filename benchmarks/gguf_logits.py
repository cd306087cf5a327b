"""Exports run by llama.cpp itself, and its logits beside those of the slice.

    npm pack @node-llama-cpp/linux-x64@3.22.1 && tar xzf node-llama-cpp-linux-x64-3.22.1.tgz
    python benchmarks/gguf_logits.py OUT --llama-cpp package/bins/linux-x64 -o benchmarks/results/gguf_logits.json

llama.cpp rounds activations to 8 bits in its products, in blocks of 32 columns; so does ``activations="int8"`` here, in
blocks of a group. Two numbers are therefore given for each width: the KL of llama.cpp's distribution to that of the
slice with exact activations, and that of the slice with int8 activations to the same: what rounding alone does.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from llama_library import Library, Model
from machine import describe_machine

import matgptq
from matgptq.models.source import load_tokenizer

TEXT = (
    "The lighthouse keeper wrote in his journal that the storm had passed, and the sea was calm again by morning. "
    "He counted eleven ships on the horizon, more than in any week of that year, and lit the lamp an hour early. "
    "Nobody in the village knew how many letters he had sent, or whether anyone had ever answered one of them."
)


def divergence(reference: torch.Tensor, other: torch.Tensor) -> dict[str, float]:
    """KL in nats per token, and how often the most probable token is the same, of logits ``[tokens, vocabulary]``."""
    wanted, found = reference.double().log_softmax(-1), other.double().log_softmax(-1)
    kl = (wanted.exp() * (wanted - found)).sum(-1)
    same = (wanted.argmax(-1) == found.argmax(-1)).double()
    return {"kl": float(kl.mean()), "largest_kl": float(kl.max()), "same_token": float(same.mean())}


def slice_logits(checkpoint: Path, bits: int, tokens: list[int], **options: Any) -> torch.Tensor:
    """Of the checkpoint itself, float32."""
    model = matgptq.load(checkpoint, bits, device="cpu", dtype="float32", **options)
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0]


def llama_logits(library: Library, checkpoint: Path, bits: int, tokens: list[int]) -> torch.Tensor:
    """Of the export, run by llama.cpp."""
    with tempfile.TemporaryDirectory() as directory:
        matgptq.export(checkpoint, Path(directory) / "gguf", format="gguf", bits=bits)
        model = Model(library, Path(directory) / "gguf" / "model.gguf")
        return torch.from_numpy(model.logits(tokens))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--llama-cpp", type=Path, required=True, help="directory of libllama and its backends")
    parser.add_argument("--bits", default="2,3,4,5,6,8")
    parser.add_argument("--name", help="of the model in the results; default: of its directory")
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    library = Library(arguments.llama_cpp)
    tokens = list(load_tokenizer(arguments.checkpoint)(TEXT)["input_ids"])
    results = {}
    print(f"{'bits':>5}{'llama.cpp KL':>15}{'int8 KL':>12}{'same token':>12}")
    for bits in map(int, arguments.bits.split(",")):
        exact = slice_logits(arguments.checkpoint, bits, tokens)
        row = {
            "llama.cpp": divergence(exact, llama_logits(library, arguments.checkpoint, bits, tokens)),
            "int8 activations": divergence(exact, slice_logits(arguments.checkpoint, bits, tokens, activations="int8")),
        }
        results[bits] = row
        print(
            f"{bits:5}{row['llama.cpp']['kl']:15.6f}{row['int8 activations']['kl']:12.6f}"
            f"{row['llama.cpp']['same_token']:12.3f}"
        )
    if arguments.output:
        record = {
            "machine": describe_machine(),
            "llama.cpp": library.version,
            "model": arguments.name or arguments.checkpoint.name,
            "tokens": len(tokens),
            "bits": results,
        }
        arguments.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
