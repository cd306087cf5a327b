"""What the result of a run depends on, in a few digits: the model's files, the text, the software."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from matgptq.source import ModelSource

_SAMPLES, _SAMPLE_BYTES = 64, 1 << 16


def fingerprint_file(file: Path) -> str:
    """Size, and a hash of pieces spread over the file: at most 4 MB are read of files of any size."""
    size = file.stat().st_size
    digest = hashlib.blake2b(digest_size=16)
    last = max(0, size - _SAMPLE_BYTES)
    with file.open("rb") as handle:
        for start in sorted({last * number // (_SAMPLES - 1) for number in range(_SAMPLES)}):
            handle.seek(start)
            digest.update(handle.read(_SAMPLE_BYTES))
    return f"{size} bytes, {digest.hexdigest()}"


def fingerprint_model(source: ModelSource) -> dict[str, str]:
    """The files of a model by name, wherever they lie."""
    if source.gguf_file is not None:
        files = {source.directory / source.gguf_file}
    else:
        files = {info.file for info in source.tensors.values()} | {source.directory / "config.json"}
    return {file.name: fingerprint_file(file) for file in sorted(files)}


def fingerprint_data(dataset: str | Path | Tensor) -> str:
    """A calibration text: what is in the file, the digits of the token ids, or else its name."""
    if isinstance(dataset, Tensor):
        content = dataset.to("cpu", torch.int64).contiguous()
        return f"token ids {hashlib.blake2b(content.numpy().tobytes(), digest_size=16).hexdigest()}"
    path = Path(dataset).expanduser()
    return fingerprint_file(path) if path.is_file() else str(dataset)


def fingerprint_software(device: torch.device) -> dict[str, Any]:
    """Versions and hardware that may change the last digit of a result."""
    import transformers

    import matgptq

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    return {
        "matgptq": matgptq.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": f"{device.type}, {name}",
    }
