"""Checkpoints on the Hugging Face Hub: with a card, and without the paths of the machine that they were made on."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from matgptq.checkpoint import REPORT_NAME, Checkpoint, open_checkpoint, replace_file
from matgptq.errors import ConfigurationError, UploadError
from matgptq.evaluation_record import RECORD_NAME, read_record
from matgptq.model_card import CARD_NAME, card_text, public_text, read_card
from matgptq.source import INDEX_NAME, is_hub_id, read_json
from matgptq.text_sources import FILE_SUFFIXES


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
    checkpoint = open_checkpoint(path)
    contents = published_texts(checkpoint, repo_id)
    files = {str(file.relative_to(path)): file for file in sorted(Path(path).rglob("*")) if file.is_file()}
    files = {name: file for name, file in files.items() if not any(part.startswith(".") for part in Path(name).parts)}
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


def published_texts(checkpoint: Checkpoint, repo_id: str, measured: str | Path | None = None) -> dict[str, str]:
    """Those files of a checkpoint that are published in another form than they have on this machine.

    Args:
        checkpoint: to be published.
        repo_id: where; the card's examples load it from there.
        measured: checkpoint directory that has the record of the same weights, if it is another one.

    Returns:
        ``{file name: content}``: the card with what was measured, that record, and configuration and report without
        paths.
    """
    directory = checkpoint.path
    settings = checkpoint.settings
    record = read_record(directory if measured is None else measured)
    contents = {CARD_NAME: card_text(checkpoint, record, repo_id, read_card(directory / CARD_NAME))}
    if any(record.values()):
        contents[RECORD_NAME] = _json(record)
    config = copy.deepcopy(dict(checkpoint.config))
    if not is_hub_id(str(config.get("_name_or_path", ""))):
        config.pop("_name_or_path", None)
    quantization = config["quantization_config"]
    quantization["calibration"] = _without_paths(settings.calibration)
    if settings.source is not None and not is_hub_id(settings.source):
        quantization["source"] = None  # a reader's machine has nothing there
    contents["config.json"] = _json(config)
    if (directory / REPORT_NAME).exists():
        report = read_json(directory / REPORT_NAME)
        report["output"] = Path(str(report.get("output", ""))).name
        report["calibration"] = _without_paths(report.get("calibration", {}))
        contents[REPORT_NAME] = _json(report)
    return contents


def prepare_upload(directory: str | Path, repo_id: str, measured: str | Path | None = None) -> None:
    """Bring a directory that transformers saved for an upload into the form in which checkpoints are published."""
    checkpoint = open_checkpoint(directory)
    for name, content in published_texts(checkpoint, repo_id, measured).items():
        replace_file(checkpoint.path / name, content)


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _without_paths(calibration: Mapping[str, Any]) -> dict[str, Any]:
    dataset = calibration.get("dataset")
    if not isinstance(dataset, str) or not dataset.lower().endswith(FILE_SUFFIXES):
        return dict(calibration)
    clean = {**calibration, "dataset": Path(dataset).name}
    if isinstance(calibration.get("protocol"), str):
        clean["protocol"] = public_text(calibration, calibration["protocol"])
    return clean


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
