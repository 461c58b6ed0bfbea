"""Trace long rows of equal blocks by four of them: what the second one does stands for all in the middle."""

from collections.abc import Callable
from itertools import groupby

import numpy as np
from torch import Tensor, nn

KEPT = 4  # the first of a row, the one that stands for the middle, one that the same follows, and the last


def shorten(model: nn.Module) -> dict[nn.Module, int]:
    """Remove blocks from the middle of long rows of equal ones; return how many the block before them stands for.

    Rows of blocks with buffers stay as they are, because statistics of all blocks are updated after the last one.
    """
    standing: dict[nn.Module, int] = {}
    for sequence in [module for module in model.modules() if type(module) is nn.Sequential]:
        kept: list[nn.Module] = []
        for _, equal in groupby(sequence, key=_description):
            row = list(equal)
            if len(row) > KEPT and not any(True for _ in row[0].buffers()):
                standing[row[1]] = len(row) - KEPT + 1
                row = [*row[: KEPT - 1], row[-1]]
            kept += row
        if len(kept) < len(sequence):
            del sequence[:]
            sequence.extend(kept)
    return standing


def _description(block: nn.Module) -> tuple[str, tuple]:
    return repr(block), tuple((name, tuple(parameter.shape)) for name, parameter in block.named_parameters())


def repeat_segments(timeline: np.ndarray, segments: dict[tuple[int, int], int]) -> np.ndarray:
    """Repeat what happened within segments of a timeline of levels.

    Args:
        timeline: (times, columns).
        segments: (first time, time after the last one): how often it happened in all.
    """
    changes = np.diff(timeline, axis=0, prepend=0)
    parts, done = [], 0
    for (start, end), times in sorted(segments.items()):
        parts += [changes[done:start], *[changes[start:end]] * times]
        done = end
    return np.concatenate([*parts, changes[done:]]).cumsum(0)


class BlockMarks:
    """Tell when a pass through a block begins and ends, in the forward and in the backward pass.

    Args:
        blocks: of the model.
        begin: called with the block and "forward" or "backward".
        end: called after each pass that no other pass follows at once.
    """

    def __init__(self, blocks: list[nn.Module], begin: Callable[[nn.Module, str], None], end: Callable[[], None]):
        self.backward = False  # set it before the backward pass, where checkpointing calls blocks again
        self._begin, self._end = begin, end
        for block in blocks:
            block.register_forward_pre_hook(self._before)
            block.register_forward_hook(self._after)

    def _before(self, block: nn.Module, inputs: tuple) -> None:
        if self.backward:
            return
        self._begin(block, "forward")
        x = inputs[0]
        if x.requires_grad and not hasattr(x, "made_by_block"):
            x.register_hook(lambda _: self._end())

    def _after(self, block: nn.Module, inputs: tuple, output: Tensor) -> None:
        if self.backward:
            return
        self._end()
        if output.requires_grad:
            output.made_by_block = True
            output.register_hook(lambda _: self._begin(block, "backward"))
