"""Where text comes from: local files, data sets of the Hugging Face Hub by name, and how each is cut into documents.

    .txt                            documents end at ``<|endoftext|>`` if the file has any, else at blank lines; a file
                                    with neither holds one document a line
    .jsonl, .jsonl.gz, .json.gz     one object a line: ``text``, or ``messages`` for the chat template
    .parquet                        a column ``text`` or ``messages``
    wikitext2, c4, fineweb-edu      the files that the literature uses
    owner/name                      any other data set of the Hub, through its parquet conversion

Everything malformed is a ``CalibrationError`` that names the file and the line or row; only empty documents are
skipped. Readers are lazy and can be started again, so that a large file need not be held in memory.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from matgptq.errors import CalibrationError

Split = Literal["train", "test"]
Messages = list[dict[str, Any]]

# How many documents of a data set of the hub evaluation takes where it is asked for all of its text. The GPTQ papers
# and EvoPress (which MatGPTQ measures with) take so many of C4's validation split.
EVALUATION_DOCUMENTS = 1100

FILE_SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".json.gz", ".parquet")
DATASET_NAMES = ("wikitext2", "c4", "fineweb-edu")
END_OF_TEXT = "<|endoftext|>"

_ALIASES = {
    "wikitext-2": "wikitext2",
    "salesforce/wikitext": "wikitext2",
    "allenai/c4": "c4",
    "fineweb_edu": "fineweb-edu",
    "huggingfacefw/fineweb-edu": "fineweb-edu",
}
_WIKITEXT_FILES = {
    "train": "wikitext-2-raw-v1/train-00000-of-00001.parquet",
    "test": "wikitext-2-raw-v1/test-00000-of-00001.parquet",
}
_C4_FILES = {
    "train": "en/c4-train.00000-of-01024.json.gz",
    "test": "en/c4-validation.00000-of-00008.json.gz",
}
# fineweb-edu has no test split: evaluation takes a file that calibration never reads.
_FINEWEB_FILES = {"train": "sample/10BT/000_00000.parquet", "test": "sample/10BT/001_00000.parquet"}
_PARQUET_REVISION = "refs/convert/parquet"

_BLANK_LINE = re.compile(r"\r?\n[ \t\r]*\n")
_REPOSITORY = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
# A top-level heading of WikiText: " = Title = ", and not " = = Section = = ".
_ARTICLE_HEADING = re.compile(r" ?= [^=](.*[^=])? = ?\n?")


@dataclass(frozen=True)
class Document:
    """One document before tokenization.

    Attributes:
        content: plain text, or a conversation that the tokenizer's chat template turns into text.
        where: file and line or row, for messages to the user.
    """

    content: str | Messages
    where: str

    @property
    def size(self) -> int:
        """Length in characters (of a conversation: about)."""
        return len(self.content) if isinstance(self.content, str) else len(str(self.content))


Reader = Callable[[], Iterator[Document]]


@dataclass(frozen=True)
class TextSource:
    """A text that can be read as documents, any number of times.

    Attributes:
        name: what the user asked for, with the file that it stands for.
        title: how records call it: a local file without its directory, which is nobody else's business.
        parts: readers of disjoint parts in file order. One part for a local file; a remote parquet file has one
            for each row group, so that those which are not needed are never downloaded.
        whole_text: the exact text for evaluation where it is not simply the documents joined, or ``None``.
        whole_text_is: what ``whole_text`` is, in words.
        evaluation_documents: how many of the documents are all of the text for evaluation; ``None``: every one.
        gptq_separator: what the code of the GPTQ papers puts between the documents of this source.
        gptq_windows: how many windows of it that code takes at most.
    """

    name: str
    title: str
    parts: Sequence[Reader]
    whole_text: Callable[[], str] | None = None
    whole_text_is: str = ""
    evaluation_documents: int | None = None
    gptq_separator: str = "\n\n"
    gptq_windows: int | None = None

    def documents(self) -> Iterator[Document]:
        """All documents in file order."""
        for part in self.parts:
            yield from part()


def open_text(dataset: str | Path, *, split: Split) -> TextSource:
    """Find the source that ``dataset`` names. Local files are opened by the readers; hub files are fetched here.

    Args:
        dataset: path of a file, a known name (``DATASET_NAMES``), or ``owner/name`` of a data set on the hub.
        split: which part of a data set on the hub to take; a local file is taken as it is.

    Raises:
        CalibrationError: no such file or data set, an unknown extension, or a download that failed.
    """
    name = str(dataset)
    known = _ALIASES.get(name.lower(), name.lower())
    path = Path(dataset).expanduser()
    if isinstance(dataset, str) and known in DATASET_NAMES:
        return _open_known(known, split)
    if os.path.isfile(path):  # also of a name that is too long for one
        return _open_file(path)
    if not name.strip():
        raise CalibrationError("the name of the text is empty")
    if os.path.isdir(path):
        raise CalibrationError(f"{name} is a directory; give one file ({', '.join(FILE_SUFFIXES)})")
    looks_like_file = name.lower().endswith(FILE_SUFFIXES) or os.path.isdir(path.parent)
    if isinstance(dataset, str) and _REPOSITORY.fullmatch(name) and not looks_like_file:
        return _open_repository(name, split)
    raise CalibrationError(
        f"{name}: no such file; give a file ({', '.join(FILE_SUFFIXES)}), a data set by name "
        f"({', '.join(DATASET_NAMES)} or owner/name on the Hugging Face Hub), or 'self'"
    )


def _open_file(path: Path) -> TextSource:
    name, title, lower = str(path), path.name, path.name.lower()
    if lower.endswith(".txt"):
        return TextSource(name, title, [lambda: _read_txt(path)], lambda: _decode_file(path), "the file as one string")
    if lower.endswith((".jsonl", ".jsonl.gz", ".json.gz")):
        return TextSource(name, title, [lambda: _read_json_lines(path)])
    if lower.endswith(".parquet"):
        return TextSource(name, title, [lambda: _read_parquet(path)])
    raise CalibrationError(f"{name}: unknown extension; matgptq reads {', '.join(FILE_SUFFIXES)}")


# --- text and JSON lines ---------------------------------------------------------------------------------------------


def _decode_file(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise CalibrationError(f"{path}: cannot be read: {error.strerror or error}") from error
    try:
        # Bytes are decoded by hand because text mode would turn \r\n into \n, and evaluation takes the file as it is.
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise CalibrationError(f"{path}, line {line}: not UTF-8 ({error.reason}); convert the file to UTF-8") from error
    if not text.strip():
        raise CalibrationError(f"{path}: the file is empty")
    return text


def _read_txt(path: Path) -> Iterator[Document]:
    text = _decode_file(path).strip()
    if END_OF_TEXT in text:
        pieces = text.split(END_OF_TEXT)
    elif _BLANK_LINE.search(text):
        pieces = _BLANK_LINE.split(text)
    else:
        pieces = text.split("\n")
    for number, piece in enumerate(pieces, 1):
        if piece.strip():
            yield Document(piece.strip("\r\n"), f"{path}, document {number}")


def _read_json_lines(path: Path) -> Iterator[Document]:
    number, empty = 0, True
    try:
        with gzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb") as file:
            for number, line in enumerate(file, 1):
                document = _parse_json_line(line, f"{path}, line {number}") if line.strip() else None
                if document is not None:
                    empty = False
                    yield document
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise CalibrationError(f"{path}, after line {number}: damaged gzip data: {error}") from error
    except OSError as error:
        raise CalibrationError(f"{path}: cannot be read: {error.strerror or error}") from error
    if empty:
        raise CalibrationError(f"{path}: the file holds no text")


def _parse_json_line(line: bytes, where: str) -> Document | None:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{where}: not UTF-8 ({error.reason}); convert the file to UTF-8") from error
    except (ValueError, RecursionError) as error:  # of numbers without end a ValueError
        raise CalibrationError(f"{where}: not valid JSON: {error}") from error
    if not isinstance(record, dict):
        raise CalibrationError(f"{where}: expected an object with `text` or `messages`, not {type(record).__name__}")
    for field in ("text", "messages"):
        if field in record:
            return _checked_document(record[field], field, where)
    raise CalibrationError(f"{where}: no field `text` or `messages`; the fields are {_listed(record)}")


def _checked_document(value: object, field: str, where: str) -> Document | None:
    """The document in a field, or ``None`` if it is empty."""
    if field == "text":
        if not isinstance(value, str):
            raise CalibrationError(f"{where}: `text` must be a string, not {type(value).__name__}")
        return Document(value, where) if value.strip() else None
    if not isinstance(value, list) or not all(isinstance(message, dict) and "role" in message for message in value):
        raise CalibrationError(f"{where}: `messages` must be a list of objects with `role` and `content`")
    return Document(value, where) if value else None


def _listed(names: Any) -> str:
    return ", ".join(map(repr, names)) or "none"


# --- parquet ---------------------------------------------------------------------------------------------------------


@contextmanager
def _open_parquet(file: Any, name: str) -> Iterator[Any]:
    """``pyarrow.parquet.ParquetFile`` of a path or file object; pyarrow's errors become ``CalibrationError``."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise CalibrationError(f'{name}: reading parquet needs pyarrow: pip install "matgptq[parquet]"') from error
    try:
        opened = parquet.ParquetFile(file)
        try:
            yield opened
        finally:
            opened.close()
    except (pyarrow.ArrowException, OSError) as error:
        raise CalibrationError(f"{name}: cannot be read: {error}") from error


