"""The command line as users meet it: good input, bad input, machine-readable output."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import save_model
from typer.testing import CliRunner, Result

import matgptq
from matgptq.checkpoints.checkpoint import open_checkpoint
from matgptq.cli import app
from matgptq.commands.options import write_json
from matgptq.errors import MatGPTQError

RUNNER = CliRunner()
TEXT = "\n".join(f"document {n}: " + "the quick brown fox jumps over the lazy dog " * 8 for n in range(40))


def run(*arguments: object) -> Result:
    return RUNNER.invoke(app, [str(argument) for argument in arguments])


def succeed(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output or result.exception
    return result.output


def refuse(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code != 0
    assert isinstance(result.exception, MatGPTQError | SystemExit), result.exception
    return str(result.exception)


@pytest.fixture
def source(make_checkpoint) -> Path:
    return make_checkpoint("llama")[0]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    return file


def test_the_whole_road(source: Path, text: Path, tmp_path: Path) -> None:
    out, report = tmp_path / "out", tmp_path / "report.json"
    shown = succeed(
        "quantize", source, "-o", out, "--group-size", 64, "--dataset", text, "--nsamples", 4, "--seqlen", 32,
        "--bits", "2,4,8", "--bit-weights", "2=4,4=16,8=256", "--json", report, "--layers",
    )  # fmt: skip
    assert "model.layers.1.mlp.down_proj" in shown
    assert "saved to" in shown
    layers = json.loads(report.read_text())["layers"]
    assert {layer["name"] for layer in layers} == set(open_checkpoint(out).layers)
    assert json.loads((out / "report.json").read_text())["layers"] == layers
    assert open_checkpoint(out).settings.recipe["bit_weights"] == [4.0, 16.0, 256.0]

    table, plot = tmp_path / "table.json", tmp_path / "plot.png"
    succeed("eval", out, "--bits", "2,4,8", "--text", text, "--windows", 2, "--seqlen", 32, "--json", table,
            "--plot", plot)  # fmt: skip
    records = json.loads(table.read_text())
    assert [set(record) for record in records] == [
        {"bits", "bits_per_weight", "bytes", "perplexity", "kl", "top1", "allocation"}
    ] * 3
    assert plot.read_bytes().startswith(b"\x89PNG")

    assert "made from" in succeed("info", out, "--json", tmp_path / "info.json")
    facts = json.loads((tmp_path / "info.json").read_text())
    assert facts["quantization_config"]["target_bits"] == [2, 4, 8]
    assert facts["tensor_parallel_sizes"] == [1]

    shown = succeed("generate", out, "--bits", 4, "--prompt", "the quick", "--max-new-tokens", 5)
    assert "the quick" in shown


def test_self_calibration_and_evaluation(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MATGPTQ_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "out"
    succeed("quantize", source, "-o", out, "--group-size", 32, "--nsamples", 2, "--seqlen", 16)
    assert open_checkpoint(out).settings.calibration["dataset"] == "self"
    succeed("eval", out, "--bits", "8", "--windows", 1, "--seqlen", 16)


def test_dry_run_writes_nothing(source: Path, tmp_path: Path) -> None:
    shown = succeed("quantize", source, "-o", tmp_path / "out", "--group-size", 64, "--dry-run")
    assert "layers to quantize" in shown
    assert "lm_head" in shown
    assert not (tmp_path / "out").exists()


def test_dry_run_checks_what_a_run_would(source: Path, checkpoint: Path, tmp_path: Path) -> None:
    assert "damping" in refuse("quantize", source, "-o", tmp_path / "out", "--damp", "-1", "--dry-run")
    assert "--force" in refuse("quantize", source, "-o", checkpoint, "--dry-run")


def test_dry_run_reads_the_text(source: Path, text: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("hello\n")
    options = ["quantize", source, "-o", tmp_path / "out", "--group-size", 32, "--dry-run", "--seqlen", 32]
    assert "missing.txt" in refuse(*options, "--dataset", "missing.txt")
    assert "missing.txt" in refuse(*options, "--dataset", "self,missing.txt")
    assert "too little text" in refuse(*options, "--dataset", short)
    assert "3 texts need" in refuse(*options, "--dataset", f"self,{text},{text}", "--nsamples", 2)
    assert "wandb" in refuse(*options, "--wandb", "project")
    assert "cannot be written" in refuse("quantize", source, "-o", short / "out", "--dry-run")
    assert "seed" in refuse(*options, "--seed", 10**20)
    plan = tmp_path / "plan.json"
    succeed(*options, "--dataset", text, "--json", plan)
    record = json.loads(plan.read_text())
    assert (len(record["layers"]), record["nsamples"], record["seqlen"]) == (14, 16, 32)
    assert not (tmp_path / "out").exists()


def test_json(checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "directory" in refuse("info", checkpoint, "--json", tmp_path / "nowhere" / "info.json")
    assert "is a directory" in refuse("info", checkpoint, "--json", tmp_path)
    assert "--kernels" in refuse("info", "--kernels", "--json", tmp_path / "kernels.json")
    result = run("info", checkpoint, "--json", "-")
    assert json.loads(result.stdout)["quantization_config"]["bits"] == 8
    assert "made from" in result.stderr
    assert "made from" in run("info", checkpoint).stdout
    write_json(tmp_path / "odd.json", {"a": [math.inf, 1.5], "b": (math.nan,)})
    assert json.loads((tmp_path / "odd.json").read_text()) == {"a": [None, 1.5], "b": [None]}
    monkeypatch.setattr("matgptq.evaluation.text_evaluation.load", lambda *_, **__: pytest.fail("was loaded"))
    assert "--plot" in refuse("eval", checkpoint, "--text", text, "--plot", tmp_path / "nowhere" / "plot.png")


def test_generated_text_is_printed_as_it_is(checkpoint: Path) -> None:
    prompt = "one\n\ttwo :rocket: [bold]three[/bold]"
    assert prompt in succeed("generate", checkpoint, "--prompt", prompt, "--max-new-tokens", 1)
    assert "prompt is empty" in refuse("generate", checkpoint, "--prompt", "")
    assert "nothing can be computed" in refuse("generate", checkpoint, "--prompt", "a", "--device", "meta")


def test_chat_needs_a_template(checkpoint: Path) -> None:
    (checkpoint / "chat_template.jinja").unlink()
    assert "no chat template" in refuse("generate", checkpoint, "--prompt", "a", "--chat")


def test_empty_names_and_counts(checkpoint: Path) -> None:
    assert "--batch must be numbers" in refuse("bench", checkpoint, "--batch", "1,two")
    assert "name of the text is empty" in refuse("eval", checkpoint, "--text", "")
    assert "2 tokens" in refuse("eval", checkpoint, "--seqlen", 1)
    assert "--threads" in refuse("bench", checkpoint, "--threads", 0)


def test_another_model_as_reference(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    other = save_model("llama", tmp_path / "other", shape={"vocab_size": 320})
    for options in (
        ["eval", "--text", text, "--seqlen", 16],
        ["refine", "--dataset", text],
        ["search", "--target-bits", 4],
    ):
        command, *rest = options
        assert "320 tokens in its vocabulary" in refuse(command, checkpoint, *rest, "--reference", other)


def test_rotation_and_sink_weight(make_checkpoint, text: Path, tmp_path: Path) -> None:
    source, out = make_checkpoint("llama-tied")[0], tmp_path / "out"
    options = [source, "-o", out, "--rotate", "--sink-weight", 8, "--group-size", 32, "--dataset", text]
    assert "no longer one tensor" in succeed("quantize", *options, "--dry-run")
    assert "logits" in succeed("quantize", *options, "--nsamples", 2, "--seqlen", 32)
    recipe = open_checkpoint(out).settings.recipe
    assert (recipe["rotate"], recipe["sink_weight"]) == (True, 8.0)


@pytest.mark.parametrize("method", ["paper", "rtn"])
def test_other_methods(method: str, source: Path, text: Path, tmp_path: Path) -> None:
    succeed("quantize", source, "-o", tmp_path / "out", "--method", method, "--group-size", 32, "--dataset", text,
            "--nsamples", 2, "--seqlen", 32)  # fmt: skip
    assert open_checkpoint(tmp_path / "out").settings.recipe["method"] == method


def test_one_width(source: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    succeed("quantize", source, "-o", out, "--method", "gptq", "--bits", 4, "--group-size", 32, "--dataset", text,
            "--nsamples", 2, "--seqlen", 32)  # fmt: skip
    assert open_checkpoint(out).settings.bits == 4
    assert "one width" in refuse("quantize", source, "-o", tmp_path / "x", "--method", "gptq", "--bits", "3,4")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--bits", "2,3"), "8"),
        (("--bits", "1,8"), "2 to 8"),
        (("--bits", "two"), "--bits"),
        (("--bit-weights", "1,2"), "bit weights"),
        (("--bit-weights", "a"), "--bit-weights"),
        (("--method", "magic"), "method"),
        (("--group-size", "24"), "multiple of no group size"),
        (("--group-size", "0"), "group_size"),
        (("--dataset", "missing.txt"), "missing.txt"),
        (("--seqlen", "100000"), "context"),
        (("--device", "abacus"), "device"),
        (("--dtype", "int3"), "dtype"),
        (("--damp", "-1"), "damping"),
        (("--ignore", "*"), "--ignore"),
    ],
)
def test_bad_options_leave_nothing(
    options: tuple[str, ...], reason: str, source: Path, text: Path, tmp_path: Path
) -> None:
    arguments = ["quantize", source, "-o", tmp_path / "deep" / "out", "--dataset", text, *options]
    assert reason in refuse(*arguments)
    assert not list(tmp_path.glob("deep/*"))


def test_too_little_text(source: Path, tmp_path: Path) -> None:
    file = tmp_path / "short.txt"
    file.write_text("hello\n")
    assert "tokens" in refuse("quantize", source, "-o", tmp_path / "out", "--group-size", 32, "--dataset", file)
    file.write_text("")
    assert "short.txt" in refuse("quantize", source, "-o", tmp_path / "out", "--group-size", 32, "--dataset", file)
    assert not (tmp_path / "out").exists()


def test_existing_output_is_kept(source: Path, checkpoint: Path, tmp_path: Path) -> None:
    before = (checkpoint / "config.json").read_bytes()
    assert "--force" in refuse("quantize", source, "-o", checkpoint)
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    assert "not a matgptq checkpoint" in refuse("quantize", source, "-o", precious, "--force")
    assert (precious / "thesis.txt").exists()
    assert (checkpoint / "config.json").read_bytes() == before


def test_quantized_input_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    assert "already quantized" in refuse("quantize", checkpoint, "-o", tmp_path / "out")


def test_unknown_architecture_is_named(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=64)).save_pretrained(tmp_path / "gpt2")
    assert "gpt2" in refuse("quantize", tmp_path / "gpt2", "-o", tmp_path / "out")


def test_results_are_recorded_unless_unwanted(checkpoint: Path, text: Path) -> None:
    options = ("--bits", 3, "--text", text, "--windows", "all", "--seqlen", 64, "--stride", 60)
    succeed("eval", checkpoint, *options, "--no-record")
    assert not (checkpoint / "evaluation.json").exists()
    assert "64 tokens from the start of text.txt" in succeed("eval", checkpoint, *options)
    recorded = json.loads((checkpoint / "evaluation.json").read_text())["texts"]
    assert [row["bits"] for row in recorded[0]["results"]] == [3]
    (checkpoint / "evaluation.json").write_text("damaged")
    assert "not recorded" in succeed("eval", checkpoint, *options)  # and the table is shown


def test_a_slice_is_shown_and_measured(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "slice"
    succeed("export", checkpoint, "--bits", 3, "--format", "matgptq-slice", "-o", out)
    assert "made from" in succeed("info", out)
    succeed("eval", out, "--text", text, "--windows", 1, "--seqlen", 32)
    assert [row["bits"] for row in json.loads((out / "evaluation.json").read_text())["texts"][0]["results"]] == [3]


def test_options_of_texts_and_tasks_do_not_mix(checkpoint: Path, text: Path) -> None:
    assert "--limit means nothing to a text" in refuse("eval", checkpoint, "--limit", 3)
    assert "--text means nothing to tasks" in refuse("eval", checkpoint, "--tasks", "piqa", "--text", text)
    assert "--windows must be" in refuse("eval", checkpoint, "--windows", "some")


def test_allocation_files(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    file = tmp_path / "allocation.txt"
    file.write_text("model.layers.0.mlp.down_proj: 6\n")
    succeed("eval", checkpoint, "--allocation", file, "--text", text, "--windows", 1, "--seqlen", 32)
    file.write_text("model.layers.9.mlp.down_proj: 6\n")
    assert "model.layers.9" in refuse("eval", checkpoint, "--allocation", file, "--text", text)


def test_search(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    small = ("--dataset", text, "--tokens", 256, "--seqlen", 16, "--generations", 1)
    table, plot = tmp_path / "table.json", tmp_path / "pareto.png"
    shown = succeed("search", checkpoint, "--sweep", "3:4:0.5", "--json", table, "--plot", plot, *small)
    assert "3.5bpw" in shown
    # a sweep's patience is one generation, too
    assert len(re.findall(r"bits per weight: stopped, (1 generation done|no gain in 1 generation)", shown)) == 3
    assert [found["target"] for found in json.loads(table.read_text())["found"]] == [
        "3 bits per weight", "3.5 bits per weight", "4 bits per weight"
    ]  # fmt: skip
    assert plot.read_bytes().startswith(b"\x89PNG")
    succeed(
        "search", checkpoint, "--target-size", open_checkpoint(checkpoint).served_bytes(5), "--save", "five", *small
    )
    shown = succeed("info", checkpoint, "--json", table)
    assert "five" in shown
    assert list(json.loads(table.read_text())["allocations"]) == ["3.5bpw", "3bpw", "4bpw", "five"]
    succeed("eval", checkpoint, "--allocation", "3.5bpw", "--text", text, "--windows", 1, "--seqlen", 32)
    assert "the quick" in succeed(
        "generate", checkpoint, "--allocation", "five", "--prompt", "the quick", "--max-new-tokens", 3
    )
    assert "has 3.5bpw, 3bpw, 4bpw, five" in refuse("generate", checkpoint, "--allocation", "six", "--prompt", "the")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ((), "one of --target-bits, --target-size and --sweep"),
        (("--target-bits", "3", "--sweep", "3:4:1"), "one of --target-bits"),
        (("--target-bits", "2.0"), "scales included"),
        (("--target-bits", "lots"), "number"),
        (("--target-size", "1KB"), "not quantized"),
        (("--sweep", "3-4"), "FIRST:LAST:STEP"),
        (("--target-bits", "3.5", "--widths", "a"), "--widths"),
        (("--target-bits", "3.5", "--tokens", "10"), "too few"),
        (("--target-bits", "3.5", "--dataset", "missing.txt"), "missing.txt"),
    ],
)
def test_bad_searches(options: tuple[str, ...], reason: str, checkpoint: Path) -> None:
    assert reason in refuse("search", checkpoint, *options)
    assert not (checkpoint / "allocations").exists()


@pytest.mark.parametrize(
    "command",
    [
        "quantize",
        "refine",
        "eval",
        "generate",
        "search",
        "info",
        "bench",
        "import-reference",
        "card",
        "push",
        "export",
        "verify",
    ],
)
def test_help_has_examples(command: str) -> None:
    assert f"matgptq {command}" in succeed(command, "--help")


def test_the_version_is_shown() -> None:
    assert succeed("--version") == f"matgptq {matgptq.__version__}\n"


def test_stages_are_a_line_each_where_there_is_no_terminal(checkpoint: Path, text: Path) -> None:
    arguments = ["eval", checkpoint, "--bits", "8", "--text", text, "--windows", "1", "--seqlen", "16"]
    done = subprocess.run([sys.executable, "-m", "matgptq", *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines() == ["load the models ...", "evaluation text ...", "evaluate ..."]


def test_errors_are_one_line_and_status_one(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "matgptq.cli", "info", tmp_path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


def test_brackets_in_messages_are_text_not_markup(tmp_path: Path) -> None:
    strange = tmp_path / "model[bold] [/closed]"
    strange.mkdir(parents=True)
    done = subprocess.run(
        [sys.executable, "-m", "matgptq", "info", strange], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert str(strange) in done.stderr


def test_kernels_are_shown() -> None:
    shown = succeed("info", "--kernels")
    assert "reference" in shown
    assert "name a checkpoint" in refuse("info")


def test_unknown_activations(checkpoint: Path) -> None:
    result = run("generate", checkpoint, "--prompt", "the", "--activations", "int3")
    assert result.exit_code == 2
    assert "int8" in result.output
