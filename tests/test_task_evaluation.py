"""lm-evaluation-harness on local tasks: every figure computed again by hand, widths switched in one loaded parent."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path

import pytest
import torch
from tiny_models import make_tokenizer, save_model
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import matgptq
from matgptq.checkpoints.checkpoint import open_checkpoint
from matgptq.cli import app
from matgptq.errors import CalibrationError, CheckpointError, ConfigurationError, SourceError
from matgptq.evaluation import text_evaluation as evaluation
from matgptq.evaluation.task_evaluation import evaluate_tasks

lm_eval_tasks = pytest.importorskip("lm_eval.tasks", reason="lm-evaluation-harness is not installed")

QUESTIONS = [
    {"q": f"{a} and {b}", "choices": [str(a), str(b), str(a * b % 7)], "answer": (a + b) % 3}
    for a in range(4)
    for b in range(5)
]
PASSAGES = [{"text": f"the cat {n} sat on the mat"} for n in range(6)]
CHOICE = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
test_split: test
fewshot_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}:"
doc_to_target: "{{{{answer}}}}"
doc_to_choice: "{{{{choices}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
metadata: {{version: 1.0}}
"""
ROLLING = """
task: rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: byte_perplexity}}]
metadata: {{version: 1.0}}
"""
GENERATE = """
task: generate
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{q}}}}"
doc_to_target: "{{{{gold}}}}"
generation_kwargs: {{until: ["</s>"], max_gen_toks: 6, do_sample: false}}
metric_list: [{{metric: exact_match}}]
metadata: {{version: 1.0}}
"""
GROUP = """
group: pair
task: [choice, choice_b]
aggregate_metric_list: [{metric: acc, weight_by_size: true}]
metadata: {version: 1.0}
"""


