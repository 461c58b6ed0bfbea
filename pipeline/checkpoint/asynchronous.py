"""Save while the training continues: copy this rank's share of the state to host memory, then write in a thread."""

import threading
import time
from collections.abc import Callable

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem

from pipeline.checkpoint.save_plan import Planner, Plans

Buffers = dict[MetadataIndex, torch.Tensor]


class StagingPlanner(Planner):
    """Copies the tensors that are planned for this rank to host memory, then calls `staged`.

    Under DDP every rank holds the whole state but writes, and copies, only a share. The buffers are pinned if the state
    is on a GPU, and reused by the next save because pinning memory takes longer than filling it.
    """

    def __init__(self, plans: Plans, buffers: Buffers, staged: Callable[[], None]) -> None:
        super().__init__(plans)
        self._buffers, self._staged = buffers, staged

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        plan = super().finish_plan(new_plan)
        on_gpu = False
        for gone in self._buffers.keys() - {item.index for item in plan.items}:
            del self._buffers[gone]
        for item in plan.items:
            source = super().resolve_data(item).detach()
            buffer = self._buffers.get(item.index)
            if buffer is None or buffer.shape != source.shape or buffer.dtype != source.dtype:
                buffer = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)
                self._buffers[item.index] = buffer
            buffer.copy_(source, non_blocking=True)
            on_gpu = on_gpu or source.is_cuda
        if on_gpu:
            torch.cuda.current_stream().synchronize()
        self._staged()
        return plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        return self._buffers[write_item.index]


class BackgroundSave:
    """A save that runs in a thread. The constructor returns when the state may change, or when the save has failed.

    Args:
        step: the step of the state.
        work: saves and returns the checkpoint's name. It must call its argument once the state may change.
        then: runs in the thread after the save; `seconds` does not include it.
    """

    def __init__(self, step: int, work: Callable[[Callable[[], None]], str], then: Callable[[], None]) -> None:
        self.step = step
        self.name: str | None = None
        self.seconds = 0.0
        self.error: BaseException | None = None
        self._free = threading.Event()
        # A new thread starts on GPU 0, so give it this rank's device.
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
        """Whether the thread has not ended."""
        return self._thread.is_alive()

    @property
    def is_this_thread(self) -> bool:
        """Whether the caller runs in the save's thread."""
        return threading.current_thread() is self._thread

    def wait(self, timeout_seconds: float | None = None) -> None:
        """Wait until the thread has ended, for at most `timeout_seconds`."""
        self._thread.join(timeout_seconds)
