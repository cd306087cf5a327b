"""Compile every Triton kernel for GPUs that are not there, and report what the compiler made of it.

    python benchmarks/triton_aot.py -o benchmarks/results/triton_aot.json [--quick]

No GPU is needed. Reported are registers, spilled bytes and shared memory, and for the inner loop of a product the
instructions per weight, those among them on the integer units, and loads, barriers and accesses to shared memory:
its loads must be 128 bits wide, and it must touch no shared memory. None of this is a speed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import itertools
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)
os.environ["TRITON_ALWAYS_COMPILE"] = "1"  # a kernel that comes from a cache says nothing

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from matgptq.gpu import product_kernels, sweep_kernel, unpack_kernel
from matgptq.gpu.layout import pack_slice
from matgptq.gpu.tuning import Launch, candidate_launches, default_launch
from matgptq.slicing import WIDTHS

TARGETS = (80, 90)
PROCESSORS = {80: 108, 90: 132}
BATCHES = (8, 16, 32, 64)  # one of each class of launches
INTEGER = re.compile(r"LOP3|SHF|IADD|PRMT|LEA|SEL|VIADD|ISETP|SGXT|PLOP|MOV$|MOV\.|VIMNMX|IMNMX|I2F|F2I")
ALIGNED = ("rows", "columns", "stride")  # sizes that are multiples of 16 in any model worth the name


def build(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], target: int, warps: int, stages: int = 1
) -> dict[str, Any]:
    """Compile a kernel; what the compiler and the disassembler say of it."""
    signature = {name: types.get(name, "constexpr" if name in constants else "i32") for name in kernel.arg_names}
    attributes = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or name in ALIGNED
    }
    source = ASTSource(kernel, signature, constants, attributes)
    log = io.StringIO()
    triton.knobs.nvidia.dump_ptxas_log = True
    with contextlib.redirect_stdout(log):
        compiled = triton.compile(
            source,
            target=GPUTarget("cuda", target, 32),
            options={"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True},
        )
    said = log.getvalue()
    registers = re.search(r"Used (\d+) registers", said)
    spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    assert registers is not None
    assert spilled is not None
    return {
        "target": f"sm_{target}",
        "registers": int(registers[1]),
        "spilled_bytes": int(spilled[1]) + int(spilled[2]),
        "shared_bytes": compiled.metadata.shared,
        **inner_loop(compiled.asm["cubin"]),
    }


def inner_loop(cubin: bytes) -> dict[str, Any]:
    """Counts of instructions in the loop in which a kernel spends its time."""
    tool = Path(triton.__path__[0]) / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True).stdout
    pattern = r"/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\d+ )?([A-Z0-9_.]+)([^;]*);"
    instructions = [(int(place, 16), name, rest) for place, name, rest in re.findall(pattern, text)]
    loops = [
        (int(to[1], 16), place)
        for place, name, rest in instructions
        if name.startswith("BRA") and (to := re.search(r"0x([0-9a-f]+)", rest)) and int(to[1], 16) < place
    ]
    if not loops:
        return {}
    # The largest that multiplies matrices, if one does: adding up the parts of a split is a loop as well.
    matrix = [place for place, name, _ in instructions if re.match("HMMA|HGMMA", name)]
    start, end = max(loops, key=lambda loop: (any(loop[0] <= place <= loop[1] for place in matrix), loop[1] - loop[0]))
    body = [name for place, name, _ in instructions if start <= place <= end]

    def count(expression: str) -> int:
        return sum(bool(re.match(expression, name)) for name in body)

    return {
        "loop": {
            "instructions": len(body),
            "integer_instructions": sum(bool(INTEGER.match(name)) for name in body),
            "matrix_instructions": count("HMMA|HGMMA"),
            "wide_loads": count(r"LDG\.E\.128"),
            "other_loads": count(r"LDG") - count(r"LDG\.E\.128"),
            "shared_accesses": count("LDS|STS|SHFL"),
            "barriers": count("BAR"),
        }
    }


def product(bits: int, dtype: str, resident: bool, launch: Launch, group_size: int, target: int) -> dict[str, Any]:
    types = dict.fromkeys(("x", "bias", "out"), f"*{dtype}")
    types |= {"planes": "*i32", "scales": "*fp16", "partial": "*fp32", "arrived": "*i32"}
    constants = {
        "BITS": bits,
        "RESIDENT": resident,
        "GROUP_HALVES": group_size // 32,
        "BLOCKS": launch.blocks,
        "TILES": launch.tiles,
        "RAGGED": False,
        "BIASED": True,
        "AHEAD": launch.ahead,
        "OVERLAPS": target >= 90,
    }
    kernel = product_kernels.staged if launch.stages else product_kernels.fused
    if not launch.stages:
        constants["UNITS"] = launch.units
    made = build(kernel, types, constants, target, launch.warps, launch.stages or 1)
    weights_per_thread = 32 * 128 * launch.units // launch.warps // 32
    for counted in ("instructions", "integer_instructions"):
        made["loop"][f"{counted}_per_weight"] = round(made["loop"][counted] / weights_per_thread, 2)
    shape = {name: getattr(launch, name) for name in ("warps", "units", "blocks", "tiles", "ahead", "stages")}
    form = "parent" if resident else "slice"
    name = "staged" if launch.stages else "fused"
    return {"kernel": name, "bits": bits, "dtype": dtype, "form": form, "group_size": group_size, **shape, **made}


def dequantization(bits: int, dtype: str, target: int) -> dict[str, Any]:
    types = {"planes": "*i32", "scales": "*fp16", "out": f"*{dtype}"}
    constants = {"BITS": bits, "RESIDENT": True, "GROUP_HALVES": 2, "UNITS": 4}
    made = build(unpack_kernel.dequantize, types, constants, target, 4)
    return {"kernel": "dequantize", "bits": bits, "dtype": dtype, "form": "parent", **made}


def sweep(widths: tuple[int, ...], copies: int, compensates: bool, target: int) -> dict[str, Any]:
    floats = ("base", "trail", "coupling", "scales", "breakpoints", "shared_levels", "changes")
    types = {**dict.fromkeys(floats, "*fp32"), "group_of": "*i32", "codes": "*u8", "shared_codes": "*u8"}
    constants = {
        "WIDTHS": widths,
        "WEIGHTS": tuple(float(2**bits) for bits in widths),
        "COPIES": copies,
        "COMPENSATES": compensates,
        "STRETCH": 32,
        "ROWS": 32,
    }
    made = build(sweep_kernel.sweep_stretch, types, constants, target, 1)
    return {"kernel": "sweep", "widths": list(widths), "copies": copies, "compensates": compensates, **made}


def a_weight() -> Any:
    """Any weight of a size worth cutting; launches depend on nothing else of it."""
    return pack_slice(torch.zeros(4096, 4096, dtype=torch.uint8), torch.ones(4096, 1, dtype=torch.float16), 2)


def everything(quick: bool) -> Iterator[dict[str, Any]]:
    weight = a_weight()
    for target in TARGETS:
        if quick:
            for batch, bits, dtype in ((8, 4, "fp16"), (32, 8, "bf16"), (64, 3, "fp16")):
                yield product(bits, dtype, True, default_launch(weight, batch, PROCESSORS[target]), 64, target)
        else:
            for batch, dtype in itertools.product(BATCHES, ("fp16", "bf16")):
                launch = default_launch(weight, batch, PROCESSORS[target])
                for bits in WIDTHS if batch == 8 else (2, 4, 8):
                    yield product(bits, dtype, True, launch, 64, target)
            for bits in (2, 3, 4, 6):
                yield product(bits, "fp16", False, default_launch(weight, 8, PROCESSORS[target]), 64, target)
            every = [launch for batch in BATCHES for launch in candidate_launches(weight, batch, PROCESSORS[target])]
            for launch in dict.fromkeys(dataclasses.replace(launch, splits=1) for launch in every):
                yield product(4, "fp16", True, launch, 64, target)
            for group_size in (0, 32, 96, 128):
                yield product(4, "fp16", True, default_launch(weight, 1, PROCESSORS[target]), group_size, target)
        for bits in (4,) if quick else (2, 4, 8):
            yield dequantization(bits, "fp16", target)
        for copies in (4,) if quick else (4, 1):
            for compensates in (True,) if quick else (True, False):
                yield sweep((2, 3, 4, 8), copies, compensates, target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few kernels")
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    records = []
    for record in everything(arguments.quick):
        records.append(record)
        loop = record.get("loop", {})
        keys = (
            "kernel",
            "bits",
            "dtype",
            "form",
            "widths",
            "copies",
            "warps",
            "units",
            "tiles",
            "ahead",
            "stages",
            "group_size",
        )
        name = " ".join(str(record[key]) for key in keys if key in record)
        print(
            f"{record['target']} {name:36} registers {record['registers']:3}  spilled {record['spilled_bytes']:3}  "
            f"shared {record['shared_bytes']:6}  per weight {loop.get('instructions_per_weight', '-'):>5}",
            flush=True,
        )
    if arguments.output:
        result = {"triton": triton.__version__, "kernels": records}
        arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
