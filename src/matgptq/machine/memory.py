"""Memory that this process may still take: the system's, and a GPU's."""

from __future__ import annotations

from pathlib import Path

import torch


def available_memory() -> int | None:
    """Bytes that this process may still take: what the system has free, within the limit of its control group."""
    found = []
    try:
        with open("/proc/meminfo", encoding="ascii") as handle:
            fields = dict(line.split(":", 1) for line in handle)
        found.append(int(fields["MemAvailable"].split()[0]) * 1024)
    except (OSError, KeyError, ValueError):
        pass
    try:
        group = Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text(encoding="ascii").strip()
        used = int((group / "memory.current").read_text(encoding="ascii"))
        if limit != "max":
            found.append(max(0, int(limit) - used))
    except (OSError, ValueError):
        pass
    return min(found, default=None)


def has_own_memory(device: torch.device) -> bool:
    """Whether what lies on a device takes none of the system's memory."""
    return device.type not in ("cpu", "mps")


def gpu_memory(device: torch.device) -> int | None:
    """Bytes of a GPU that this process may still take; None if PyTorch does not say."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    # What PyTorch keeps for later tensors is not free to others, but to this process.
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
