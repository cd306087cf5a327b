"""A vLLM server as a user starts it, and what it answers."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import openai

START_SECONDS = 600
# One thread each: the machines that run these tests have two cores, and servers and their clients share them.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
}
_OWN = ("MATGPTQ_BITS", "MATGPTQ_ALLOCATION", "MATGPTQ_ACTIVATIONS", "VLLM_PLUGINS")


def environment(**extra: str) -> dict[str, str]:
    """Of this process, without what would choose a width by accident."""
    return {name: value for name, value in os.environ.items() if name not in _OWN} | ENVIRONMENT | extra


def command(model: Path, *arguments: str) -> list[str]:
    """``vllm serve MODEL``, small."""
    vllm = str(Path(sys.executable).with_name("vllm"))
    # The last, of the memory of one NUMA node, is refused unless it is free; the models are small.
    sizes = ["--max-model-len", "128", "--max-num-seqs", "16", "--gpu-memory-utilization", "0.4"]
    return [vllm, "serve", str(model), "--served-model-name", "served", "--enforce-eager", *sizes, *arguments]


class Server:
    """Runs while the ``with`` block does.

    Args:
        model: a directory.
        arguments: of ``vllm serve``, besides the small sizes.
        variables: environment variables.
        log: file for its output.
    """

    def __init__(self, model: Path, arguments: Sequence[str], variables: Mapping[str, str], log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.log = log
        self._arguments = command(model, "--host", "127.0.0.1", "--port", str(self.port), *arguments)
        self._variables = environment(**variables)
        self.client = openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", timeout=300)

    def start(self) -> Server:
        """Start it; ``wait`` says when it answers."""
        with self.log.open("w") as output:
            self._process = subprocess.Popen(
                self._arguments, env=self._variables, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        return self

    def wait(self) -> Server:
        """Return when it answers; raise with the end of its log if it stops instead."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise RuntimeError(f"vllm serve stopped:\n{self.log.read_text()[-6000:]}")
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=2):
                    return self
            except OSError:
                time.sleep(0.3)
        raise RuntimeError(f"vllm serve does not answer:\n{self.log.read_text()[-6000:]}")

    def stop(self) -> None:
        """End the server and the processes that it started."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self._process.pid, number)
                self._process.wait(20)
            except ProcessLookupError:
                break
            except subprocess.TimeoutExpired:
                continue

    def __enter__(self) -> Server:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def completion(self, prompt: str | list[int], tokens: int, **options: Any) -> Any:
        """Greedy text."""
        return self.client.completions.create(
            model="served", prompt=prompt, max_tokens=tokens, temperature=0, **options
        )

    def chat(self, message: str, tokens: int, **options: Any) -> Any:
        """A greedy answer."""
        return self.client.chat.completions.create(
            model="served",
            messages=[{"role": "user", "content": message}],
            max_completion_tokens=tokens,
            temperature=0,
            **options,
        )

    def log_probs(self, tokens: list[int]) -> list[float]:
        """Log-probability of each token after the first, given those before it."""
        answer = self.completion(tokens, 1, echo=True, logprobs=1)
        values = answer.choices[0].logprobs.token_logprobs
        return [float(value) for value in values[1 : len(tokens)]]


@dataclass(frozen=True)
class Refusal:
    """A server that did not start."""

    status: int
    text: str


def refused(model: Path, *arguments: str, **variables: str) -> Refusal:
    """Start a server that is expected to stop by itself."""
    done = subprocess.run(
        command(model, "--port", "0", *arguments),
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=START_SECONDS,
        check=False,
    )
    return Refusal(done.returncode, re.sub(r"\s+", " ", done.stdout + done.stderr))
