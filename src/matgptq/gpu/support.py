"""Whether Triton kernels can run; importing this imports no Triton and touches no device."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch


@functools.cache
def obstacle(device: str) -> str | None:
    """Why Triton kernels cannot run on a type of device; None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'matgptq[triton]')"
    if device == "cuda":
        if not torch.cuda.is_available():
            return "PyTorch sees no GPU"
        if torch.version.hip is not None:
            return "the GPU is not NVIDIA's"
        major, minor = torch.cuda.get_device_capability()
        return None if major >= 8 else f"the GPU has compute capability {major}.{minor}, Triton kernels need 8.0"
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return f"Triton kernels do not run on {device} (TRITON_INTERPRET=1 runs them on a CPU, slowly)"
