"""Several processes make the checkpoint of one, up to the order in which sums are added."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_models import GROUP_SIZE, save_model, token_ids

import matgptq
from matgptq.errors import ConfigurationError
from matgptq.machine.distributed import ALONE, Processes, assign
from matgptq.quantization import block_quantizer
from matgptq.report import Report


@given(st.integers(1, 40), st.integers(1, 8))
def test_shares_cover_everything_once(total, count):
    shares = [Processes(rank, count) for rank in range(count)]
    if total < count:
        with pytest.raises(ConfigurationError, match=f"{total} calibration windows cannot be shared by {count}"):
            shares[0].share(total)
        return
    items = [item for each in shares for item in range(total)[each.share(total)]]
    assert items == [*range(total)]
    assert max(len(range(total)[each.share(total)]) for each in shares) <= total // count + 1


@given(st.lists(st.floats(0.1, 100), max_size=12), st.integers(1, 5))
def test_work_is_shared_out(costs, processes):
    owners = assign(costs, processes)
    assert len(owners) == len(costs)
    load = [sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == each) for each in range(processes)]
    if costs:
        assert max(load) <= sum(costs) / processes + max(costs)


def test_one_process_alone_exchanges_nothing():
    tensor = torch.ones(3)
    ALONE.add([tensor])
    ALONE.send([tensor], 0)
    ALONE.wait()
    assert torch.equal(tensor, torch.ones(3))
    assert ALONE.send_text("text", 0) == "text"
    assert ALONE.join_rows(tensor, 3) is tensor
    assert ALONE.share(5) == slice(0, 5)


_PROCESS = """
    import os, sys
    sys.path.insert(0, {tests!r})
    import torch
    torch.set_num_threads(1)
    import matgptq, matgptq.quantization.block_quantizer as block_quantizer
    from test_distributed import keep_problems
    from tiny_models import GROUP_SIZE, token_ids

    def run(quality, out, **options):
        return matgptq.quantize({source!r}, {out!r} + "/" + out, dataset=token_ids(5), group_size=GROUP_SIZE,
                                quality=quality, tuned_bits=(), shard_bytes=60_000, **options)

    {body}
"""


def launch(directory: Path, source: Path, body: str) -> subprocess.CompletedProcess[str]:
    script = directory / "process.py"
    code = textwrap.dedent(_PROCESS).format(
        tests=str(Path(__file__).parent), source=str(source), out=str(directory), body=textwrap.dedent(body)
    )
    script.write_text(code)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    with subprocess.Popen(torchrun, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            stdout, stderr = process.communicate(timeout=300)
        except subprocess.TimeoutExpired:
            process.terminate()  # the launcher ends its workers, which are in sessions of their own
            process.communicate(timeout=60)
            raise
    return subprocess.CompletedProcess(torchrun, process.returncode, stdout, stderr)


def keep_problems(directory: Path) -> None:
    """Have each matrix's Hessian and output Hessian written to a file of the directory, by the name of a layer."""
    solve = block_quantizer.solve

    def kept(weight, hessian, recipe, group_size, workers, outputs):
        tensors = {"hessian": hessian, "outputs": outputs.matrix, "powers": outputs.fourth_powers}
        save_file(tensors, directory / f"{outputs.name}.safetensors")
        return solve(weight, hessian, recipe, group_size, workers, outputs)

    block_quantizer.solve = kept


def test_two_processes_make_the_checkpoint_of_one(tmp_path):
    """Hessians of two halves are added in another order: of 100 codes at most one may fall on its other side."""
    source = save_model("llama-tied", tmp_path / "source", torch.bfloat16)
    done = launch(tmp_path, source, 'run("fast", "fast"); run("best", "best", rows_together=0)')
    assert done.returncode == 0, done.stdout + done.stderr
    for quality in ("fast", "best"):
        options = {"dataset": token_ids(5), "group_size": GROUP_SIZE, "quality": quality, "tuned_bits": ()}
        report = matgptq.quantize(source, tmp_path / "alone", force=True, rows_together=0, **options)
        expected = load_file(tmp_path / "alone" / "model.safetensors")
        found = {}
        for file in (tmp_path / quality).glob("*.safetensors"):
            found.update(load_file(file))
        assert set(found) == set(expected)
        for name, tensor in expected.items():
            if name.endswith(".codes"):
                assert float((found[name] != tensor).float().mean()) < 0.01, name
                assert float((found[name].int() - tensor.int()).abs().float().mean()) < 0.2, name
            else:
                torch.testing.assert_close(found[name].float(), tensor.float(), rtol=0.02, atol=1e-3)
        assert len(report.layers) == 14
    assert {file.name for file in tmp_path.iterdir()} == {"source", "process.py", "fast", "best", "alone"}