@pytest.fixture(autouse=True)
def only_local_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness' own index of 15,000 files takes seconds to read; one test does."""
    quick = functools.partial(lm_eval_tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(lm_eval_tasks, "TaskManager", quick)


@pytest.fixture(scope="module")
def out(make_checkpoint) -> Path:
    return make_checkpoint("llama")[1]


def greedy(model, text: str) -> str:
    """Six tokens, decoded and cut at the end of the sequence."""
    ids = make_tokenizer()(text, return_tensors="pt")["input_ids"]
    for _ in range(6):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    return make_tokenizer().decode(ids[0, -6:], skip_special_tokens=False).partition("</s>")[0]


@pytest.fixture(scope="module")
def directory(out: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tasks as a user writes them. What ``generate`` expects is what 8 bits say to two questions of three."""
    root = tmp_path_factory.mktemp("tasks")
    model = matgptq.load(out, bits=8)
    # The harness strips blanks from what the model says.
    answers = [greedy(model, row["q"]) if n % 3 else "nothing" for n, row in enumerate(QUESTIONS)]
    rows = {
        "questions": QUESTIONS,
        "passages": PASSAGES,
        "answers": [{"q": row["q"], "gold": answer} for row, answer in zip(QUESTIONS, answers, strict=True)],
    }
    for name, records in rows.items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for text, name, data in (
        (CHOICE, "choice", "questions"),
        (CHOICE, "choice_b", "questions"),
        (ROLLING, "rolling", "passages"),
        (GENERATE, "generate", "answers"),
    ):
        content = text.format(name=name, data=root / f"{data}.jsonl", cache=root / "cache")
        (root / f"{name}.yaml").write_text(content)
    (root / "pair.yaml").write_text(GROUP)
    return root


def log_probability(model, context: str, continuation: str) -> float:
    tokenizer = make_tokenizer()
    first = tokenizer(context)["input_ids"]
    ids = torch.tensor([[*first, *tokenizer(continuation)["input_ids"]]])
    with torch.no_grad():
        logits = model(ids).logits[0, :-1].log_softmax(-1)
    return float(logits.gather(1, ids[0, 1:, None])[len(first) - 1 :].sum())


def by_hand(model) -> dict[str, float]:
    right = right_norm = 0
    for row in QUESTIONS:
        scores = [log_probability(model, f"{row['q']}:", f" {choice}") for choice in row["choices"]]
        right += max(range(3), key=lambda i: scores[i]) == row["answer"]
        right_norm += max(range(3), key=lambda i: scores[i] / len(row["choices"][i])) == row["answer"]
    total = sum(log_probability(model, "<s>", row["text"]) for row in PASSAGES)
    count = sum(len(row["text"]) for row in PASSAGES)
    return {
        "acc": right / len(QUESTIONS),
        "acc_norm": right_norm / len(QUESTIONS),
        "byte_perplexity": math.exp(-total / count),
    }


def test_widths_against_figures_by_hand(out: Path, directory: Path, make_checkpoint) -> None:
    source = make_checkpoint("llama")[0]
    evaluation = evaluate_tasks(
        out, ["choice", "rolling", "generate"], (2, 8), include_path=directory, reference=source, batch_size=3
    )
    assert [result.bits for result in evaluation.results] == [2, 8]
    assert sorted(evaluation.shown) == ["choice", "generate", "rolling"]
    opened = open_checkpoint(out)
    columns = [
        (matgptq.load(out, bits=bits), result.scores) for bits, result in zip((2, 8), evaluation.results, strict=True)
    ]
    columns.append((AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32), evaluation.reference_scores))
    for model, scores in columns:
        expected = by_hand(model)
        assert scores["choice"]["acc"].value == pytest.approx(expected["acc"])
        assert scores["choice"]["acc_norm"].value == pytest.approx(expected["acc_norm"])
        share = expected["acc"]
        assert scores["choice"]["acc"].stderr == pytest.approx(math.sqrt(share * (1 - share) / 19))
        assert scores["choice"]["acc"].documents == 20
        assert scores["rolling"]["byte_perplexity"].value == pytest.approx(expected["byte_perplexity"], rel=1e-4)
    low, high = (result.scores["generate"]["exact_match"].value for result in evaluation.results)
    assert high == pytest.approx(13 / 20)
    assert low < high
    assert [result.bytes for result in evaluation.results] == [opened.served_bytes(2), opened.served_bytes(8)]
    assert "all documents" in evaluation.protocol


def test_every_width_sees_the_same_prompts(out: Path, directory: Path) -> None:
    """Worked examples are drawn at random, and the same for a width that comes later."""
    options = {"include_path": directory, "num_fewshot": 1, "limit": 8}
    both = evaluate_tasks(out, ["choice"], (2, 8), **options)
    alone = evaluate_tasks(out, ["choice"], (8,), **options)
    assert both.results[1] == alone.results[0]
    score = alone.results[0].scores["choice"]["acc"]
    assert (score.shots, score.documents) == (1, 8)
    assert "first 8 documents" in alone.protocol


def test_groups_and_patterns(out: Path, directory: Path) -> None:
    """A group shows its own figure; its parts are kept beside it."""
    evaluation = evaluate_tasks(out, ["pair"], (8,), include_path=directory, limit=2)
    assert evaluation.shown == ("pair",)
    assert set(evaluation.results[0].scores) == {"pair", "choice", "choice_b"}
    parts = evaluate_tasks(out, ["choice*"], (8,), include_path=directory, limit=2)
    assert sorted(parts.shown) == ["choice", "choice_b"]
    layer = next(iter(open_checkpoint(out).layers))
    mixed = evaluate_tasks(out, ["choice"], allocation={layer: 2}, include_path=directory, limit=2)
    assert 2 < mixed.results[0].bits < 8


def test_the_command(checkpoint: Path, directory: Path, tmp_path: Path, make_checkpoint) -> None:
    table, source = tmp_path / "table.json", make_checkpoint("llama")[0]
    options = {"bits": "2,8", "tasks": "pair,rolling", "include-path": directory, "limit": 5, "num-fewshot": 1,
               "batch-size": 2, "reference": source, "json": table}  # fmt: skip
    arguments = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    done = CliRunner().invoke(app, ["eval", str(checkpoint), *arguments])
    assert done.exit_code == 0, done.output
    record = json.loads(table.read_text())
    for scores in (record["results"][1]["scores"], record["reference_scores"]):
        score = scores["pair"]["acc"]
        assert f"{score['value']:.3f} ± {score['stderr']:.3f}" in done.output
    lines = [line for line in done.output.splitlines() if "acc" in line or "perplexity" in line]
    assert len(lines) == 2  # parts of a group are not shown, and of a group only what it adds up
    assert "full" in done.output
    kept = json.loads((checkpoint / "evaluation.json").read_text())["tasks"]
    assert [row["scores"] for row in kept[0]["results"]] == [row["scores"] for row in record["results"]]


def test_refusals_come_before_a_model_is_loaded(out, directory, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(evaluation, "load", lambda *_, **__: pytest.fail("was loaded"))
    for options, error, message in (
        ({"tasks": []}, ConfigurationError, "no task"),
        ({"tasks": ["chioce"]}, ConfigurationError, "unknown task chioce: did you mean choice"),
        ({"include_path": tmp_path / "none"}, ConfigurationError, "no such directory"),
        ({"limit": 0}, ConfigurationError, "limit must be at least 1"),
        ({"num_fewshot": -1}, ConfigurationError, "num_fewshot"),
        ({"batch_size": 0}, ConfigurationError, "batch_size"),
        ({"reference": tmp_path / "none"}, SourceError, "none"),
    ):
        with pytest.raises(error, match=message):
            evaluate_tasks(**{"path": out, "tasks": ["choice"], "include_path": directory, **options})
    with pytest.raises(CheckpointError):
        evaluate_tasks(tmp_path, ["choice"])


def test_tasks_that_cannot_be_run(out, directory, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(evaluation, "load", lambda *_, **__: pytest.fail("was loaded"))
    text = (directory / "choice.yaml").read_text()
    (tmp_path / "a.yaml").write_text(text + "unsafe_code: true\n")
    with pytest.raises(ConfigurationError, match="runs code that the model writes"):
        evaluate_tasks(out, ["choice"], include_path=tmp_path)
    (tmp_path / "a.yaml").write_text(text.replace("questions.jsonl", "missing.jsonl"))
    with pytest.raises(CalibrationError, match=r"choice cannot be loaded .*missing\.jsonl"):
        evaluate_tasks(out, ["choice"], include_path=tmp_path)


def test_another_model_as_reference_is_refused_first(out, directory, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(evaluation, "load", lambda *_, **__: pytest.fail("was loaded"))
    other = save_model("llama", tmp_path / "other", shape={"vocab_size": 320})
    with pytest.raises(ConfigurationError, match="320 tokens in its vocabulary"):
        evaluate_tasks(out, ["choice"], (8,), include_path=directory, reference=other)


def test_more_examples_than_there_are_documents(out, directory) -> None:
    with pytest.raises(CalibrationError, match="harness cannot run the tasks"):
        evaluate_tasks(out, ["choice"], (8,), include_path=directory, num_fewshot=1000)


def test_without_the_harness(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lm_eval.tasks", None)
    with pytest.raises(ConfigurationError, match=r"pip install \"matgptq\[eval\]\""):
        evaluate_tasks(out, ["arc_easy"])
