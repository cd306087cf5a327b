"""The model card of a checkpoint, ``README.md``: what each width is worth, how to load it, how it was made.

Our part stands between two comments. Everything else in the file, the card of the full-precision model for one, is
kept, and so is all metadata that is not about the quantization.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matgptq.checkpoints.allocation_store import ALLOCATIONS, stored_allocations
from matgptq.checkpoints.checkpoint import Checkpoint, open_checkpoint
from matgptq.checkpoints.evaluation_record import read_record
from matgptq.checkpoints.format import CARD_MARK, CARD_NAME
from matgptq.errors import CheckpointError
from matgptq.files.atomic import write_text
from matgptq.models.source import is_hub_id, public_name
from matgptq.publishing import figures

_BEGIN = f"{CARD_MARK}from here to the next such line written by `matgptq card`, the rest is kept -->"
_END = f"{CARD_MARK}end -->"
_OWN_PART = re.compile(rf"{re.escape(_BEGIN)}.*?{re.escape(_END)}\n*", re.DOTALL)
# What transformers puts in front of a repository without a card; a form with nothing filled in.
_TEMPLATE = "This model card has been automatically generated."
_PAPER = "arxiv:2602.03537"


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
    checkpoint = open_checkpoint(path, slices=True)
    file = checkpoint.path / CARD_NAME
    name = name or checkpoint.path.resolve().name
    write_text(file, card_text(checkpoint, checkpoint, name, read_card(file)))
    return file


def read_card(file: Path) -> str:
    """The card as it stands, empty if there is none; raises ``CheckpointError`` if it cannot be read."""
    try:
        return file.read_text(encoding="utf-8") if file.exists() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file}: cannot be read: {error}") from error


def card_text(checkpoint: Checkpoint, measured: Checkpoint, name: str, existing: str = "") -> str:
    """The whole card.

    Args:
        checkpoint: what it describes.
        measured: the same, or another directory with the same weights, which has the record of what was measured and
            the allocations.
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
    record, allocations = read_record(measured), stored_allocations(measured)
    parts = (
        _origin(checkpoint),
        _widths(checkpoint, record["texts"], {key: each.get("layers", each) for key, each in allocations.items()}),
        _tasks(record["tasks"]),
        _use(checkpoint, name),
        _making(checkpoint),
    )
    promise = "one slice" if checkpoint.settings.is_slice else "one checkpoint, any width from 2 to 8 bits"
    title = f"# {name.rpartition('/')[2]}: {promise}"
    own = "\n\n".join([_BEGIN, title, *filter(None, parts), _END])
    card.text = f"\n{own}\n" + (f"\n{kept}\n" if kept else "")
    return str(card)


def _table(header: Iterable[str], rows: Iterable[Iterable[str]], left: int = 0) -> str:
    """Markdown; the first ``left`` columns are text, the others numbers."""
    cells = list(header)
    rules = ["---"] * left + ["---:"] * (len(cells) - left)
    return "\n".join("| " + " | ".join(row) + " |" for row in (cells, rules, *rows))


def _origin(checkpoint: Checkpoint) -> str:
    source = checkpoint.settings.source
    name = "A full-precision model" if source is None else f"`{public_name(source)}`"
    held = (
        "this is one slice of its codes"
        if checkpoint.settings.is_slice
        else "the most significant bits of its 8-bit codes are models of 2, 3, 4, 5, 6 and 7 bits"
    )
    return (
        f"{name}, quantized once by post-training Matryoshka quantization "
        f"([arXiv 2602.03537](https://arxiv.org/abs/2602.03537)): {held}. {checkpoint.quantized_weights:,} weights are "
        "quantized; a size below is everything that is served, with scales, embeddings and head."
    )


