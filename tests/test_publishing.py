"""Model cards, and what an upload holds: every figure that was measured, no path of this machine."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, ModelCard
from huggingface_hub.errors import EntryNotFoundError
from measurements import on_tasks, on_text
from safetensors.torch import load_file
from tiny_models import token_ids
from typer.testing import CliRunner

import matgptq
from matgptq.allocation import Allocation
from matgptq.checkpoints.allocation_store import save_allocation
from matgptq.checkpoints.checkpoint import open_checkpoint
from matgptq.checkpoints.evaluation_record import record_evaluation
from matgptq.checkpoints.format import RECORD_NAME
from matgptq.cli import app
from matgptq.errors import CheckpointError, ConfigurationError, UploadError
from matgptq.inference.nested_linear import nested_layers
from matgptq.publishing.model_card import without_paths

REPOSITORY = "someone/tiny"


@dataclass
class Hub:
    """Stands in for ``HfApi``: one repository that remembers its files."""

    files: dict[str, bytes] = field(default_factory=dict)
    created: list[dict[str, Any]] = field(default_factory=list)
    commits: list[dict[str, Any]] = field(default_factory=list)

    def create_repo(self, repo_id: str, **options: Any) -> Any:
        self.created.append({"repo_id": repo_id, **options})
        return SimpleNamespace(repo_id=repo_id)

    def list_repo_files(self, repo_id: str, revision: str | None = None) -> list[str]:
        return list(self.files)

    def create_commit(self, repo_id: str, operations: list[Any], **options: Any) -> Any:
        self.commits.append({"repo_id": repo_id, **options})
        for each in operations:
            if isinstance(each, CommitOperationDelete):
                del self.files[each.path_in_repo]
            else:
                assert isinstance(each, CommitOperationAdd)
                with each.as_file() as handle:
                    self.files[each.path_in_repo] = handle.read()
        return SimpleNamespace(commit_url="https://hub/commit/1")

    def download(self, directory: Path) -> Path:
        for name, content in self.files.items():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / name).write_bytes(content)
        return directory


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The hub as huggingface_hub and transformers see it."""
    hub = Hub()

    def load_card(repo_id: str, **_: Any) -> ModelCard:
        if "README.md" not in hub.files:
            raise EntryNotFoundError("no card")
        return ModelCard(hub.files["README.md"].decode())

    monkeypatch.setattr("huggingface_hub.HfApi", lambda **_: hub)
    for module in ("utils.hub", "modeling_utils"):
        monkeypatch.setattr(f"transformers.{module}.hf_api", lambda *_, **__: hub)
    monkeypatch.setattr("transformers.utils.hub.ModelCard.load", load_card)
    return hub


@pytest.fixture
def measured(checkpoint: Path) -> Path:
    """A checkpoint with a record and an allocation, made from local files."""
    opened = open_checkpoint(checkpoint)
    found = {"text": str(checkpoint.parent / "text.txt")}
    layers = dict.fromkeys(opened.layers, 3) | {next(iter(opened.layers)): 8}
    save_allocation(opened, Allocation("mixed", opened.identity, "", 3.25, 3.5, 1, 0, {}, found, layers))
    record_evaluation(opened, on_text({8: 2.5, 3: 4.25}))
    record_evaluation(opened, on_text({3.25: 3.75}, allocation="mixed"))
    record_evaluation(opened, on_tasks("arc", {3: 0.5}, full=0.75))
    config = json.loads((checkpoint / "config.json").read_text())
    config["_name_or_path"] = str(checkpoint)
    text = str(checkpoint.parent / "text.txt")
    record = config["quantization_config"]
    record["calibration"] = {"dataset": text, "protocol": f"4 windows of 16 tokens from {text}: shuffled"}
    assert Path(record["source"]).is_absolute()
    (checkpoint / "config.json").write_text(json.dumps(config))
    return checkpoint


def rows(card: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in card.splitlines() if line.startswith("|")]


def test_a_card_of_what_was_measured(measured: Path) -> None:
    card = matgptq.write_card(measured, name=REPOSITORY).read_text()
    opened = open_checkpoint(measured)
    for bits, perplexity in ((3, "4.25"), (8, "2.50")):
        (row,) = [row for row in rows(card) if row[0] == str(bits)]
        size = f"{opened.served_bytes(bits) / 1e6:,.1f} MB"
        assert row == [str(bits), f"{opened.bits_per_weight(bits):.2f}", size, perplexity,
                       f"{float(perplexity) / 10:.4f}", "90.0%"]  # fmt: skip
    (row,) = [row for row in rows(card) if row[0] == "3.25 (mixed)"]
    widths = json.loads((measured / "allocations" / "mixed.json").read_text())["layers"]
    assert row[2:4] == [f"{opened.served_bytes(widths) / 1e6:,.1f} MB", "3.75"]
    assert ["full", "", "", "1.50", "0", "100%"] in rows(card)
    assert ["arc (0-shot)", "acc", "0.500 ± 0.010", "0.750 ± 0.010"] in rows(card)
    assert "some text, compared with owner/name." in card
    assert "method `matgptq`, target widths 2, 3, 4, 6, 8, groups of 64" in card
    assert "kept at full precision: lm_head" in card
    data = ModelCard(card).data
    assert data.library_name == "transformers"
    assert {"matgptq", "quantized"} <= set(data.tags)
    assert data.get("base_model") is None  # a local directory is nothing to a reader
    assert str(measured.parent) not in card


