"""The model card of a checkpoint, ``README.md``: what each width is worth, how to load it, how it was made.

Our part stands between two comments. Everything else in the file, the card of the full-precision model for one, is
kept, and so is all metadata that is not about the quantization.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matgptq import figures
from matgptq.checkpoint import Checkpoint, open_checkpoint, replace_file
from matgptq.errors import CheckpointError
from matgptq.evaluation_record import read_record
from matgptq.slicing import WIDTHS
from matgptq.source import is_hub_id, public_name

CARD_NAME = "README.md"
_BEGIN = "<!-- matgptq: from here to the next such line written by `matgptq card`, the rest is kept -->"
_END = "<!-- matgptq: end -->"
_OWN_PART = re.compile(rf"{re.escape(_BEGIN)}.*?{re.escape(_END)}\n*", re.DOTALL)
# What transformers puts in front of a repository without a card; a form with nothing filled in.
_TEMPLATE = "This model card has been automatically generated."
_PAPER = "arxiv:2602.03537"

Record = Mapping[str, Sequence[Mapping[str, Any]]]


def write_card(path: str | Path, *, name: str | None = None) -> Path:
    """Write or renew the card of a checkpoint directory.

    Args:
        path: checkpoint directory.
        name: what the examples in the card load: a hub id; default: the directory's own name.

    Returns:
        The file.

    Raises:
        CheckpointError: not a checkpoint, a damaged record, metadata that is no YAML, or a directory that cannot be
            written.
    """
    checkpoint = open_checkpoint(path)
    file = checkpoint.path / CARD_NAME
    name = name or checkpoint.path.resolve().name
    replace_file(file, card_text(checkpoint, read_record(path), name, read_card(file)))
    return file


def read_card(file: Path) -> str:
    """The card as it stands, empty if there is none; raises ``CheckpointError`` if it cannot be read."""
    try:
        return file.read_text(encoding="utf-8") if file.exists() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file}: cannot be read: {error}") from error


def card_text(checkpoint: Checkpoint, record: Record, name: str, existing: str = "") -> str:
    """The whole card.

    Args:
        checkpoint: what it describes.
        record: what was measured; see ``matgptq.evaluation_record``.
        name: what the examples load.
        existing: a card to be kept around our part.
    """
    from huggingface_hub import ModelCard

    try:
        card = ModelCard(existing or "---\n{}\n---\n")
    except Exception as error:  # whatever a YAML parser raises
        raise CheckpointError(f"{CARD_NAME}: its metadata cannot be read: {error}") from error
    card.data.library_name = "transformers"
    card.data.pipeline_tag = "text-generation"
    card.data.tags = list(dict.fromkeys([*(card.data.tags or ()), "matgptq", "quantized", _PAPER]))
    if checkpoint.settings.source is not None and is_hub_id(checkpoint.settings.source):
        card.data.base_model = checkpoint.settings.source
        card.data.base_model_relation = "quantized"
    kept = "" if _TEMPLATE in card.text else _OWN_PART.sub("", card.text).strip()
    parts = (_widths(checkpoint, record), _tasks(record), _use(checkpoint, name), _making(checkpoint))
    title = f"# {name.rpartition('/')[2]}: one checkpoint, any width from 2 to 8 bits"
    own = "\n\n".join([_BEGIN, title, *filter(None, parts), _END])
    card.text = f"\n{own}\n" + (f"\n{kept}\n" if kept else "")
    return str(card)


def _table(header: Iterable[str], rows: Iterable[Iterable[str]], left: int = 0) -> str:
    """Markdown; the first ``left`` columns are text, the others numbers."""
    cells = list(header)
    rules = ["---"] * left + ["---:"] * (len(cells) - left)
    return "\n".join("| " + " | ".join(row) + " |" for row in (cells, rules, *rows))


def _widths(checkpoint: Checkpoint, record: Record) -> str:
    def sizes(bits: int) -> tuple[str, ...]:
        size = figures.megabytes(checkpoint.served_bytes(bits))
        return str(bits), f"{checkpoint.bits_per_weight(bits):.2f}", size

    source = checkpoint.settings.source
    origin = "a full-precision model" if source is None else f"`{public_name(source)}`"
    parts = [
        f"{origin} quantized once, by post-training Matryoshka quantization "
        f"([arXiv 2602.03537](https://arxiv.org/abs/2602.03537)): the most significant bits of its 8-bit codes are "
        f"models of 2, 3, 4, 5, 6 and 7 bits. Codes of {checkpoint.quantized_weights:,} weights take the width you "
        f"choose; a size below is all that is served, with scales, embeddings and head.",
        "## Widths",
    ]
    texts = record["texts"]
    if not texts:
        parts.append(_table(("bits", "bits per weight", "size"), map(sizes, WIDTHS)))
    for entry in reversed(texts):  # the last measured first
        rows = [
            (
                *sizes(row["bits"]),
                figures.perplexity(row["perplexity"]),
                figures.divergence(row["kl"]),
                figures.share(row["top1"]),
            )
            for row in entry["results"]
        ]
        if entry.get("reference_perplexity") is not None:
            rows.append(("full", "", "", figures.perplexity(entry["reference_perplexity"]), "0", "100%"))
        header = ("bits", "bits per weight", "size", "perplexity", "KL", "top-1")
        compared = f", compared with {entry['reference']}" if entry.get("reference") else ""
        parts += [_table(header, rows), f"{entry['protocol']}{_settings(entry)}{compared}."]
    if texts:
        parts.append(
            "KL: KL(full || slice) of the next token in nats, mean over the positions. top-1: positions at which both "
            "prefer the same token."
        )
    return "\n\n".join(parts)


def _settings(entry: Mapping[str, Any]) -> str:
    settings = entry.get("settings", {})
    special = [f"activations in {settings['activations']}"] if settings.get("activations", "exact") != "exact" else []
    if settings.get("head_bits") is not None:
        special.append(f"output head at {settings['head_bits']} bits")
    return "".join(f", {each}" for each in special)


def _tasks(record: Record) -> str:
    parts = []
    for entry in reversed(record["tasks"]):
        columns = [(f"{row['bits']} bits", row["scores"]) for row in entry["results"]]
        if entry.get("reference_scores"):
            columns.append(("full", entry["reference_scores"]))
        rows = []
        for task in entry["shown"]:
            found: Mapping[str, Any] = next((scores[task] for _, scores in columns if task in scores), {})
            for metric, score in found.items():
                cells = (scores.get(task, {}).get(metric) for _, scores in columns)
                texts = ["-" if cell is None else figures.score(cell["value"], cell["stderr"]) for cell in cells]
                rows.append((f"{task} ({score['shots']}-shot)", metric, *texts))
        header = ("task", "metric", *(label for label, _ in columns))
        parts += [_table(header, rows, left=2), f"{entry['protocol']}{_settings(entry)}; value ± standard error."]
    return "\n\n".join(["## Tasks", *parts]) if parts else ""


def _use(checkpoint: Checkpoint, name: str) -> str:
    layer, default = next(iter(checkpoint.layers)), checkpoint.settings.bits
    return f"""## Use

