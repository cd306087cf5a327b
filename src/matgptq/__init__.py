"""Post-training Matryoshka quantization: one 8-bit parent, every width from 2 to 8 bits inside it.

Importing the package loads neither torch nor transformers; it only arranges for transformers to know the format.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from matgptq.registration import register_when_imported

if TYPE_CHECKING:
    from matgptq.allocation_search import search
    from matgptq.evaluation import evaluate
    from matgptq.exporting import export
    from matgptq.loading import load
    from matgptq.model_card import write_card
    from matgptq.publishing import push
    from matgptq.quantization import quantize
    from matgptq.reference_import import import_reference
    from matgptq.refinement import refine
    from matgptq.run_forecast import forecast
    from matgptq.task_evaluation import evaluate_tasks
    from matgptq.transformers_integration import MatGPTQConfig
    from matgptq.verification import verify

__version__ = "0.1.0.dev0"
__all__ = [
    "MatGPTQConfig",
    "__version__",
    "evaluate",
    "evaluate_tasks",
    "export",
    "forecast",
    "import_reference",
    "load",
    "push",
    "quantize",
    "refine",
    "search",
    "verify",
    "write_card",
]

_HOME = {
    "quantize": "matgptq.quantization",
    "forecast": "matgptq.run_forecast",
    "load": "matgptq.loading",
    "evaluate": "matgptq.evaluation",
    "evaluate_tasks": "matgptq.task_evaluation",
    "write_card": "matgptq.model_card",
    "push": "matgptq.publishing",
    "export": "matgptq.exporting",
    "verify": "matgptq.verification",
    "import_reference": "matgptq.reference_import",
    "refine": "matgptq.refinement",
    "search": "matgptq.allocation_search",
    "MatGPTQConfig": "matgptq.transformers_integration",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


register_when_imported()
