"""What gradients say of the calibration text, found once for a run and kept in its files.

The weights of tokens are kept behind the output Hessians: where there are the former, there are the latter.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import chain

from torch import Tensor

from matgptq.calibration.saliency import token_saliency, token_weights
from matgptq.core.output_hessian import OutputHessian, summed_tensors
from matgptq.files.stored_tensors import read_header, read_tensor
from matgptq.machine.distributed import Processes
from matgptq.machine.workers import Workers
from matgptq.models.blocks import Block
from matgptq.progress import Progress
from matgptq.quantization.plan import output_hessian_bytes
from matgptq.quantization.preparation import Prepared
from matgptq.quantization.work_directory import TOKEN_WEIGHTS, WorkDirectory


class CalibrationGradients:
    """Weights of tokens and, where rows are solved together, output Hessians."""

    def __init__(self, prepared: Prepared, work: WorkDirectory, together: Processes, progress: Progress) -> None:
        self._residency, self._plan, self._device = prepared.residency, prepared.plan, prepared.device
        self._sums_on_disk = prepared.needs.output_hessians == "disk"
        self._windows_together = prepared.needs.windows_together
        self._recipe = prepared.recipe
        self._work = work
        self._together = together
        self._progress = progress

    def token_weights(self, windows: Tensor, workers: Workers) -> dict[str, Tensor]:
        """Of all windows ``[n, seqlen]``, by a backward pass over them if an earlier run has not kept the weights.

        Returns:
            Those of ``saliency.token_weights``, of the windows of all processes.
        """
        make = partial(self._find, windows, workers)
        return self._work.kept_or_made(TOKEN_WEIGHTS, make, together=True)

    def output_hessians(self, block: Block, index: int) -> list[OutputHessian]:
        """Of the layers of a block, as they were kept."""
        if not self._recipe.joins_rows:
            return []
        kept = read_header(self._work.path / _outputs_file(index))

        def read(name: str) -> Tensor:
            return read_tensor(kept[name]).to(self._device)

        return [OutputHessian.of_tensors(rows, read) for rows in block.joined_rows()]

    def _find(self, windows: Tensor, workers: Workers) -> dict[str, Tensor]:
        """Weights of tokens; output Hessians, where rows are solved together, are kept in files before they are."""
        recipe, blocks, together = self._recipe, self._plan.blocks, self._together
        mine = together.share(len(windows))
        own = windows[mine]
        with self._output_sums() as sums:
            self._progress.start("saliency of tokens", 2 * len(own) * len(blocks))
            saliency = token_saliency(
                self._residency, blocks, own, recipe.seed, tick=self._progress.advance, first_window=mine.start,
                windows_together=self._windows_together, workers=workers,
                output_hessians=[*chain.from_iterable(sums)], exponent=recipe.saliency,
            )  # fmt: skip
            for index, of_block in enumerate(sums):
                together.add([*summed_tensors(of_block).values()])
                for each in of_block:
                    each.complete()
                if together.is_first:
                    self._work.keep(_outputs_file(index), summed_tensors(of_block))
        saliency = {name: together.join_rows(rows, len(windows)) for name, rows in saliency.items()}
        return token_weights(saliency, blocks, recipe.saliency)

    @contextmanager
    def _output_sums(self) -> Iterator[list[list[OutputHessian]]]:
        """Output Hessians of each block to add to, in memory or in a file that is mapped; of none if rows are alone."""
        if not self._recipe.joins_rows:
            yield []
            return
        of_blocks, most = [block.joined_rows() for block in self._plan.blocks], self._plan.rows_together
        with ExitStack() as stack:
            rest = None
            if self._sums_on_disk:
                name = f"output-sums-{self._together.rank + 1}-of-{self._together.count}"
                count = output_hessian_bytes(self._plan.blocks, most) // 4
                rest = stack.enter_context(self._work.scratch(name, count))
            sums: list[list[OutputHessian]] = []
            for groups in of_blocks:
                sums.append([])
                for rows in groups:
                    sums[-1].append(OutputHessian.empty(rows, most, rest))
                    rest = None if rest is None else rest[sums[-1][-1].matrix.numel() :]
            yield sums


def _outputs_file(index: int) -> str:
    """Name of the file of a block's output Hessians."""
    return f"outputs-{index:05d}.safetensors"