def _widths(
    checkpoint: Checkpoint, texts: Sequence[Mapping[str, Any]], allocations: Mapping[str, Mapping[str, int]]
) -> str:
    def cost(bits: float, allocation: str | None = None) -> tuple[str, str, str]:
        if allocation is not None:
            widths: int | Mapping[str, int] = allocations[allocation]
        else:
            widths = checkpoint.widths_held[0] if checkpoint.settings.is_slice else int(bits)
        size = figures.megabytes(checkpoint.served_bytes(widths))
        return figures.width(bits, allocation), f"{checkpoint.bits_per_weight(widths):.2f}", size

    parts = ["## Widths"]
    if not texts:
        rows = [cost(checkpoint.average_bits(widths)) for widths in checkpoint.widths_held]
        rows += [cost(checkpoint.average_bits(widths), name) for name, widths in allocations.items()]
        parts.append(_table(("bits", "bits per weight", "size"), rows))
    for entry in reversed(texts):  # the last measured first
        measured = [
            (
                *cost(row["bits"], row["allocation"]),
                figures.perplexity(row["perplexity"]),
                figures.divergence(row["kl"]),
                figures.share(row["top1"]),
            )
            for row in entry["results"]
        ]
        if entry.get("reference_perplexity") is not None:
            measured.append(("full", "", "", figures.perplexity(entry["reference_perplexity"]), "0", "100%"))
        header = ("bits", "bits per weight", "size", "perplexity", "KL", "top-1")
        compared = f", compared with {entry['reference']}" if entry.get("reference") else ""
        parts += [_table(header, measured), f"{entry['protocol']}{figures.settings(entry['settings'])}{compared}."]
    if texts:
        parts.append(
            "KL: KL(full || slice) of the next token in nats, mean over the positions. top-1: positions at which both "
            "prefer the same token."
        )
    if allocations:
        parts.append(f"A row with a name has a width for each layer, from `{ALLOCATIONS}/`: `--allocation NAME`.")
    return "\n\n".join(parts)


def _tasks(tasks: Sequence[Mapping[str, Any]]) -> str:
    parts = []
    for entry in reversed(tasks):
        columns = [(figures.width(row["bits"], row["allocation"], " bits"), row["scores"]) for row in entry["results"]]
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
        parts += [
            _table(header, rows, left=2),
            f"{entry['protocol']}{figures.settings(entry['settings'])}; value ± standard error.",
        ]
    return "\n\n".join(["## Tasks", *parts]) if parts else ""


def _use(checkpoint: Checkpoint, name: str) -> str:
    load = f'model = matgptq.load("{name}")'
    more = ""
    rest = f'`AutoModelForCausalLM.from_pretrained("{name}")` works after `import matgptq`.'
    if not checkpoint.settings.is_slice:
        load = f'model = matgptq.load("{name}", bits=4)  # any of 2, 3, 4, 5, 6, 7, 8'
        layer = next(iter(checkpoint.layers))
        more = (
            "\nmodel.set_bits(3)  # another width of the same model, at once\n"
            f'model.set_bits({{"{layer}": 6}})  # a width for one layer\n'
        )
        rest += (
            f" It serves {checkpoint.settings.bits} bits, as `bits` in\n`config.json` says; "
            "`quantization_config=matgptq.MatGPTQConfig(bits=3)` asks for another width.\n\n"
            f"`matgptq serve {name}` serves all widths behind OpenAI's API; "
            f"a request for the model `{name}:3` gets 3 bits."
        )
    return f"""## Use

With the Python package `matgptq`:

```python
import matgptq
from transformers import AutoTokenizer

{load}
tokenizer = AutoTokenizer.from_pretrained("{name}")
prompt = tokenizer("The capital of France is", return_tensors="pt").to(model.device)
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=20)[0]))
{more}```

{rest}"""


def _making(checkpoint: Checkpoint) -> str:
    settings = checkpoint.settings
    recipe = settings.recipe
    targets = ", ".join(map(str, recipe.get("target_bits", settings.target_bits)))
    group = settings.group_size if settings.group_size > 0 else "a whole row"
    protocol = settings.calibration.get("protocol")
    lines = [
        f"method `{recipe.get('method', 'unknown')}`, target widths {targets}, groups of {group}, symmetric codes",
        f"calibration: {without_paths({**settings.calibration})['protocol'] if protocol else 'none'}",
        f"kept at full precision: {', '.join(settings.ignore) or 'no Linear layer'}",
        "every option: `quantization_config` in `config.json`",
    ]
    if settings.refinement:
        widths = " and ".join(sorted(settings.refinement))
        lines.insert(1, f"scales of {widths} bits tuned afterwards toward the full-precision model")
    return "## How it was made\n\n" + "\n".join(f"* {line}" for line in lines)


def without_paths(record: Any) -> Any:
    """A JSON value in which the name of a file stands for each absolute path that it holds as a string of its own.

    Or as one of several between commas, as texts are named.

    Such a path is replaced where it appears inside of other strings, too.
    """
    paths: set[str] = set()

    def collect(value: Any) -> None:
        if isinstance(value, dict):
            value = list(value.values())
        if isinstance(value, list):
            for each in value:
                collect(each)
        elif isinstance(value, str) and "\n" not in value:
            paths.update(each for each in value.split(",") if Path(each).is_absolute() and Path(each).name)

    def replace(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: replace(each) for key, each in value.items()}
        if isinstance(value, list):
            return [replace(each) for each in value]
        if isinstance(value, str):
            for path in sorted(paths, key=len, reverse=True):
                value = value.replace(path, Path(path).name)
        return value

    collect(record)
    return replace(record)
