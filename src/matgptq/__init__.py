"""Post-training Matryoshka quantization: one 8-bit parent, every width from 2 to 8 bits inside it.

Importing the package loads neither torch nor transformers; it only arranges for transformers to know the format.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from matgptq.inference.registration import register_when_imported

if TYPE_CHECKING:
    from matgptq.evaluation.task_evaluation import evaluate_tasks
    from matgptq.evaluation.text_evaluation import evaluate
    from matgptq.exports.exporting import export
    from matgptq.exports.verification import verify
    from matgptq.inference.loading import load
    from matgptq.inference.transformers_integration import MatGPTQConfig
    from matgptq.publishing.hub import push
    from matgptq.publishing.model_card import write_card
    from matgptq.quantization.forecast import forecast
    from matgptq.quantization.quantize import quantize
    from matgptq.reference_formats.reference_import import import_reference
    from matgptq.tuning.refinement import refine
    from matgptq.width_search.allocation_search import search

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
    "quantize": "matgptq.quantization.quantize",
    "forecast": "matgptq.quantization.forecast",
    "load": "matgptq.inference.loading",
    "evaluate": "matgptq.evaluation.text_evaluation",
    "evaluate_tasks": "matgptq.evaluation.task_evaluation",
    "write_card": "matgptq.publishing.model_card",
    "push": "matgptq.publishing.hub",
    "export": "matgptq.exports.exporting",
    "verify": "matgptq.exports.verification",
    "import_reference": "matgptq.reference_formats.reference_import",
    "refine": "matgptq.tuning.refinement",
    "search": "matgptq.width_search.allocation_search",
    "MatGPTQConfig": "matgptq.inference.transformers_integration",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


register_when_imported()
