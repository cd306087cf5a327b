"""Native CPU kernels: a thin binding of ``libmatgptq`` (``csrc/matgptq.h`` is its specification) to torch CPU tensors.

Importing this package loads nothing; the library is loaded at the first call. An installation built without a C++
compiler has no library: ``available()`` is then false and ``reason()`` says why.

Kernels know nothing of autograd. Tensors are read through ``data_ptr`` and copied only where a layout asks for it.
Invalid arguments raise ``ConfigurationError`` before any work starts.
"""

from matgptq.native.block_calls import BlockCalls, RMSNorm, StackCall, attends, attends_to_many
from matgptq.native.dense import linear
from matgptq.native.library import (
    DTYPES,
    Activations,
    Gate,
    NativeUnavailableError,
    SweepMode,
    available,
    cpu_vendor,
    isa,
    reason,
    set_isa,
    share_threads,
    shares_threads,
)
from matgptq.native.products import Joined, dequantize_rows, matmul, matmul_many, read, spread_threads
from matgptq.native.solver_loops import RefitSums, quadratic_forms, refit_sums, search_scales, sweep
from matgptq.native.weights import Arena, Weight, pack_parent, pack_slice

__all__ = [
    "DTYPES",
    "Activations",
    "Arena",
    "BlockCalls",
    "Gate",
    "Joined",
    "NativeUnavailableError",
    "RMSNorm",
    "RefitSums",
    "StackCall",
    "SweepMode",
    "Weight",
    "attends",
    "attends_to_many",
    "available",
    "cpu_vendor",
    "dequantize_rows",
    "isa",
    "linear",
    "matmul",
    "matmul_many",
    "pack_parent",
    "pack_slice",
    "quadratic_forms",
    "read",
    "reason",
    "refit_sums",
    "search_scales",
    "set_isa",
    "share_threads",
    "shares_threads",
    "spread_threads",
    "sweep",
]