def _read_parquet(path: Path) -> Iterator[Document]:
    with _open_parquet(path, str(path)) as file:
        if not file.metadata.num_rows:
            raise CalibrationError(f"{path}: the file is empty")
        for group in range(file.metadata.num_row_groups):
            yield from _read_row_group(file, group, str(path))


def _read_row_group(file: Any, group: int, name: str) -> Iterator[Document]:
    columns = file.schema_arrow.names
    field = next((field for field in ("text", "messages") if field in columns), None)
    if field is None:
        raise CalibrationError(f"{name}: no column `text` or `messages`; the columns are {_listed(columns)}")
    row = sum(file.metadata.row_group(earlier).num_rows for earlier in range(group))
    for batch in file.iter_batches(batch_size=1024, row_groups=[group], columns=[field]):
        for value in batch.column(0).to_pylist():
            row += 1
            document = _checked_document(value, field, f"{name}, row {row}")
            if document is not None:
                yield document


# --- the Hugging Face Hub --------------------------------------------------------------------------------------------


@contextmanager
def _hub_errors(name: str) -> Iterator[None]:
    """Turn whatever a download raises into a ``CalibrationError``; our own errors pass."""
    try:
        yield
    except CalibrationError:
        raise
    except Exception as error:
        # The hub's client has changed its HTTP library and thereby its exceptions before; all of them end here.
        reason = (str(error).strip().splitlines() or [""])[0]
        raise CalibrationError(
            f"{name}: cannot be fetched from the Hugging Face Hub ({type(error).__name__}: {reason}); "
            f"check the name and the connection, or give a local file ({', '.join(FILE_SUFFIXES)})"
        ) from error


