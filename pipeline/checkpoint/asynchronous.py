"""Saving while the training goes on: copy what this rank is to write, then write it in a thread."""

import threading
import time
from collections.abc import Callable

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem

Buffers = dict[MetadataIndex, torch.Tensor]


class StagingPlanner(DefaultSavePlanner):
    """Copies to host memory what the plan gives this rank to write, as soon as there is a plan; then calls `staged`.

    Under DDP that is a share of the state, though every rank holds all of it. The buffers (pinned where the state is
    on a GPU) are kept from save to save: pinning memory takes longer than filling it.
    """

    def __init__(self, buffers: Buffers, staged: Callable[[], None]) -> None:
        super().__init__()
        self._buffers, self._staged = buffers, staged

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        plan = super().finish_plan(new_plan)
        on_gpu = False
        for gone in self._buffers.keys() - {item.index for item in plan.items}:
            del self._buffers[gone]
        for item in plan.items:
            source = super().resolve_data(item).detach()
            kept = self._buffers.get(item.index)
            if kept is None or kept.shape != source.shape or kept.dtype != source.dtype:
                kept = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)
                self._buffers[item.index] = kept
            kept.copy_(source, non_blocking=True)
            on_gpu = on_gpu or source.is_cuda
        if on_gpu:
            torch.cuda.current_stream().synchronize()
        self._staged()
        return plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        return self._buffers[write_item.index]


class BackgroundSave:
    """A save in a thread. The constructor returns once the state may change again, or the save has failed.

    Args:
        step: of the state.
        work: saves; is given what it must call once the state may change, and returns the checkpoint's name.
        then: what follows in the thread; its time is not the save's.
    """

    def __init__(self, step: int, work: Callable[[Callable[[], None]], str], then: Callable[[], None]) -> None:
        self.step = step
        self.name: str | None = None
        self.seconds = 0.0
        self.error: BaseException | None = None
        self._free = threading.Event()
        # A new thread would start on GPU 0, whichever is this rank's.
        self._device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        self._thread = threading.Thread(target=self._run, args=(work, then), name="checkpoint", daemon=True)
        self._thread.start()
        self._free.wait()

    def _run(self, work: Callable[[Callable[[], None]], str], then: Callable[[], None]) -> None:
        began = time.perf_counter()
        try:
            if self._device is not None:
                torch.cuda.set_device(self._device)
            self.name = work(self._free.set)
            self.seconds = time.perf_counter() - began
            then()
        except BaseException as error:
            self.error = error
        finally:
            self._free.set()

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    @property
    def is_this_thread(self) -> bool:
        return threading.current_thread() is self._thread

    def wait(self, timeout_seconds: float | None = None) -> None:
        """Until the thread has ended, or time is up."""
        self._thread.join(timeout_seconds)
