"""What happened to each layer: errors per width, time, and everything that was not as asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class LayerReport:
    """One quantized layer.

    Attributes:
        name: full module name.
        shape: ``(out_features, in_features)``.
        group_size: used; differs from the one asked for when that does not divide the input features.
        errors: relative output error ``||(W - W_r) X||^2 / ||W X||^2`` by width; empty without calibration.
        seconds: solver time; layers solved together share it by their number of rows.
        fallback_group_size: whether group_size is not the one asked for.
        dead_columns: input columns that calibration never excited.
        damping_steps: times the damping was raised.
        rounded_to_nearest: the Hessian could not be factored and the layer was rounded to nearest.
        expert_tokens: tokens of the calibration windows that reached the expert, None for other layers.
        shared_hessian: an expert's layer that was calibrated on all tokens of its block.
    """

    name: str
    shape: tuple[int, int]
    group_size: int
    errors: Mapping[int, float]
    seconds: float
    fallback_group_size: bool = False
    dead_columns: int = 0
    damping_steps: int = 0
    rounded_to_nearest: bool = False
    expert_tokens: int | None = None
    shared_hessian: bool = False

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> LayerReport:
        """From JSON, whose keys are text and whose tuples are lists."""
        errors = {int(bits): float(error) for bits, error in record["errors"].items()}
        return cls(**{**record, "shape": tuple(record["shape"]), "errors": errors})


@dataclass(frozen=True)
class Refinement:
    """What tuning did to one width or allocation.

    Attributes:
        bits: the width; for an allocation the average over the weights.
        kl_before, kl_after: mean KL(full || slice) in nats a token on text that tuning did not see, with the scales
            as stored. The checkpoint has new scales exactly if the second is smaller.
        steps: taken; fewer than asked for if the held-out text stopped it. For scope ``block``: blocks.
        history: ``(steps taken, held-out KL)``.
        seconds: of this call.
        allocation: its name; None for a width.
    """

    bits: float
    kl_before: float
    kl_after: float
    steps: int
    history: list[tuple[int, float]]
    seconds: float
    allocation: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


@dataclass
class Report:
    """A whole run.

    Attributes:
        output: the checkpoint's directory.
        recipe: as recorded in the checkpoint.
        calibration: what text, how much of it.
        layers: in the order of the model.
        seconds: wall time by stage.
        refinement: what tuning did to the scales of each width, by ``str(width)``.
    """

    output: str
    recipe: Mapping[str, Any]
    calibration: Mapping[str, Any]
    layers: list[LayerReport] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    refinement: dict[str, Refinement] = field(default_factory=dict)

    @property
    def fallbacks(self) -> dict[str, int]:
        """How many layers needed each fallback; all zero on a smooth run."""
        return {
            "smaller group size": sum(layer.fallback_group_size for layer in self.layers),
            "dead input columns": sum(layer.dead_columns > 0 for layer in self.layers),
            "raised damping": sum(layer.damping_steps > 0 for layer in self.layers),
            "expert on all tokens": sum(layer.shared_hessian for layer in self.layers),
            "rounded to nearest": sum(layer.rounded_to_nearest for layer in self.layers),
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Report:
        """From ``report.json``; what tuning did is not read back."""
        layers = [LayerReport.from_dict(layer) for layer in record["layers"]]
        return cls(record["output"], record["recipe"], record["calibration"], layers, dict(record["seconds"]))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**asdict(self), "fallbacks": self.fallbacks}
