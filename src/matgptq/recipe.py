"""What a quantization run does, as data: the method, its ingredients and their values.

Every ingredient of the solver is one field here, so that each can be switched off alone and an ablation is a change
of one argument. A checkpoint records the whole recipe.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from matgptq.errors import ConfigurationError
from matgptq.slicing import PARENT_BITS, WIDTHS, check_widths

Method = Literal["matgptq", "paper", "gptq", "rtn"]
METHODS: tuple[str, ...] = get_args(Method)
Quality = Literal["fast", "balanced", "best"]
QUALITIES: tuple[str, ...] = get_args(Quality)
Grid = Literal["absmax", "minmax"]
Compensation = Literal["per-width", "mean", "none"]
ColumnOrder = Literal["hessian", "natural"]

GROUP_SIZE_FALLBACKS = (128, 64, 32)
PER_CHANNEL = -1


@dataclass(frozen=True)
class Recipe:
    """All choices of a run that change its result, except the model and the calibration text.

    Attributes:
        method: the name under which the other fields got their defaults; recorded, not consulted by the solver.
        target_bits: widths R that the solver minimises the error of, ascending.
        bit_weights: lambda_r, one positive number for each target width, in the order of ``target_bits``.
        group_size: input columns per scale; a layer that it does not divide falls back to a smaller one
            (``GROUP_SIZE_FALLBACKS``). ``PER_CHANNEL`` means one scale for a whole row.
        grid: ``absmax`` puts the largest magnitude of a group on the outermost level (scale absmax / 128);
            ``minmax`` is the grid of GPTQ and of the published method (scale 2 absmax / 255 at 8 bits).
        signed_scales: give a group a negative scale when its largest magnitude is positive, so that this magnitude
            falls on the side of the grid that has one level more.
        scale_candidates: shrink factors tried per group, between ``scale_min_shrink`` and 1; 1 means no search.
        scale_min_shrink: smallest factor of the scale search.
        compensation: how a column's error reaches the later ones. ``per-width`` keeps one compensated copy of the
            weight for each target width; ``mean`` is the published method: one copy, the plain mean of the
            residuals; ``none`` rounds to nearest.
        column_order: ``hessian`` visits columns by descending diagonal of the Hessian (scales stay in the original
            order, so inference needs no permutation); ``natural`` from left to right.
        coordinate_passes: passes of exact coordinate descent over all columns after the first sweep; where rows are
            solved together, over all rows as well.
        refit: solve for the best group scales of each target width once the codes are fixed.
        refit_bits: widths that get refitted scales of their own even if they are no targets. Each costs one 16-bit
            scale per group in the file and nothing when another width is served.
        refit_in_loop: refit before each coordinate pass as well, not only at the end.
        damping: added to the Hessian's diagonal, as a fraction of its mean.
        sink_weight: how often a sequence's first position counts in the Hessians, every other position counting
            once; 1 for no difference. Models make an attention sink of it, with activations far larger than all
            others; every later token reads it, and it is one of thousands to the Hessian. More than 1 adds one-token
            sequences to the calibration windows (``matgptq.text.packing.first_tokens``). Where ``saliency`` weighs
            tokens, it finds them by itself.
        saliency: exponent of the weight that a token gets in a layer's Hessian: the norm of the gradient that the
            model's predictions have in the layer's output there, to this power. 0 counts all tokens alike, 2 is the
            Fisher information (``calibration.saliency``). Costs one backward pass over the calibration windows.
        rows_together: output rows of layers with the same input whose errors are weighed together by those gradients
            (``core.output_hessian``), at most: more are cut into equal parts, and so are those whose matrices would
            be large beside the model's layers (``plan``). 0 or 1 solves each row as if there were no others,
            and so do ``saliency`` 0 and another ``compensation`` than ``per-width``. Costs a product of the gradients
            with themselves in the backward pass.
        output_damping: added to the output Hessian's diagonal, as a fraction of its mean.
        tuned_bits: widths whose scales are tuned end to end once the checkpoint stands (``matgptq.refine``).
        tuning_steps: steps of that tuning for each width.
        channel_scaling: exponent e by which channels with large activations are rounded more finely, with the model
            left the same function (``channel_scaling``); 0 for none. Costs nothing at inference. Families that
            it is not known for (OPT, GPT-NeoX) go without.
        rotate: spread outliers over all channels by rotating the weights before anything else, with the model left
            the same function (``matgptq.models.rotated_model``).
        min_expert_tokens: calibration tokens that an expert has to see for Hessians of its own; one with fewer gets
            those of all tokens of its block (``matgptq.calibration.expert_hessians``).
        all_experts: calibrate every expert with every token, whatever the router says.
        seed: of the calibration windows, the first tokens and the rotation.
    """

    method: Method
    target_bits: tuple[int, ...]
    bit_weights: tuple[float, ...]
    group_size: int = 128
    grid: Grid = "absmax"
    signed_scales: bool = True
    scale_candidates: int = 16
    scale_min_shrink: float = 0.45
    compensation: Compensation = "per-width"
    column_order: ColumnOrder = "hessian"
    coordinate_passes: int = 1
    refit: bool = True
    refit_bits: tuple[int, ...] = ()
    refit_in_loop: bool = True
    damping: float = 0.01
    sink_weight: float = 64.0
    saliency: float = 0.0
    rows_together: int = 0
    output_damping: float = 0.1
    tuned_bits: tuple[int, ...] = ()
    tuning_steps: int = 64
    channel_scaling: float = 0.0
    rotate: bool = False
    min_expert_tokens: int = 128
    all_experts: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        _require(self.method in METHODS, f"method must be one of {', '.join(METHODS)}, not {self.method!r}")
        _require(self.target_bits == check_widths(self.target_bits), "target_bits must ascend without repeats")
        _require(
            len(self.bit_weights) == len(self.target_bits)
            and all(math.isfinite(weight) and weight > 0 for weight in self.bit_weights),
            f"bit_weights needs one positive number for each of the widths {self.target_bits}, not {self.bit_weights}",
        )
        _require(
            self.group_size == PER_CHANNEL or self.group_size >= 8,
            f"group_size must be at least 8, or {PER_CHANNEL} for one scale per output row; not {self.group_size}",
        )
        _require(self.grid in get_args(Grid), f"unknown grid {self.grid!r}")
        _require(self.compensation in get_args(Compensation), f"unknown compensation {self.compensation!r}")
        _require(self.column_order in get_args(ColumnOrder), f"unknown column order {self.column_order!r}")
        _require(self.scale_candidates >= 1, "scale_candidates must be at least 1")
        _require(0 < self.scale_min_shrink <= 1, "scale_min_shrink must lie in (0, 1]")
        _require(self.coordinate_passes >= 0, "coordinate_passes cannot be negative")
        _require(
            not (self.coordinate_passes and self.compensation == "mean" and len(self.target_bits) > 1),
            "coordinate passes need one copy of the weight per width: use compensation='per-width'",
        )
        _require(
            not self.refit_bits or (self.refit and self.refit_bits == check_widths(self.refit_bits)),
            "refit_bits must ascend without repeats, and needs refit",
        )
        _require(
            not self.tuned_bits or self.tuned_bits == check_widths(self.tuned_bits),
            "tuned_bits must ascend without repeats",
        )
        _require(self.tuning_steps >= 1, "tuning_steps must be at least 1")
        for name in ("signed_scales", "refit", "refit_in_loop", "rotate", "all_experts"):
            value = getattr(self, name)
            _require(isinstance(value, bool), f"{name} must be True or False, not {value!r}")
        check_seed(self.seed)
        _require(self.min_expert_tokens >= 0, f"min_expert_tokens cannot be negative, it is {self.min_expert_tokens}")
        _require(math.isfinite(self.damping) and self.damping >= 0, f"damping must be >= 0, not {self.damping}")
        _require(0 <= self.channel_scaling <= 1, f"channel_scaling must lie in [0, 1], not {self.channel_scaling}")
        _require(0 <= self.saliency <= 2, f"saliency must lie in [0, 2], not {self.saliency}")
        _require(self.rows_together >= 0, f"rows_together cannot be negative, it is {self.rows_together}")
        _require(
            math.isfinite(self.output_damping) and self.output_damping > 0,
            f"output_damping must be positive, not {self.output_damping}",
        )
        _require(
            math.isfinite(self.sink_weight) and self.sink_weight >= 1,
            f"sink_weight must be at least 1 (first positions count like any other), not {self.sink_weight}",
        )

    @property
    def needs_calibration(self) -> bool:
        """Whether any ingredient reads the Hessian. Round-to-nearest does not."""
        return self.compensation != "none" or self.scale_candidates > 1 or self.refit or self.coordinate_passes > 0

    @property
    def joins_rows(self) -> bool:
        """Whether rows are solved together, by what gradients say of their errors."""
        return self.rows_together > 1 and self.saliency > 0 and self.compensation == "per-width"

    @property
    def scale_bits(self) -> tuple[int, ...]:
        """Widths that get scales of their own: those that are refitted, or else the parent alone."""
        if self.refit and len(self.target_bits) > 1:
            return check_widths((*self.target_bits, *self.refit_bits))
        return (PARENT_BITS,)

    @property
    def propagated_bits(self) -> int:
        """The width whose outputs feed the next block: the largest target, which is the best approximation."""
        return self.target_bits[-1]

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready record of every field."""
        record = dataclasses.asdict(self)
        record["target_bits"] = list(self.target_bits)
        record["bit_weights"] = list(self.bit_weights)
        record["refit_bits"] = list(self.refit_bits)
        record["tuned_bits"] = list(self.tuned_bits)
        return record


