"""Teach transformers' ``from_pretrained`` to load matgptq checkpoints.

Importing this module adds our quantizer to transformers' tables. ``import matgptq`` arranges for that to happen as
soon as transformers itself is imported (see ``matgptq.inference.registration``).
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from matgptq.checkpoints.format import QUANT_METHOD, SLICE_METHOD, Settings, check_layer, is_own, parse_settings
from matgptq.checkpoints.stored_layers import parts_of_layers
from matgptq.errors import CheckpointError, ConfigurationError, SourceError
from matgptq.files.checksums import CHECKSUMS_NAME, write_checksums
from matgptq.files.stored_tensors import INDEX_NAME, WEIGHTS_NAME, TensorInfo, read_header
from matgptq.files.tensor_names import match_names, with_tied
from matgptq.inference.mixed_classes import Mixin, mix_in
from matgptq.inference.nested_linear import NestedLinear, SlicedLinear, nested_layers, set_bits
from matgptq.inference.packing import can_pack, pack_model
from matgptq.inference.width_copies import copy_at
from matgptq.models.experts import Experts, unfuse_experts
from matgptq.models.families import known_family
from matgptq.slicing import check_bits

_WEIGHTS = (WEIGHTS_NAME, INDEX_NAME)


class MatGPTQConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The ``quantization_config`` of a checkpoint, or the wish ``MatGPTQConfig(bits=3)`` when loading one.

    Passed to ``from_pretrained(path, quantization_config=MatGPTQConfig(bits=3))`` only what is named here is read;
    everything else comes from the checkpoint.

    Args:
        bits: width of all layers, 2..8.
        packed: serve the model from codes packed for the kernels of its device, where they take it. Code that looks
            into layers wants False, and finds their ``codes``.
        record: of a checkpoint.
    """

    def __init__(self, bits: int | None = None, packed: bool = True, **record: Any) -> None:
        self.packed = packed
        self.quant_method = record.pop("quant_method", QUANT_METHOD)
        if bits is not None:
            # In a record that was read from a checkpoint it is checked with the rest, in an error that names the file.
            self.bits = bits if record else check_bits(bits)
        for key, value in record.items():
            setattr(self, key, value)

    def get_loading_attributes(self) -> dict[str, Any]:
        """What an argument of ``from_pretrained`` may override."""
        return {"packed": self.packed} | ({"bits": self.bits} if hasattr(self, "bits") else {})

    def to_dict(self) -> dict[str, Any]:
        """What ``config.json`` has of it."""
        record: dict[str, Any] = super().to_dict()
        del record["packed"]
        return record

    def settings(self, where: str) -> Settings:
        """Validated settings; raises ``CheckpointError``."""
        return parse_settings(self.to_dict(), where)