def _download(name: str, repository: str, filename: str) -> Path:
    from huggingface_hub import hf_hub_download

    with _hub_errors(name):
        return Path(hf_hub_download(repository, filename, repo_type="dataset"))


def _open_known(name: str, split: Split) -> TextSource:
    if name == "wikitext2":
        path = _download(name, "Salesforce/wikitext", _WIKITEXT_FILES[split])
        title = f"wikitext2 ({split})"
        return TextSource(
            title,
            title,
            [lambda: _read_wikitext_articles(path)],
            lambda: "\n\n".join(_wikitext_rows(path)),
            'all rows joined by "\\n\\n"',
        )
    if name == "c4":
        path = _download(name, "allenai/c4", _C4_FILES[split])
        title = f"c4 ({_C4_FILES[split]})"
        return TextSource(
            title,
            title,
            [lambda: _read_json_lines(path)],
            evaluation_documents=EVALUATION_DOCUMENTS,
            gptq_separator=" ",
            gptq_windows=256,
        )
    filename = _FINEWEB_FILES[split]
    return _open_remote_parquet(f"fineweb-edu ({filename})", f"datasets/HuggingFaceFW/fineweb-edu/{filename}")


def _wikitext_rows(path: Path) -> list[str]:
    with _open_parquet(path, str(path)) as file:
        rows: list[str] = file.read(columns=["text"]).column("text").to_pylist()
        return rows


def _read_wikitext_articles(path: Path) -> Iterator[Document]:
    """Articles rather than rows: a row of WikiText is a paragraph, and shuffled paragraphs have no context."""
    article: list[str] = []
    start = 1
    for number, row in enumerate(_wikitext_rows(path), 1):
        if _ARTICLE_HEADING.fullmatch(row) and article:
            yield Document("".join(article), f"{path}, row {start}")
            article, start = [], number
        if row.strip() or article:
            article.append(row)
    if "".join(article).strip():
        yield Document("".join(article), f"{path}, row {start}")


def _open_repository(name: str, split: Split) -> TextSource:
    from huggingface_hub import HfFileSystem

    with _hub_errors(name):
        found = HfFileSystem().find(f"datasets/{name}@{_PARQUET_REVISION}")
    files = sorted(path for path in found if path.endswith(".parquet"))
    if not files:
        raise CalibrationError(f"{name}: the hub has no parquet conversion of this data set; download a file of it")
    # The conversion is laid out as config/split/0000.parquet; a split cut short is called partial-<split>.
    wanted = ("train",) if split == "train" else ("test", "validation")
    ranked = [path for part in wanted for path in files if path.split("/")[-2].startswith((part, f"partial-{part}"))]
    chosen = (ranked or files)[0]
    shown = "/".join(chosen.split("/")[-3:])
    return _open_remote_parquet(f"{name} ({shown})", chosen)


def _open_remote_parquet(name: str, remote_path: str) -> TextSource:
    from huggingface_hub import HfFileSystem

    filesystem = HfFileSystem()

    def read_group(group: int) -> Iterator[Document]:
        with _hub_errors(name), filesystem.open(remote_path, "rb") as raw, _open_parquet(raw, name) as file:
            yield from _read_row_group(file, group, name)

    with _hub_errors(name), filesystem.open(remote_path, "rb") as raw, _open_parquet(raw, name) as file:
        groups = file.metadata.num_row_groups
    if not groups:
        raise CalibrationError(f"{name}: the file is empty")
    # One reader a row group; `group=group` because a closure would see the last value of the loop only.
    parts: list[Reader] = [lambda group=group: read_group(group) for group in range(groups)]  # type: ignore[misc]
    return TextSource(name, name, parts, evaluation_documents=EVALUATION_DOCUMENTS)
