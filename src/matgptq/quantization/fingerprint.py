"""What the result of a run depends on, in a few digits: the model's files, the text, the software."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from matgptq.models.source import ModelSource
from matgptq.text.windows import text_names

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
        files |= {file for file in source.side_files().values() if _belongs_to_tokenizer(file)}
    return {file.name: fingerprint_file(file) for file in sorted(files)}


def _belongs_to_tokenizer(file: Path) -> bool:
    """Which tokens a text becomes depends on these."""
    return file.suffix in (".model", ".tiktoken", ".jinja") or file.name.startswith(
        ("tokenizer", "vocab", "merges", "special_tokens", "added_tokens", "chat_template")
    )


def fingerprint_data(dataset: str | Path | Tensor) -> str:
    """Calibration texts: what is in the files, the digits of the token ids, or else their names."""
    if isinstance(dataset, Tensor):
        content = dataset.to("cpu", torch.int64).contiguous()
        return f"token ids {hashlib.blake2b(content.numpy().tobytes(), digest_size=16).hexdigest()}"
    paths = [Path(name).expanduser() for name in text_names(dataset)]
    return ",".join(fingerprint_file(path) if os.path.isfile(path) else str(path) for path in paths)


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
