"""Checkpoints on the Hugging Face Hub: with a card, and without the paths of the machine that they were made on."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from matgptq.allocation import format_lines
from matgptq.checkpoints.allocation_scales import scales_file
from matgptq.checkpoints.allocation_store import ALLOCATIONS, stored_allocations
from matgptq.checkpoints.checkpoint import Checkpoint, is_checkpoint, open_checkpoint
from matgptq.checkpoints.evaluation_record import read_record
from matgptq.checkpoints.format import CARD_NAME, EXPORT_NAME, RECORD_NAME, REPORT_NAME
from matgptq.errors import ConfigurationError, UploadError
from matgptq.files.atomic import write_text
from matgptq.files.json_files import read_json
from matgptq.files.run_log import LOG_NAME
from matgptq.files.stored_tensors import INDEX_NAME
from matgptq.models.source import CHAT_TEMPLATES, is_hub_id
from matgptq.publishing.model_card import card_text, read_card, without_paths

# Beside the files of the directory itself; what else lies in it are states of unfinished runs.
_DIRECTORIES = (CHAT_TEMPLATES, ALLOCATIONS)


def push(
    path: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    message: str = "Upload checkpoint",
    token: str | bool | None = None,
) -> str:
    """Upload a checkpoint directory to the hub, its card written anew.

    Weights go from the disk as they are. Weight files of an earlier upload that the checkpoint does not have are
    deleted in the same commit, because loaders would find them first; other files of the repository stay.

    Args:
        path: checkpoint directory; it is not changed.
        repo_id: ``owner/name``; created if there is none.
        private: of a repository that is created; default: what its owner has set.
        revision: branch; it must exist. Default: main.
        message: of the commit.
        token: for the hub; default: the one that ``hf auth login`` stored.

    Returns:
        The commit's address.

    Raises:
        CheckpointError: damaged files. Nothing is uploaded.
        ConfigurationError: ``repo_id`` is not of the form ``owner/name``.
        UploadError: the hub refuses, or cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    if repo_id.count("/") != 1:
        raise ConfigurationError(f"a repository is called owner/name, not {repo_id!r}")
    checkpoint = open_checkpoint(path, slices=True)
    contents = published_texts(checkpoint, checkpoint, repo_id)
    folders = (checkpoint.path, *(checkpoint.path / name for name in _DIRECTORIES))
    found = [file for folder in folders for file in folder.glob("*") if file.is_file() and file.name[0] != "."]
    found = [file for file in found if file.name != LOG_NAME]  # it names paths of this machine
    files = {file.relative_to(checkpoint.path).as_posix(): file for file in found}
    added = [
        CommitOperationAdd(name, contents[name].encode() if name in contents else files[name])
        for name in sorted({*files, *contents})
    ]
    api = HfApi(token=token)
    with _hub_errors(repo_id):
        api.create_repo(repo_id, private=private, exist_ok=True)
        stale = [
            CommitOperationDelete(name)
            for name in api.list_repo_files(repo_id, revision=revision)
            if name not in files and (name.endswith(".safetensors") or name == INDEX_NAME)
        ]
        commit = api.create_commit(repo_id, [*added, *stale], commit_message=message, revision=revision)
        return str(commit.commit_url)


def published_texts(checkpoint: Checkpoint, measured: Checkpoint, repo_id: str) -> dict[str, str]:
    """Those files of a checkpoint that are published in another form than they have on this machine.

    Args:
        checkpoint: to be published.
        measured: the same, or another directory with the same weights: the record of what was measured and the
            allocations are taken from there.
        repo_id: where; the card's examples load it from there.

    Returns:
        ``{file name: content}``: the card, and every record without paths of this machine.
    """
    card = card_text(checkpoint, measured, repo_id, read_card(checkpoint.path / CARD_NAME))
    contents = {CARD_NAME: card, "config.json": _json(_published_config(checkpoint))}
    if (checkpoint.path / REPORT_NAME).exists():
        contents[REPORT_NAME] = _json(without_paths(read_json(checkpoint.path / REPORT_NAME)))
    if (checkpoint.path / EXPORT_NAME).exists():
        contents[EXPORT_NAME] = _json(without_paths(read_json(checkpoint.path / EXPORT_NAME)))
    if any(read_record(measured).values()):
        contents[RECORD_NAME] = _json(without_paths(read_json(measured.path / RECORD_NAME)))
    for name, record in stored_allocations(measured).items():
        contents[f"{ALLOCATIONS}/{name}.json"] = _json(without_paths(record))
        contents[f"{ALLOCATIONS}/{name}.txt"] = format_lines(record.get("layers", record))
    return contents


def _published_config(checkpoint: Checkpoint) -> dict[str, Any]:
    config = copy.deepcopy(dict(checkpoint.config))
    source = checkpoint.settings.source
    if source is not None and not is_hub_id(source):
        config["quantization_config"]["source"] = None  # a reader's machine has nothing there
    if not is_hub_id(str(config.get("_name_or_path", ""))):
        config.pop("_name_or_path", None)
    published: dict[str, Any] = without_paths(config)
    return published


def prepare_upload(directory: str | Path, repo_id: str, origin: str | Path) -> None:
    """Bring a directory that transformers saved for an upload into the form in which checkpoints are published.

    Args:
        directory: as saved; its texts are replaced.
        repo_id: where it goes.
        origin: what the model was loaded from. If it is a checkpoint directory with the same weights, what was
            measured on it and its allocations go along.
    """
    checkpoint = open_checkpoint(directory, slices=True)
    measured = checkpoint
    if is_checkpoint(Path(origin)):
        loaded = open_checkpoint(origin, slices=True)
        measured = loaded if loaded.identity == checkpoint.identity else checkpoint
    for name, content in published_texts(checkpoint, measured, repo_id).items():
        write_text(checkpoint.path / name, content)
    for name in stored_allocations(measured) if measured is not checkpoint else ():
        scales = scales_file(measured.path / ALLOCATIONS / f"{name}.json")
        if scales is not None:
            shutil.copy2(scales, checkpoint.path / ALLOCATIONS / scales.name)


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


@contextmanager
def _hub_errors(repo_id: str) -> Iterator[None]:
    """Turn whatever an upload raises into an ``UploadError``."""
    try:
        yield
    except Exception as error:
        # The hub's client has changed its HTTP library and thereby its exceptions before; all of them end here.
        reason = (str(error).strip().splitlines() or [""])[0]
        raise UploadError(
            f"{repo_id}: the upload failed ({type(error).__name__}: {reason}); check the name, your right to write "
            "there, `hf auth whoami` and the connection"
        ) from error
