"""Loading holds a checkpoint once: what is packed is let go of as read, and what is read comes from the mapped file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import save_model

import matgptq
from matgptq.native import available

ALLOWANCE = 40 << 20  # what a process takes for anything: the interpreter's own growth, threads, one layer
STATUS = Path("/proc/self/status")

_LOAD = """
import sys, threading, time
import torch, transformers.models.llama.modeling_llama
import matgptq

def anonymous():  # not pages of the mapped file, which the system takes back when it likes
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("RssAnon"))

matgptq.load({small!r}, 4, resident={resident})  # everything that is imported only once
torch.set_num_threads(1)
before, peak, done = anonymous(), 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.002)
watcher = threading.Thread(target=watch)
watcher.start()
model = matgptq.load({path!r}, 4, resident={resident}, dtype="bfloat16")
done = True
watcher.join()
print(peak - before)
"""


@pytest.mark.skipif(not STATUS.exists(), reason="reads /proc")
@pytest.mark.skipif(not available(), reason="without the native library nothing is packed")
def test_loading_takes_the_memory_of_the_checkpoint_once(make_checkpoint, tmp_path: Path) -> None:
    shape = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 8,
             "num_key_value_heads": 8, "head_dim": 128}  # fmt: skip
    source = save_model("llama", tmp_path / "source", torch.bfloat16, num_hidden_layers=6, shape=shape)
    out = tmp_path / "out"
    matgptq.quantize(source, out, method="rtn")
    size = (out / "model.safetensors").stat().st_size
    assert size > 100_000_000
    small = make_checkpoint("llama")[1]
    for resident, most in ((True, size), (False, size * 5 / 8)):
        program = _LOAD.format(small=str(small), path=str(out), resident=resident)
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert int(done.stdout) < most + ALLOWANCE