def test_the_code_in_a_card_runs(measured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    card = matgptq.write_card(measured, name=str(measured)).read_text()
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    exec(compile(code, "card", "exec"), {})
    assert "The capital of France is" in capsys.readouterr().out


def test_a_card_without_figures_has_every_size(checkpoint: Path) -> None:
    card = matgptq.write_card(checkpoint).read_text()
    assert [row[0] for row in rows(card)[2:]] == ["2", "3", "4", "5", "6", "7", "8"]
    assert 'load("checkpoint", bits=4)' in card
    assert "## Tasks" not in card


def test_other_text_and_metadata_are_kept(measured: Path) -> None:
    readme = measured / "README.md"
    theirs = "# Llama\n\nA model.\n\n| a | b |\n"
    readme.write_text(f"---\nlicense: mit\nlanguage: [de]\ntags: [old]\nown_key: 7\n---\n{theirs}")
    first = matgptq.write_card(measured).read_text()
    assert first == matgptq.write_card(measured).read_text()
    data = ModelCard(first).data
    assert (data.license, data.language, data.get("own_key")) == ("mit", ["de"], 7)
    assert data.tags[0] == "old"
    assert first.endswith(theirs.rstrip() + "\n")
    record_evaluation(open_checkpoint(measured), on_text({8: 2.75}))
    second = matgptq.write_card(measured).read_text()
    assert "2.75" in second
    assert "2.50" not in second
    assert second.endswith(theirs.rstrip() + "\n")
    readme.write_text("no metadata at all\n")
    assert matgptq.write_card(measured).read_text().endswith("no metadata at all\n")
    readme.write_text("---\nlicense: [\n---\ntext\n")
    with pytest.raises(CheckpointError, match=r"README\.md: its metadata"):
        matgptq.write_card(measured)


def test_a_base_model_of_the_hub_is_named(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    config["quantization_config"]["source"] = "HuggingFaceTB/SmolLM2-135M"
    (checkpoint / "config.json").write_text(json.dumps(config))
    data = ModelCard(matgptq.write_card(checkpoint).read_text()).data
    assert (data.base_model, data.get("base_model_relation")) == ("HuggingFaceTB/SmolLM2-135M", "quantized")


def contents(directory: Path) -> dict[str, bytes]:
    return {
        file.relative_to(directory).as_posix(): file.read_bytes() for file in directory.rglob("*") if file.is_file()
    }


def check_upload(hub: Hub, made_in: Path, root: Path) -> Path:
    """Nothing but the weights is unreadable, and nothing tells where it was made."""
    for name, content in hub.files.items():
        assert str(made_in).encode() not in content, name
        assert not name.startswith(".")
    config = json.loads(hub.files["config.json"])
    assert config["quantization_config"]["source"] is None
    assert config["quantization_config"]["calibration"]["dataset"] == "text.txt"
    card = hub.files["README.md"].decode()
    assert f'load("{REPOSITORY}", bits=4)' in card
    assert "4.25" in card
    assert len(json.loads(hub.files[RECORD_NAME])["texts"]) == 1
    assert len(json.loads(hub.files["allocations/mixed.json"])["layers"]) == hub.files["allocations/mixed.txt"].count(
        b"\n"
    )
    return hub.download(root)


def test_push(measured: Path, hub: Hub, tmp_path: Path) -> None:
    for folder, name in ((".cache", "secret"), ("search", "log.jsonl"), (".", ".netrc")):
        (measured / folder).mkdir(exist_ok=True)
        (measured / folder / name).write_text("not for the hub")
    (measured / "additional_chat_templates").mkdir()
    (measured / "additional_chat_templates" / "tools.jinja").write_text("{}")
    before = contents(measured)
    hub.files = {"model-00001-of-00002.safetensors": b"old", "notes.md": b"stays"}
    url = matgptq.push(measured, REPOSITORY, private=True, message="First")
    assert url == "https://hub/commit/1"
    assert hub.created == [{"repo_id": REPOSITORY, "private": True, "exist_ok": True}]
    assert [commit["commit_message"] for commit in hub.commits] == ["First"]
    pushed = check_upload(hub, measured.parent, tmp_path / "pulled")
    private = {".cache/secret", "search/log.jsonl", "log.jsonl", ".netrc"}
    assert set(hub.files) == {*before, "README.md", "notes.md"} - private  # old weights would be found first
    assert hub.files["model.safetensors"] == before["model.safetensors"]
    assert contents(measured) == before
    ids = token_ids(1, 8)
    with torch.no_grad():
        one, other = (matgptq.load(path, bits=3)(ids).logits for path in (measured, pushed))
    assert torch.equal(one, other)
    assert f"the model `{REPOSITORY}:3` gets 3 bits" in hub.files["README.md"].decode()


def test_push_to_hub_of_a_model(measured: Path, hub: Hub, tmp_path: Path) -> None:
    model = matgptq.load(measured, bits=4)
    model.push_to_hub(REPOSITORY, commit_message="From memory", tags=["mine"])
    assert [commit["commit_message"] for commit in hub.commits] == ["From memory"]
    pushed = check_upload(hub, measured.parent, tmp_path / "pulled")
    card = ModelCard(hub.files["README.md"].decode())
    assert "More Information Needed" not in card.text
    assert "mine" in card.data.tags
    old, new = (load_file(path / "model.safetensors") for path in (measured, pushed))
    assert all(torch.equal(new[key], old[key]) for key in old if ".codes" in key or ".scales_" in key)
    edited = card.text + "\nMine, and to be kept.\n"
    hub.files["README.md"] = f"---\nlicense: mit\n---\n{edited}".encode()
    model.push_to_hub(REPOSITORY)
    again = hub.files["README.md"].decode()
    assert "license: mit" in again
    assert again.endswith("Mine, and to be kept.\n")
    assert again.count("## Widths") == 1


def test_a_model_with_other_scales_is_pushed_without_figures(measured: Path, hub: Hub) -> None:
    model = matgptq.load(measured, dtype=torch.bfloat16)
    next(iter(nested_layers(model).values())).scales_3.mul_(2)
    model.push_to_hub(REPOSITORY)
    assert RECORD_NAME not in hub.files
    assert "4.25" not in hub.files["README.md"].decode()


def test_a_slice_has_a_card(measured: Path, hub: Hub, tmp_path: Path) -> None:
    """And neither card nor figures of the parent stay with what is exported from it."""
    matgptq.write_card(measured)
    matgptq.export(measured, tmp_path / "slice", format="matgptq-slice", bits=3)
    assert not {"README.md", RECORD_NAME} & {file.name for file in (tmp_path / "slice").iterdir()}
    opened = open_checkpoint(tmp_path / "slice", slices=True)
    record_evaluation(opened, on_text({3: 4.5}))
    matgptq.push(tmp_path / "slice", REPOSITORY)
    card = hub.files["README.md"].decode()
    assert [row[0] for row in rows(card)[2:]] == ["3", "full"]
    assert "4.50" in card
    assert "target widths 2, 3, 4, 6, 8" in card
    assert f'matgptq.load("{REPOSITORY}")' in card
    assert "set_bits" not in card
    assert "matgptq serve" not in card  # which has nothing to choose from


def test_save_pretrained_that_pushes(measured: Path, hub: Hub, tmp_path: Path) -> None:
    matgptq.load(measured).save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id=REPOSITORY)
    check_upload(hub, measured.parent, tmp_path / "pulled")


def test_uploads_that_fail(measured: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigurationError, match="owner/name"):
        matgptq.push(measured, "tiny")

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError("403 Forbidden\nand more")

    monkeypatch.setattr(hub, "create_repo", refuse)
    with pytest.raises(UploadError, match=r"someone/tiny: the upload failed \(PermissionError: 403 Forbidden\)"):
        matgptq.push(measured, REPOSITORY)
    (measured / "model.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError):
        matgptq.push(measured, REPOSITORY)
    assert not hub.files


def test_the_commands(measured: Path, hub: Hub) -> None:
    def run(*arguments: object) -> str:
        done = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert done.exit_code == 0, done.output
        return done.output

    assert "README.md" in run("card", measured, "--name", REPOSITORY)
    assert f'load("{REPOSITORY}"' in (measured / "README.md").read_text()
    assert "pushed: https://hub/commit/1" in run("push", measured, REPOSITORY, "--private", "--message", "Second")
    assert hub.created[0]["private"] is True
    (measured / RECORD_NAME).unlink()
    assert "no figures to show yet" in run("card", measured)


def test_paths_among_texts_keep_their_names_only() -> None:
    record = {"dataset": "self,/home/me/a.txt,/srv/b.txt", "protocol": "10 windows of /home/me/a.txt, in turns"}
    assert without_paths(record) == {"dataset": "self,a.txt,b.txt", "protocol": "10 windows of a.txt, in turns"}
