"""Memory, time and interruptions of streamed quantization, on random models of equal blocks.

    python benchmarks/scale.py -o benchmarks/results/scale.json
    python benchmarks/scale.py --large -o benchmarks/results/scale.json     # also 6 GB under a limit of 3 GB

Every run is a process of its own, so that its peak memory (VmHWM, resident) is its own. Streamed and in-memory runs are
interleaved; times are medians.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from machine import describe_machine

BLOCKS = (4, 16, 64)
SHAPE = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4, "num_key_value_heads": 4}
WIDE = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
WIDE_BLOCKS = 12
LARGE = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 16, "num_key_value_heads": 16}
LARGE_BLOCKS, LARGE_LIMIT = 58, 3 << 30
WINDOWS, SEQLEN = 8, 256
VOCABULARY = 1024

_RUN = """
import sys, time, torch
torch.set_num_threads({threads})
import matgptq, matgptq.quantization.preparation as preparation
if {whole}:
    preparation.can_stream = lambda source: False
tokens = torch.randint(3, {vocabulary}, ({windows}, {seqlen}), generator=torch.Generator().manual_seed(0))
import transformers.models.llama.modeling_llama  # what quantize imports is no part of its time
print(time.time(), flush=True)
started = time.perf_counter()
report = matgptq.quantize({source!r}, {out!r}, dataset=tokens, group_size=64, activations={activations!r}, **{options})
seconds = time.perf_counter() - started
peak = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(peak, seconds)
"""


def make_model(directory: Path, blocks: int, shape: dict[str, int]) -> None:
    """Random weights, written a shard at a time so that this process stays small."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    from matgptq.models.residency import build_empty
    from matgptq.models.source import ModelSource

    directory.mkdir(parents=True)
    config = LlamaConfig(
        **shape, num_hidden_layers=blocks, vocab_size=VOCABULARY, max_position_embeddings=2048, dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(directory)
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"<s>": 0, "x": 1}, "x"))).save_pretrained(
        directory
    )
    network = build_empty(ModelSource("", directory, None, config.to_dict(), {}), torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    files: dict[str, dict[str, Any]] = {}
    for name, parameter in network.named_parameters():
        parts = name.split(".")
        file = f"model-{int(parts[2]):05d}.safetensors" if parts[1] == "layers" else "model-ends.safetensors"
        files.setdefault(file, {})[name] = parameter.shape
    weight_map = {}
    for file, shapes in files.items():
        tensors = {
            name: torch.ones(size, dtype=torch.bfloat16)
            if len(size) == 1
            else (torch.randn(size, generator=generator) * size[1] ** -0.5).bfloat16()
            for name, size in shapes.items()
        }
        save_file(tensors, directory / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def command(
    source: Path,
    out: Path,
    *,
    whole: bool = False,
    activations: str = "disk",
    threads: int = 1,
    windows: int = WINDOWS,
    seqlen: int = SEQLEN,
    options: dict[str, Any] | None = None,
) -> list[str]:
    """A process that quantizes and prints its peak memory and its seconds."""
    code = _RUN.format(
        source=str(source), out=str(out), whole=whole, activations=activations, threads=threads, windows=windows,
        seqlen=seqlen, vocabulary=VOCABULARY, options=options or {"quality": "fast"},
    )  # fmt: skip
    return [sys.executable, "-c", code]


def run(*arguments: Any, **options: Any) -> tuple[int, float]:
    """Peak resident bytes and seconds."""
    done = subprocess.run(command(*arguments, **options), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    peak, seconds = done.stdout.split()[-2:]
    return int(peak), float(seconds)


def peaks(root: Path) -> list[dict[str, Any]]:
    """Peak memory by number of blocks."""
    found = []
    for blocks in BLOCKS:
        source = root / f"source-{blocks}"
        peak, seconds = run(source, root / f"out-{blocks}")
        found.append({"blocks": blocks, "peak_bytes": peak, "seconds": round(seconds, 1)})
        print(f"{blocks:3} blocks: peak {peak / 1e6:,.0f} MB, {seconds:.1f} s", flush=True)
    return found


def against_memory(root: Path, rounds: int = 3) -> dict[str, Any]:
    """Streamed, with activations on disk, against the whole model and its activations in memory."""
    times: dict[str, list[float]] = {"streamed": [], "in memory": []}
    memory = {}
    for number in range(rounds):
        for name in times:
            whole = name == "in memory"
            options = {"whole": whole, "activations": "memory" if whole else "disk"}
            memory[name], seconds = run(root / "source-16", root / f"{name}-{number}", **options)
            times[name].append(seconds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    ratio = medians["streamed"] / medians["in memory"]
    print(f"streamed / in memory, 16 blocks: {ratio:.3f} x the time, peaks {memory}", flush=True)
    return {"seconds": times, "peak_bytes": memory, "ratio": round(ratio, 4)}


def interrupted(root: Path, rounds: int = 3) -> dict[str, Any]:
    """What a kill in the middle costs, all that is done again included; the imports of a second process are not."""
    source, options = root / "source-wide", {"activations": "disk", "windows": 8 * WINDOWS}
    overheads = []
    for number in range(rounds):
        _, uninterrupted = run(source, root / f"uninterrupted-{number}", **options)
        out = root / f"interrupted-{number}"
        process = subprocess.Popen(command(source, out, **options), stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        started = float(process.stdout.readline())
        work = out.with_name(f".{out.name}.unfinished")
        while len(list(work.glob("block-*.json"))) < WIDE_BLOCKS // 2:
            time.sleep(0.01)
        killed = time.time()
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        _, rest = run(source, out, **options)
        overheads.append((killed - started + rest - uninterrupted) / uninterrupted)
        print(f"killed after {WIDE_BLOCKS // 2} of {WIDE_BLOCKS} blocks: {overheads[-1]:+.1%} of the run", flush=True)
    return {"overheads": overheads, "overhead": round(statistics.median(overheads), 4)}


def two_processes(root: Path, rounds: int = 3) -> dict[str, Any]:
    """Two processes of one thread against one process of two threads, interleaved."""
    times: dict[str, list[float]] = {"two processes": [], "one process": []}
    source, windows = root / "source-wide", 8 * WINDOWS
    for number in range(rounds):
        script = root / "process.py"
        script.write_text(command(source, root / f"two-{number}", activations="memory", windows=windows)[-1])
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
        done = subprocess.run(torchrun, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr)
        times["two processes"].append(max(float(line.split()[1]) for line in done.stdout.splitlines()[-2:]))
        _, seconds = run(source, root / f"one-{number}", activations="memory", threads=2, windows=windows)
        times["one process"].append(seconds)
    ratio = statistics.median(times["two processes"]) / statistics.median(times["one process"])
    print(f"two processes / one process with two threads: {ratio:.3f} x the time", flush=True)
    return {"seconds": times, "ratio": round(ratio, 4)}


def memory_group(limit: int) -> Path | None:
    """A control group whose processes may hold so much memory, as a container's do; None where none can be made."""
    for place, file in (("memory", "memory.limit_in_bytes"), (".", "memory.max")):
        group = Path("/sys/fs/cgroup") / place / f"matgptq-{os.getpid()}"
        try:
            if (group.parent / "cgroup.procs").exists():
                group.mkdir()
                (group / file).write_text(str(limit))
                return group
        except OSError:
            if group.is_dir():
                group.rmdir()
    return None


def large(root: Path) -> dict[str, Any]:
    """A model of 6 GB in a process that may hold 3 GB: resident in a control group, else of data of any kind."""
    source = root / "large"
    make_model(source, LARGE_BLOCKS, LARGE)
    size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    options = {"method": "gptq", "bits": [4]}
    program = command(source, root / "large-out", threads=2, windows=4, options=options)
    group = memory_group(LARGE_LIMIT)
    if group is None:
        program = ["prlimit", f"--data={LARGE_LIMIT}", *program]
    else:
        program = ["sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh", *program]
    done = subprocess.run(program, capture_output=True, text=True)
    if group is not None:
        group.rmdir()
    if done.returncode:
        raise SystemExit(done.stderr or f"killed: {done.returncode}")
    peak, seconds = done.stdout.split()[-2:]
    print(
        f"{size / 1e9:.1f} GB under a limit of 3 GB: peak {int(peak) / 1e9:.2f} GB, {float(seconds):.0f} s", flush=True
    )
    return {
        "model_bytes": size,
        "limit_bytes": LARGE_LIMIT,
        "limit": "data (prlimit)" if group is None else "memory (control group)",
        "peak_bytes": int(peak),
        "seconds": float(seconds),
    }


PARTS: dict[str, Callable[[Path], Any]] = {
    "peaks": peaks,
    "streamed against in memory": against_memory,
    "interrupted": interrupted,
    "two processes": two_processes,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--large", action="store_true", help="quantize 6 GB under a limit of 3 GB, too")
    parser.add_argument("--parts", nargs="*", choices=list(PARTS), default=[*PARTS], help="what to measure")
    parser.add_argument("-o", "--output", type=Path, help="JSON; parts that are not measured stay in it")
    arguments = parser.parse_args()
    record: dict[str, Any] = {}
    if arguments.output and arguments.output.exists():
        record = json.loads(arguments.output.read_text(encoding="utf-8"))
    record |= {
        "machine": describe_machine(),
        "shape": SHAPE,
        "wide shape": WIDE,
        "calibration": f"{WINDOWS} x {SEQLEN} tokens (wide: {8 * WINDOWS}), --quality fast, one thread",
    }
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        if arguments.parts:
            for blocks in BLOCKS:
                make_model(root / f"source-{blocks}", blocks, SHAPE)
            make_model(root / "source-wide", WIDE_BLOCKS, WIDE)
        for part in arguments.parts:
            record[part] = PARTS[part](root)
        if arguments.large:
            record["large"] = large(root)
    if arguments.output:
        arguments.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