class MatGPTQQuantizer(HfQuantizer):  # type: ignore[misc]
    """Replaces the quantized Linear layers by ``NestedLinear`` before the weights are loaded by name."""

    requires_calibration = True

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Any device that PyTorch runs on will do."""
        if not self.pre_quantized:
            raise CheckpointError("from_pretrained does not quantize; use matgptq.quantize, then load its output")

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **kwargs: Any) -> None:
        files = [Path(file) for file in checkpoint_files or ()]
        where = str(files[0].parent / "config.json") if files else "quantization_config"
        settings = self.quantization_config.settings(where)
        try:
            headers: dict[str, TensorInfo] = {}
            for file in files:
                held = read_header(file)
                twice = sorted(headers.keys() & held.keys())
                if twice:
                    raise CheckpointError(
                        f"{file}: holds tensor {twice[0]}, and {headers[twice[0]].file.name} does, too"
                    )
                headers.update(held)
        except SourceError as error:
            raise CheckpointError(str(error)) from error
        replace_linears(model, settings, headers)
        self._unfused = any(isinstance(module, Experts) for module in model.modules())
        state = model.state_dict()
        self._renamed = {
            name: state[name].dtype for stored, name in match_names(model, headers).items() if stored != name
        }

    def update_weight_conversions(self, weight_conversions: list[Any], *model: Any) -> list[Any]:
        """None for a model whose experts are layers of their own: they are called in it as they are in the files.

        What loads a model without conversions also saves it without.
        """
        return [] if self._unfused else super().update_weight_conversions(weight_conversions, *model)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        # Older supported transformers leave a tensor of a quantized model in its stored dtype if its name changed on
        # the way (GPT-NeoX' head, everything in a base model) and then fail in the forward pass.
        if not (model._keep_in_fp32_modules or model._keep_in_fp32_modules_strict):
            for name, dtype in self._renamed.items():
                tensor = model.get_parameter_or_buffer(name)
                if tensor.dtype != dtype and not tensor.is_meta:
                    tensor.data = tensor.data.to(dtype)
        for name, layer in nested_layers(model).items():
            if isinstance(layer, SlicedLinear):
                layer.take_slice()
            if (fault := layer.scale_fault) is not None:
                raise CheckpointError(f"layer {name}: {fault}")
        family = known_family(model.config.model_type)
        if family is not None and family.parts:
            # Saved under the names of its modules, as config.json has them; some would be renamed otherwise.
            model._weight_conversions = []
        mix_in(NestedModel, model)
        if self.quantization_config.packed and can_pack(model):
            pack_model(model)
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[None, dict[str, Any]]:
        """Called before ``save_pretrained`` writes anything; refuses a model that has no parent any more."""
        _check_complete(model)
        return None, {}

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """``save_pretrained`` writes the same format again."""
        return True

    @property
    def is_trainable(self) -> bool:
        return False


class NestedModel(Mixin):
    """Mixed into the class of a model that was loaded."""

    name_or_path: str

    def set_bits(self, bits: int | Mapping[str, int]) -> None:
        """``model.set_bits(3)`` or ``model.set_bits({layer: width})``; see ``nested_linear.set_bits``."""
        set_bits(cast(nn.Module, self), bits)

    def copy_at(self, bits: int | Mapping[str, int]) -> Any:
        """``draft = model.copy_at(3)``: a second model in the same memory; see ``width_copies.copy_at``."""
        return copy_at(self, bits)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """``to``, ``cuda`` and the like; refused before anything moves if a layer cannot follow."""
        moves = False
        for name, layer in nested_layers(cast(nn.Module, self)).items():
            if layer.leaves(fn):
                moves = True
                if not layer.is_complete:
                    raise ConfigurationError(
                        f"layer {name} cannot move: only its slice is in memory; load it there instead"
                    )
        result = super()._apply(fn, recurse)  # type: ignore[misc]
        if moves and can_pack(self):
            pack_model(self)
        return result

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """``save_pretrained`` as ever, and then the checksums of what was saved."""
        _check_complete(self)  # before anything of what lies there is touched
        directory = Path(save_directory)
        if directory.is_dir():  # of what lies there now, which is about to be replaced
            (directory / CHECKSUMS_NAME).unlink(missing_ok=True)
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        _add_checksums(directory)

    def _upload_modified_files(self, working_dir: str, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        """Upload what was saved for it, with our model card and without paths of this machine.

        What push_to_hub, and save_pretrained when it pushes, call once everything is saved.
        """
        from matgptq.publishing.hub import prepare_upload  # which only this needs

        _add_checksums(Path(working_dir))
        prepare_upload(working_dir, repo_id, self.name_or_path)
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)  # type: ignore[misc]


def _check_complete(model: Any) -> None:
    """Refuse to save a model that has no parent any more."""
    for name, layer in nested_layers(model).items():
        if not layer.is_complete:
            raise ConfigurationError(
                f"layer {name} has only its slice in memory, or scales of one allocation, so the checkpoint cannot "
                "be saved from here; load a width with resident=True, or copy its directory"
            )


def _add_checksums(directory: Path) -> None:
    if not (directory / CHECKSUMS_NAME).exists() and any((directory / name).exists() for name in _WEIGHTS):
        write_checksums(directory)


def replace_linears(model: Any, settings: Settings, headers: Mapping[str, TensorInfo]) -> None:
    """Put a ``NestedLinear`` in the place of every Linear that the settings do not ignore; experts are unfused before.

    Args:
        model: on the meta device, as transformers hands it over.
        settings: of the checkpoint.
        headers: stored tensors; empty skips the check against them (a state dict in memory).

    Raises:
        CheckpointError: architecture, settings and stored tensors do not agree. transformers itself would only warn
            of a missing tensor and fill it with random numbers.
    """
    family = known_family(model.config.model_type)
    if family is not None:
        unfuse_experts(model, family)
    prefix = f"{model.base_model_prefix}."
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    stored_layers = parts_of_layers(headers)
    replaced = set()
    for name, linear in linears.items():
        # A base model loaded from a causal one's checkpoint has names without the prefix.
        stored = prefix + name if name not in stored_layers and prefix + name in stored_layers else name
        found = stored_layers.get(stored, {})
        ignored = name in settings.ignore or prefix + name in settings.ignore
        if headers and (not ignored or any(map(is_own, found))):
            check_layer(settings, stored, found, (linear.out_features, linear.in_features))
        if ignored:
            continue
        model.set_submodule(name, _replacement(linear, settings, stored))
        replaced.add(stored)
    if headers:
        left_over = sorted(layer for layer, found in stored_layers.items() if any(map(is_own, found)))
        left_over = [layer for layer in left_over if layer not in replaced]
        if left_over:
            raise CheckpointError(
                f"layer {left_over[0]}: the checkpoint has codes or scales for it, the architecture has no such layer"
            )
        _check_kept(model, headers)
    unknown = sorted({*settings.layer_group_sizes, *(settings.layer_bits or {})} - replaced)
    if unknown:
        raise CheckpointError(f"config.json gives layer {unknown[0]} a size, the model has no such layer")


def _replacement(linear: nn.Linear, settings: Settings, layer: str) -> NestedLinear:
    group_size = settings.group_size_of(layer, linear.in_features)
    shape = linear.in_features, linear.out_features, linear.bias is not None, group_size
    device, dtype = linear.weight.device, linear.weight.dtype
    if settings.is_slice:
        return SlicedLinear(*shape, settings.bits_of(layer), device=device, dtype=dtype)
    return NestedLinear(*shape, settings.scale_bits, settings.bits, device=device, dtype=dtype)


def _check_kept(model: Any, headers: Mapping[str, TensorInfo]) -> None:
    """Refuse a checkpoint that lacks a tensor of the model, or holds one of another shape."""
    state = model.state_dict()
    matched = match_names(model, headers)
    for stored, name in matched.items():
        info, wanted = headers[stored], tuple(state[name].shape)
        if info.shape != wanted:
            raise CheckpointError(f"{info.file}: tensor {stored} is {list(info.shape)}, must be {list(wanted)}")
    present = set(matched.values())
    present = with_tied(model, present)
    optional = model._keys_to_ignore_on_load_missing or ()
    lost = [name for name in state if name not in present and not any(re.search(p, name) for p in optional)]
    if lost:
        raise CheckpointError(f"the checkpoint has no tensor {lost[0]} ({len(lost)} of the model's are missing)")


def register() -> None:
    """Make ``from_pretrained`` know our quantization methods; harmless when called again."""
    # Not `from transformers.quantizers import auto`: the package may still be halfway through its own import.
    quantizers_auto: Any = importlib.import_module("transformers.quantizers.auto")
    for method in (QUANT_METHOD, SLICE_METHOD):
        quantizers_auto.AUTO_QUANTIZATION_CONFIG_MAPPING[method] = MatGPTQConfig
        quantizers_auto.AUTO_QUANTIZER_MAPPING[method] = MatGPTQQuantizer
    # transformers takes loading options only from the classes in this tuple; without it, asking for a width through
    # quantization_config=MatGPTQConfig(bits=3) would be ignored with a warning.
    known = quantizers_auto.LOADING_ATTRIBUTES_CONFIG_TYPES
    if MatGPTQConfig not in known:
        quantizers_auto.LOADING_ATTRIBUTES_CONFIG_TYPES = (*known, MatGPTQConfig)


register()  # importing this module is enough, whoever does it and however early