def check_seed(seed: int) -> None:
    """Refuse a seed that not every generator takes, with room for those that are derived from it."""
    _require(0 <= seed < 2**32, f"a seed is from 0 to 2^32 - 1, not {seed}")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigurationError(message)


# The defaults of each method; everything else is the Recipe's own default.
_METHOD_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "matgptq": {"refit_bits": WIDTHS},
    "paper": {
        "grid": "minmax",
        "signed_scales": False,
        "scale_candidates": 1,
        "compensation": "mean",
        "column_order": "natural",
        "coordinate_passes": 0,
        "refit": False,
        "sink_weight": 1.0,
    },
    "gptq": {
        "grid": "minmax",
        "signed_scales": False,
        "scale_candidates": 1,
        "column_order": "natural",
        "coordinate_passes": 0,
        "refit": False,
    },
    "rtn": {
        "signed_scales": False,
        "grid": "minmax",
        "scale_candidates": 1,
        "compensation": "none",
        "coordinate_passes": 0,
        "refit": False,
        "sink_weight": 1.0,
    },
}

# Gradients weigh first positions like all others, layer by layer; a fixed weight on top makes every width worse.
_BALANCED: Mapping[str, Any] = {
    "coordinate_passes": 2, "saliency": 1.0, "rows_together": 4096, "sink_weight": 1.0, "channel_scaling": 0.25,
}  # fmt: skip