With the Python package `matgptq`:

```python
import matgptq
from transformers import AutoTokenizer

model = matgptq.load("{name}", bits=4)  # any of 2, 3, 4, 5, 6, 7, 8
tokenizer = AutoTokenizer.from_pretrained("{name}")
prompt = tokenizer("The capital of France is", return_tensors="pt").to(model.device)
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=20)[0]))

model.set_bits(3)  # another width of the same model, at once
model.set_bits({{"{layer}": 6}})  # a width for one layer
```

`AutoModelForCausalLM.from_pretrained("{name}")` works after `import matgptq`. It serves {default} bits, as `bits` in
`config.json` says; `quantization_config=matgptq.MatGPTQConfig(bits=3)` asks for another width."""


def _making(checkpoint: Checkpoint) -> str:
    settings = checkpoint.settings
    method = settings.recipe.get("method", "unknown")
    protocol = settings.calibration.get("protocol")
    lines = [
        f"method `{method}`, target widths {', '.join(map(str, settings.target_bits))}, groups of "
        f"{settings.group_size if settings.group_size > 0 else 'a whole row'}, symmetric codes of 8 bits",
        f"calibration: {public_text(settings.calibration, str(protocol)) if protocol else 'none'}",
        f"kept at full precision: {', '.join(settings.ignore) or 'no Linear layer'}",
        "every option: `quantization_config.recipe` in `config.json`",
    ]
    return "## How it was made\n\n" + "\n".join(f"* {line}" for line in lines)


def public_text(calibration: Mapping[str, Any], text: str) -> str:
    """A text about the calibration without the directory that its data lay in."""
    dataset = str(calibration.get("dataset", ""))
    return text.replace(dataset, Path(dataset).name) if Path(dataset).is_absolute() else text
