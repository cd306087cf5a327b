"""Which engine runs the solver's loops: PyTorch, which defines them, the native library, or Triton."""

from __future__ import annotations

import os
from typing import Literal, get_args

from torch import Tensor

from matgptq import native
from matgptq.errors import ConfigurationError
from matgptq.gpu import support as gpu_support

Engine = Literal["torch", "native", "triton"]


def engine(tensor: Tensor) -> Engine:
    """The engine for loops over a tensor: the library on a CPU and Triton on a GPU, where there is one.

    ``MATGPTQ_SOLVER=torch``, ``=native`` or ``=triton`` forces it; all give the same codes but for ties. A loop that an
    engine does not have (Triton has the sweep only) runs in PyTorch.

    Raises:
        ConfigurationError: there is no such engine, or not on this machine.
    """
    wanted = os.environ.get("MATGPTQ_SOLVER", "auto")
    if wanted not in ("auto", *get_args(Engine)):
        raise ConfigurationError(f"MATGPTQ_SOLVER must be auto, {', '.join(get_args(Engine))}, not {wanted!r}")
    if wanted == "native" and not native.available():
        raise ConfigurationError(f"MATGPTQ_SOLVER=native: {native.reason()}")
    if wanted == "triton" or (wanted == "auto" and tensor.device.type == "cuda"):
        obstacle = gpu_support.obstacle(tensor.device.type)
        if obstacle is None:
            return "triton"
        if wanted == "triton":
            raise ConfigurationError(f"MATGPTQ_SOLVER=triton: {obstacle}")
    elif wanted != "torch" and tensor.device.type == "cpu" and native.available():
        return "native"
    return "torch"
