"""The machine a figure was measured on, in words that travel."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path
from typing import Any

import torch


def describe_machine() -> dict[str, Any]:
    """Processor, cores, threads and versions; no host name, no paths."""
    cpu = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        text = information.read_text(encoding="utf-8")
        found = re.search(r"model name\s*:\s*(.+)", text)
        flags = set((re.search(r"flags\s*:\s*(.+)", text) or re.match("()", "")).group(1).split())
        wanted = ("avx2", "avx512f", "avx512_vnni", "gfni", "amx_bf16")
        cpu = f"{found.group(1) if found else cpu} ({', '.join(flag for flag in wanted if flag in flags)})"
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def peak_memory_bytes() -> int:
    """Largest resident set of this process so far."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
