"""Where a full-precision model comes from: a Hugging Face directory, a GGUF file or a hub id."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from matgptq.core.finiteness import all_finite
from matgptq.errors import SourceError, UnsupportedModelError
from matgptq.files.json_files import read_json
from matgptq.files.stored_tensors import INDEX_NAME, WEIGHTS_NAME, TensorInfo, read_headers
from matgptq.models.gguf_source import dense_gguf, quick_gguf
from matgptq.models.model_config import attention_options, stored_dtype

_HUB_PATTERNS = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "LICENSE*", "*.tiktoken"]
CHAT_TEMPLATES = "additional_chat_templates"  # where transformers keeps templates beyond the first
_HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
# Weights in any format; every other file of the directory goes along with the checkpoint.
_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ot", ".ckpt"}


@dataclass(frozen=True)
class ModelSource:
    """A model that can be loaded and copied.

    Attributes:
        name: what the user called it.
        directory: local directory with all its files.
        gguf_file: name of the GGUF file inside, or None for safetensors.
        config: parsed ``config.json``; empty for GGUF, which has none.
        tensors: headers of the stored tensors; empty for GGUF.
        trust_remote_code: whether the user allowed code from the model's directory to run.
    """

    name: str
    directory: Path
    gguf_file: str | None
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo] = field(repr=False)
    trust_remote_code: bool = False

    @property
    def stored_dtype(self) -> str | None:
        """The dtype that ``config.json`` names, if it names one."""
        return stored_dtype(self.config)

    @property
    def recorded_name(self) -> str:
        """What it is found by from any directory: its absolute path, or its hub id."""
        path = Path(self.name).expanduser()
        return str(path.resolve()) if path.exists() else self.name

    def load_model(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> Any:
        """The causal language model in eval mode, with every weight checked to be there and finite.

        Raises:
            SourceError: a weight is missing, not finite, or of another shape than the architecture's.
        """
        from transformers import AutoModelForCausalLM

        options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": self.trust_remote_code}
        options |= attention_options(self.config)
        if self.gguf_file:
            options |= {"gguf_file": self.gguf_file, **dense_gguf()}
        try:
            with quick_gguf() if self.gguf_file else nullcontext():
                model, loading = AutoModelForCausalLM.from_pretrained(
                    self.directory, output_loading_info=True, **options
                )
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # configurations and GGUF files that make no sense fail in any way
            raise SourceError(f"{self.name}: transformers cannot load it: {type(error).__name__}: {error}") from error
        missing = sorted(loading["missing_keys"])
        if missing:
            raise SourceError(f"{self.name}: the files hold no {missing[0]} ({len(missing)} tensors are missing)")
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and not all_finite(tensor):
                raise SourceError(f"{self.name}: tensor {name} holds NaN or Inf")
        model.eval().requires_grad_(False)
        return model.to(device)

    def load_tokenizer(self) -> Any:
        """The tokenizer that comes with the model; raises ``SourceError`` when there is none."""
        return load_tokenizer(self.directory, gguf_file=self.gguf_file, trust_remote_code=self.trust_remote_code)

    def side_files(self) -> dict[str, Path]:
        """Everything beside the weights that belongs to the model: tokenizer, chat templates, generation config.

        Returns ``{place relative to the directory: file}``; hidden files and foreign directories are left out.
        """
        return {} if self.gguf_file else side_files(self.directory)


def side_files(directory: Path) -> dict[str, Path]:
    """Everything in a model directory beside configuration and weights: ``{place relative to it: file}``.

    Hidden files and foreign directories are left out.
    """
    files = [*directory.iterdir(), *(directory / CHAT_TEMPLATES).glob("*.jinja")]
    return {
        str(file.relative_to(directory)): file
        for file in sorted(files)
        if file.is_file()
        and file.name != "config.json"
        and not file.name.endswith(".index.json")
        and not file.name.startswith(".")
        and file.suffix not in _WEIGHT_SUFFIXES
    }


def load_tokenizer(directory: str | Path, *, gguf_file: str | None = None, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model directory, hub id or GGUF file; raises ``SourceError`` when there is none."""
    from transformers import AutoTokenizer

    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if gguf_file:
        options["gguf_file"] = gguf_file
    try:
        with quick_gguf() if gguf_file else nullcontext():
            return AutoTokenizer.from_pretrained(directory, **options)
    except Exception as error:  # transformers raises nearly anything here, depending on what file is absent
        raise SourceError(f"{directory}: no tokenizer can be loaded from it ({error})") from error


def is_hub_id(name: str) -> bool:
    """Whether a name can only be meant for the hub: ``owner/name``, and nothing here is called so."""
    return _HUB_ID.fullmatch(name) is not None and not Path(name).expanduser().exists()


def public_name(name: str) -> str:
    """What a model may be called outside of this machine: its hub id, or the last part of its path."""
    return name if is_hub_id(name) else Path(name).name


def open_source(model: str | Path, *, trust_remote_code: bool = False) -> ModelSource:
    """Find a model's files and check them without loading any weight.

    Args:
        model: a local directory, a ``.gguf`` file, or a hub id (downloaded, or taken from the cache).
        trust_remote_code: allow code in the model's directory to run. Off unless asked for.

    Raises:
        SourceError: files are missing or damaged, or the name is neither a path nor a hub id that can be fetched.
        UnsupportedModelError: the model is quantized already.
    """
    path = Path(model).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise SourceError(f"{path}: give a model directory, a .gguf file or a hub id")
        return _open_gguf(str(model), path, trust_remote_code)
    if not path.is_dir():
        path = _download(str(model))
    if not (path / "config.json").exists():
        gguf_files = sorted(path.glob("*.gguf"))
        if len(gguf_files) == 1:
            return _open_gguf(str(model), gguf_files[0], trust_remote_code)
        if gguf_files:
            raise SourceError(f"{path}: several .gguf files, name one of them: {', '.join(f.name for f in gguf_files)}")
        raise SourceError(f"{path}: no config.json in it, so it is not a model directory")
    config = read_json(path / "config.json")
    if record := config.get("quantization_config"):
        method = record.get("quant_method") if isinstance(record, dict) else None
        method = method or "an unnamed method"
        raise UnsupportedModelError(f"{model}: already quantized with {method}; start from the full-precision model")
    pickled = [*path.glob("*.bin"), *path.glob("*.pth")]
    if pickled and not (path / WEIGHTS_NAME).exists() and not (path / INDEX_NAME).exists():
        raise SourceError(
            f"{path}: {pickled[0].name} is a pickle, which can run code; convert the model to safetensors"
        )
    return ModelSource(str(model), path, None, config, read_headers(path), trust_remote_code)


def _open_gguf(name: str, file: Path, trust_remote_code: bool) -> ModelSource:
    with file.open("rb") as handle:
        if handle.read(4) != b"GGUF":
            raise SourceError(f"{file}: not a GGUF file")
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise SourceError(f'{file}: reading GGUF needs the gguf package: pip install "matgptq[gguf]"') from None
    return ModelSource(name, file.parent, file.name, {}, {}, trust_remote_code)


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_PATTERNS))
    except HFValidationError:
        raise SourceError(f"{name}: no such directory or file, and not a hub id of the form owner/name") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise SourceError(f"{name}: no such directory or file, and the hub did not give it: {error}") from error
