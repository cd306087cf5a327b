"""One quantization by several processes, on one machine or several, started by ``torchrun``.

Calibration windows are shared out, Hessians are summed, and the matrices of a block are shared out for solving; what
each process solved is sent to all, because all go on with the quantized block. Only the first process writes. The
processes of a run see the same files: those of the model, and the output's directory.

One process alone takes the same path; its sums and messages are the identity.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta

import torch
from torch import Tensor
from torch import distributed as torch_distributed

from matgptq.errors import ConfigurationError, MatGPTQError

_TIMEOUT = timedelta(hours=2)  # the longest that one process may solve while the others wait
_connections = itertools.count()  # of this process; all processes of a run connect equally often


class ProcessError(MatGPTQError, RuntimeError):
    """Another process of the run has failed."""


@dataclass(frozen=True)
class Processes:
    """The processes of a run.

    Attributes:
        rank: of this one.
        count: of all.
        device: that their messages go through; NCCL knows GPUs only.
    """

    rank: int = 0
    count: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_first(self) -> bool:
        """Whether this one writes."""
        return self.rank == 0

    def share(self, total: int) -> slice:
        """Which of ``total`` items, one after the other, are this process's: as many as the others', give or take one.

        Raises:
            ConfigurationError: there are fewer items than processes.
        """
        if total < self.count:
            raise ConfigurationError(f"{total} calibration windows cannot be shared by {self.count} processes")
        return slice(total * self.rank // self.count, total * (self.rank + 1) // self.count)

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over all processes."""
        if self.count > 1:
            with _failures():
                for tensor in tensors:
                    on_device = tensor.to(self.device)
                    torch_distributed.all_reduce(on_device)
                    tensor.copy_(on_device)

    def send(self, tensors: Sequence[Tensor], sender: int) -> None:
        """Replace each tensor by the sender's; shapes and dtypes are the same everywhere."""
        if self.count > 1:
            with _failures():
                for tensor in tensors:
                    on_device = tensor.to(self.device)
                    torch_distributed.broadcast(on_device, sender)
                    tensor.copy_(on_device)

    def send_text(self, text: str, sender: int) -> str:
        """The sender's text, everywhere."""
        if self.count == 1:
            return text
        content = torch.tensor(list(text.encode()), dtype=torch.uint8)
        length = torch.tensor([len(content)])
        self.send([length], sender)
        if self.rank != sender:
            content = torch.empty(int(length), dtype=torch.uint8)
        self.send([content], sender)
        return bytes(content.tolist()).decode()

    def join_rows(self, mine: Tensor, total: int) -> Tensor:
        """All ``total`` rows from the rows that ``share`` gave to each process."""
        if self.count == 1:
            return mine
        rows = mine.new_zeros(total, *mine.shape[1:])
        rows[self.share(total)] = mine
        self.add([rows])
        return rows

    def wait(self) -> None:
        """Go on when all have come here."""
        if self.count > 1:
            with _failures():
                torch_distributed.barrier()


ALONE = Processes()


def assign(costs: Sequence[float], processes: int) -> list[int]:
    """Share out work: the most costly piece goes to whoever has least so far.

    Args:
        costs: of the pieces, in any unit.
        processes: how many there are.

    Returns:
        The process of each piece.
    """
    load = [0.0] * processes
    owner = [0] * len(costs)
    for piece in sorted(range(len(costs)), key=lambda piece: (-costs[piece], piece)):
        owner[piece] = load.index(min(load))
        load[owner[piece]] += costs[piece]
    return owner


@contextlib.contextmanager
def processes(device: torch.device) -> Iterator[Processes]:
    """The processes that ``torchrun`` started, connected while the context lasts; or this one alone.

    Raises:
        ProcessError: they cannot be connected.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1 or "RANK" not in os.environ:
        yield ALONE
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    ours = not torch_distributed.is_initialized()
    if ours:
        # Here, because not every build of PyTorch has them.
        from torch._C._distributed_c10d import PrefixStore
        from torch.distributed.rendezvous import rendezvous

        with _failures():
            # The store outlives a group: a second one under the same keys could find the addresses of the first.
            store, rank, size = next(rendezvous("env://", timeout=_TIMEOUT))
            store = PrefixStore(f"matgptq-{next(_connections)}", store)
            torch_distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_TIMEOUT)
    try:
        yield Processes(torch_distributed.get_rank(), torch_distributed.get_world_size(), device)
    finally:
        if ours:
            torch_distributed.destroy_process_group()


def local_device(device: torch.device) -> torch.device:
    """The device of this process: with several GPUs on a machine, the one of its number there."""
    if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return device


@contextlib.contextmanager
def _failures() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise ProcessError(
            f"another process of this run has ended or cannot be reached ({str(error).splitlines()[0]}); "
            "finished blocks are kept, the same command goes on from there"
        ) from error
