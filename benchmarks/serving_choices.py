"""What serving choices cost in quality: int8 activations, and the output head at few bits.

    python benchmarks/serving_choices.py OUT --text TEXT -o benchmarks/results/serving_choices.json

KL to the full model, in nats per token, of some widths of one checkpoint, served exactly and with each choice.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from machine import describe_machine

import matgptq

CHOICES: dict[str, dict[str, Any]] = {
    "exact": {},
    "activations=int8": {"activations": "int8"},
    "head_bits=8": {"head_bits": 8},
    "head_bits=6": {"head_bits": 6},
    "activations=int8, head_bits=8": {"activations": "int8", "head_bits": 8},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--text", required=True)
    parser.add_argument("--bits", type=int, nargs="*", default=[2, 3, 4, 8])
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    rows = {}
    for name, options in CHOICES.items():
        evaluation = matgptq.evaluate(
            arguments.checkpoint,
            arguments.bits,
            text=arguments.text,
            windows=arguments.windows,
            seqlen=arguments.seqlen,
            **options,
        )
        rows[name] = {f"{result.bits:g}": result.kl for result in evaluation.results}
        print(name, rows[name], flush=True)
    if arguments.output:
        record = {"machine": describe_machine(), "protocol": evaluation.protocol, "kl": rows}
        arguments.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