# How much time the method matgptq takes for quality; what each costs and brings is measured in the README.
_QUALITY_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "fast": {"coordinate_passes": 0},
    "balanced": _BALANCED,
    "best": {
        **_BALANCED,
        "rotate": True,
        "saliency": 1.5,
        "tuned_bits": (2, 3, 4),
        "tuning_steps": 128,
    },
}

# lambda of matgptq by width where it is not 2^r. Chosen on SmolLM2-135M by the KL of the whole model (docs/method.md).
_BIT_WEIGHTS: Mapping[str, Mapping[int, float]] = {
    "balanced": {2: 5.0, 3: 13.0, 4: 14.0, 5: 20.0, 6: 28.0, 7: 80.0, 8: 270.0},
    "best": {2: 8.0, 3: 27.0, 4: 58.0, 5: 58.0, 6: 58.0, 7: 230.0, 8: 760.0},
}
# Widths that are solved for besides the targets: between 4 and 8 bits a slice is the parent's plain rounding otherwise,
# and 6 bits lose a third of their KL by a copy of their own.
_BETWEEN: Mapping[str, int] = {"balanced": 6, "best": 6}

DEFAULT_TARGET_BITS = (2, 3, 4, 8)
DEFAULT_QUALITY: Quality = "balanced"


def make_recipe(
    method: str = "matgptq",
    bits: Iterable[int] | int | None = None,
    bit_weights: Mapping[int, float] | Iterable[float] | None = None,
    quality: str | None = None,
    **options: Any,
) -> Recipe:
    """The recipe of a method, with options of one's own.

    Args:
        method: ``matgptq`` (this project's), ``paper`` (arXiv 2602.03537 as published), ``gptq`` (one width,
            arXiv 2210.17323) or ``rtn`` (round to nearest).
        bits: target widths; nested methods need 8 among them, ``gptq`` takes exactly one. Default 2,3,4,8, or those
            that ``bit_weights`` names. ``rtn`` rounds to the parent's grid whatever widths are named, so its only
            target is 8. Without ``bit_weights``, ``balanced`` and ``best`` add 6 bits where nothing else lies between
            4 and 8.
        bit_weights: lambda_r as ``{width: weight}`` or in the order of ``bits`` as given. Default by quality for
            ``matgptq`` (2^r in ``fast``), equal for the others.
        quality: ``fast``, ``balanced`` (the default) or ``best``: ingredients of ``matgptq``; other methods have none.
        options: any other field of ``Recipe``; each beats what the quality chose.

    Raises:
        ConfigurationError: a value out of range or a combination that makes no sense.
    """
    if method not in METHODS:
        raise ConfigurationError(f"method must be one of {', '.join(METHODS)}, not {method!r}")
    if quality is not None and method != "matgptq":
        raise ConfigurationError(f"quality is a choice of method matgptq; {method} has only one")
    if quality is not None and quality not in QUALITIES:
        raise ConfigurationError(f"quality must be one of {', '.join(QUALITIES)}, not {quality!r}")
    unknown = sorted(set(options) - {field.name for field in dataclasses.fields(Recipe)})
    if unknown:
        raise ConfigurationError(f"unknown recipe option {', '.join(unknown)}")
    if bits is None and isinstance(bit_weights, Mapping):
        bits = bit_weights
    given = DEFAULT_TARGET_BITS if bits is None else (bits,) if isinstance(bits, int) else tuple(bits)
    target_bits = check_widths(given)
    if method == "rtn":
        given = target_bits = (PARENT_BITS,)
    if method == "gptq":
        if len(target_bits) != 1:
            raise ConfigurationError(f"method gptq makes one width: give one of {WIDTHS[0]}..{WIDTHS[-1]}, not {given}")
    elif PARENT_BITS not in target_bits:
        raise ConfigurationError(
            f"the parent's {PARENT_BITS} bits must be among the target widths, add {PARENT_BITS} to {given}; "
            "a model of one width alone is method gptq"
        )
    chosen: Mapping[str, Any] = {}
    if method == "matgptq":
        quality = quality or DEFAULT_QUALITY
        chosen = _QUALITY_DEFAULTS[quality]
        if bit_weights is None:
            target_bits = _with_one_between(target_bits, _BETWEEN.get(quality))
            weights = _BIT_WEIGHTS.get(quality, {})
            bit_weights = {bits: weights.get(bits, 2.0**bits) for bits in target_bits}
    values: dict[str, Any] = {**_METHOD_DEFAULTS[method], **chosen, **options}
    values["tuned_bits"] = tuple(values.get("tuned_bits", ()))
    values["refit_bits"] = tuple(values.get("refit_bits", ())) if values.get("refit", True) else ()
    return Recipe(
        method=method,  # type: ignore[arg-type]
        target_bits=target_bits,
        bit_weights=_resolve_bit_weights(given, target_bits, bit_weights),
        **values,
    )


def _with_one_between(target_bits: tuple[int, ...], between: int | None) -> tuple[int, ...]:
    """Add a width to targets that leave the whole range between 4 and 8 bits to the parent."""
    if between is None or target_bits[0] > 4 or any(4 < bits < PARENT_BITS for bits in target_bits):
        return target_bits
    return check_widths((*target_bits, between))


def _resolve_bit_weights(
    given: tuple[int, ...],
    target_bits: tuple[int, ...],
    bit_weights: Mapping[int, float] | Iterable[float] | None,
) -> tuple[float, ...]:
    if bit_weights is None:
        return tuple(1.0 for _ in target_bits)
    if isinstance(bit_weights, Mapping):
        by_width = {int(bits): float(weight) for bits, weight in bit_weights.items()}
    else:
        listed = [float(weight) for weight in bit_weights]
        if len(listed) != len(given):
            raise ConfigurationError(f"{len(listed)} bit weights for the {len(given)} widths {given}")
        by_width = dict(zip(given, listed, strict=True))
    if set(by_width) != set(target_bits):
        raise ConfigurationError(f"bit weights are given for {sorted(by_width)}, the widths are {list(target_bits)}")
    return tuple(by_width[bits] for bits in target_bits)