def test_two_processes_solve_rows_together_as_one(tmp_path, monkeypatch):
    """A code that falls on its other side moves all that come later: compared is what is solved, and how well."""
    source = save_model("llama-tied", tmp_path / "source", torch.bfloat16)
    kept = {name: tmp_path / f"kept-{name}" for name in ("two", "one")}
    for directory in kept.values():
        directory.mkdir()
    body = f"""
    from pathlib import Path
    keep_problems(Path({str(kept["two"])!r}))
    run("best", "two")
    """
    done = launch(tmp_path, source, body)
    assert done.returncode == 0, done.stdout + done.stderr
    monkeypatch.setattr(block_quantizer, "solve", block_quantizer.solve)  # to be put back
    keep_problems(kept["one"])
    options = {"dataset": token_ids(5), "group_size": GROUP_SIZE, "quality": "best", "tuned_bits": ()}
    alone = matgptq.quantize(source, tmp_path / "one", **options)
    files = sorted(file.name for file in kept["one"].iterdir())
    assert len(files) == 8
    assert files == sorted(file.name for file in kept["two"].iterdir())
    for name in files[:4]:  # of the first block, into which no code goes
        assert name.startswith("model.layers.0.")
        expected, found = load_file(kept["one"] / name), load_file(kept["two"] / name)
        for matrix in ("hessian", "outputs"):
            mean = float(expected[matrix].diagonal(dim1=-2, dim2=-1).mean())
            torch.testing.assert_close(found[matrix] / mean, expected[matrix] / mean, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(found["powers"], expected["powers"], rtol=1e-3, atol=0)
    report = Report.from_dict(json.loads((tmp_path / "two" / "report.json").read_text()))
    for found, expected in zip(report.layers, alone.layers, strict=True):
        close = 0.05 if found.name.startswith("model.layers.0.") else 0.3
        assert found.errors == pytest.approx(expected.errors, rel=close), found.name


def test_nobody_waits_for_the_tuning(tmp_path):
    """It is the first process's, and longer than processes wait for each other."""
    source = save_model("llama-tied", tmp_path / "source", torch.bfloat16)
    body = f"""
    from matgptq.quantization import quantize as quantization

    def refine(*arguments, **options):
        assert not torch.distributed.is_initialized()
        print("tuned by", os.environ["RANK"])
        return []

    quantization.refine = refine
    matgptq.quantize(
        {str(source)!r}, {str(tmp_path / "out")!r}, dataset=token_ids(5), group_size=GROUP_SIZE, tuned_bits=(2,)
    )
    """
    done = launch(tmp_path, source, body)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split("tuned by")[1:] == [" 0\n"]


def test_a_process_that_dies_ends_the_run_and_the_run_goes_on(tmp_path):
    source = save_model("llama-tied", tmp_path / "source", torch.bfloat16)
    body = """
    real, calls = block_quantizer.solve, []

    def solve(*arguments):
        calls.append(1)
        if int(os.environ["RANK"]) == 1 and len(calls) > 2:
            os._exit(7)
        return real(*arguments)

    block_quantizer.solve = solve
    run("fast", "out")
    """
    done = launch(tmp_path, source, body)
    assert done.returncode != 0
    assert "another process of this run has ended" in done.stderr or "Signal 15" in done.stderr
    assert (tmp_path / ".out.unfinished" / "block-00000.json").exists()
    assert not (tmp_path / "out").exists()
    # With another number of processes, too: finished blocks do not depend on it.
    matgptq.quantize(
        source, tmp_path / "out", dataset=token_ids(5), group_size=GROUP_SIZE, quality="fast", tuned_bits=(),
        shard_bytes=60_000,
    )  # fmt: skip
    assert not (tmp_path / ".out.unfinished").exists()
