"""Decoding in vLLM on a CPU: a parent through the plugin, beside bfloat16 and beside vLLM's own 4-bit kernels.

    make test-vllm                                               # once: makes .venv-vllm
    .venv-vllm/bin/python benchmarks/serving.py OUT -o benchmarks/results/serving.json
    .venv-vllm/bin/python benchmarks/serving.py llama-1b -o ...  # random weights in the shape of Llama-3.2-1B

    bf16               the 8-bit slice as bfloat16 weights, vLLM's own kernels
    stock 4, exact     the compressed-tensors export at 4 bits, VLLM_CPU_INT4_W4A8=0
    stock 4, int8      the same with vLLM's default where the processor has AMX: activations rounded to 8 bits
    plugin 8, 4, 3     the parent, with exact activations or MATGPTQ_ACTIVATIONS=int8

Every contestant is an engine with processes of its own. All are loaded first, then take turns, round after round, and
those whose turn it is not are stopped, so that they use no processor. A turn decodes from short prompts, once one token
and once many; the difference of the two times is that of the decoding steps. Medians of the rounds are reported, and
the median of the rounds' own ratios.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BASE, STOCK = "bf16", ("stock 4, exact", "stock 4, int8")
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in the process that asks it, the model in one of its own
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_WAIT_POLICY": "passive",
}


@dataclass(frozen=True)
class Contestant:
    """One way to serve.

    Attributes:
        name: in the results.
        form: what it serves: ``parent`` or a format of ``matgptq export``.
        variables: environment variables.
    """

    name: str
    form: str
    variables: dict[str, str] = field(default_factory=dict)


def _plugin(bits: int, activations: str) -> Contestant:
    variables = {"MATGPTQ_BITS": str(bits), "MATGPTQ_ACTIVATIONS": activations}
    return Contestant(f"plugin {bits}, {activations}", "parent", variables)


CONTESTANTS = (
    Contestant(BASE, "dense"),
    Contestant(STOCK[0], "compressed-tensors", {"VLLM_CPU_INT4_W4A8": "0"}),
    Contestant(STOCK[1], "compressed-tensors"),
    _plugin(8, "exact"),
    _plugin(4, "exact"),
    _plugin(4, "int8"),
    _plugin(3, "exact"),
    _plugin(3, "int8"),
)


class Engine:
    """A contestant, loaded; stopped but for its turns."""

    def __init__(self, contestant: Contestant, model: Path, threads: int, compiled: bool) -> None:
        self.name = contestant.name
        variables = {**ENVIRONMENT, "OMP_NUM_THREADS": str(threads), **contestant.variables}
        arguments = [sys.executable, __file__, str(model), "--serve", *(["--compile"] if compiled else [])]
        self._process = subprocess.Popen(
            arguments,
            env={**os.environ, **variables},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._answer()
        self._signal(signal.SIGSTOP)

    def turn(self, batch: int, tokens: int) -> float:
        """Seconds of ``tokens`` decoding steps of ``batch`` sequences."""
        self._signal(signal.SIGCONT)
        assert self._process.stdin is not None
        self._process.stdin.write(f"{batch} {tokens}\n")
        self._process.stdin.flush()
        seconds = float(self._answer())
        self._signal(signal.SIGSTOP)
        return seconds

    def close(self) -> None:
        """End all of its processes."""
        self._signal(signal.SIGKILL)
        self._process.wait()

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _answer(self) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("answer "):
                return line.split()[1]
        raise RuntimeError(f"{self.name}: the engine has stopped")


def serve(model: str, compiled: bool) -> None:
    """Load a model, then decode as the lines on standard input say."""
    from vllm import LLM, SamplingParams

    engine = LLM(
        model,
        dtype="bfloat16",
        max_model_len=256,
        max_num_seqs=8,
        enforce_eager=not compiled,
        kv_cache_memory_bytes=256 << 20,
        disable_log_stats=True,
    )

    def seconds(batch: int, tokens: int) -> float:
        prompts = [{"prompt_token_ids": [1, 2 + row, 3, 4, 5, 6, 7, 8]} for row in range(batch)]
        sampling = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        engine.generate(prompts, sampling, use_tqdm=False)
        return time.perf_counter() - start

    for batch in (1, 8):
        seconds(batch, 4)
    print("answer ready", flush=True)
    for line in sys.stdin:
        batch, tokens = map(int, line.split())
        first = seconds(batch, 1)
        print("answer", seconds(batch, tokens + 1) - first, flush=True)


def prepare(model: str, directory: Path) -> dict[str, Path]:
    """What the contestants serve, by form."""
    import matgptq

    parent = Path(model)
    if model == "llama-1b":
        from llama_shape import VOCABULARY, write_checkpoint

        parent = directory / "parent"
        write_checkpoint(parent, VOCABULARY)
    forms = {"parent": parent, "dense": directory / "dense", "compressed-tensors": directory / "compressed-tensors"}
    matgptq.export(parent, forms["dense"], format="dense", bits=8)
    matgptq.export(parent, forms["compressed-tensors"], format="compressed-tensors", bits=4)
    return forms


def measure(engines: list[Engine], rounds: int, batch: int, tokens: int) -> dict[str, Any]:
    """Rounds of turns; each starts with another contestant."""
    seconds: dict[str, list[float]] = {engine.name: [] for engine in engines}
    for turn in range(rounds):
        for engine in engines[turn % len(engines) :] + engines[: turn % len(engines)]:
            seconds[engine.name].append(engine.turn(batch, tokens))
    rates = {name: [batch * tokens / value for value in values] for name, values in seconds.items()}
    record: dict[str, Any] = {}
    for name, own in rates.items():
        record[name] = {"tokens_per_second": statistics.median(own), "rounds": own}
        for other in (BASE, *STOCK):
            if other != name and other in rates:
                ratios = [a / b for a, b in zip(own, rates[other], strict=True)]
                record[name][f"times {other}"] = statistics.median(ratios)
    return record


def show(title: str, record: dict[str, Any]) -> None:
    """A table for people."""
    columns = [BASE, *STOCK]
    print(f"\n{title}\n{'':18s}{'tok/s':>8s}" + "".join(f"{'/ ' + column:>18s}" for column in columns))
    for name, row in record.items():
        ratios = "".join(f"{row.get(f'times {column}', float('nan')):18.2f}" for column in columns)
        print(f"{name:18s}{row['tokens_per_second']:8.1f}{ratios}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a checkpoint written by matgptq quantize, or llama-1b")
    parser.add_argument("-o", "--output", type=Path, help="JSON; results of other models and threads in it are kept")
    parser.add_argument("--name", help="of the model in the results; default: of its directory")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--only", help="contestants, separated by semicolons")
    parser.add_argument("--compile", action="store_true", help="torch.compile, vLLM's default, instead of eager mode")
    parser.add_argument("--pause", action="store_true", help="wait for a line before timing starts")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.model, arguments.compile)
        return
    from machine import describe_machine

    chosen = [each for each in CONTESTANTS if not arguments.only or each.name in arguments.only.split(";")]
    engines: list[Engine] = []
    with tempfile.TemporaryDirectory() as directory:
        forms = prepare(arguments.model, Path(directory))
        try:
            for contestant in chosen:
                print(f"loading {contestant.name}", flush=True)
                engines.append(Engine(contestant, forms[contestant.form], arguments.threads, arguments.compile))
            if arguments.pause:
                print("ready", flush=True)
                input()
            mode = "compiled" if arguments.compile else "eager"
            results = {}
            for batch in (1, 8):
                results[f"batch {batch}"] = measure(engines, arguments.rounds, batch, arguments.tokens)
                show(f"{mode}, {arguments.threads} threads, batch {batch}", results[f"batch {batch}"])
        finally:
            for engine in engines:
                engine.close()
    if arguments.output:
        import vllm

        kept = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
        kept.setdefault(arguments.name or Path(arguments.model).name, {})[f"{mode}, {arguments.threads} threads"] = {
            "machine": {**describe_machine(), "threads": arguments.threads, "vllm": vllm.__version__},
            "tokens": arguments.tokens,
            **results,
        }
        arguments.output.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
