"""A rank in which things go wrong on purpose: `python -m tests.faulty_rank STAGE`, told which by FAULTS in the
environment.

FAULTS is JSON. Steps are numbered as in the journal.
    poison     {step: factor}: multiply the loss of the step's first slot ("nan": as one bad image may do)
    left_out   [[first, last]]: leave these steps out from the start
    rank       the rank that the next four happen to
    sleep      {step: seconds}: loading the step's first micro-batch takes so long
    gpu_error  {step: code}: the GPU reports the error of this number as the step's first micro-batch is loaded
    hang       step: loading it never returns, and never lets another thread run
    miscompile number: torch.compile does nothing but to scale what a block returns by 1 + number on `rank`
    hosts      {rank: name}: the host names that ranks have (in namespaces of their own)
    hold       {stage: step}: all ranks wait there until they are told to stop, or killed, so that no stage is done
               before a test disturbs it. A stage is given by the end of its path
    gate       {stage: [step, file]}: all ranks wait there until the file exists
    late       true: the journal leaves the newest step to the next flush, as on a GPU
    record     folder: note what each rank is given, as `tests.batch_hashes` does
"""

import ctypes
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import pipeline.run
from pipeline.stage.device_errors import HARDWARE, PROGRAM
from pipeline.training import trainer
from pipeline.training.step_guard import StepGuard
from tests.batch_hashes import record_batches


def main() -> None:
    faults = json.loads(os.environ.get("FAULTS", "{}"))
    if name := faults.get("hosts", {}).get(os.environ["RANK"]):
        _rename_host(name)
    # A patched loss would be missing in copies of an objective, so leave objectives alone where nothing is poisoned.
    if poison := faults.get("poison"):
        trainer.create_objective = _poison(trainer.create_objective, poison)
    trainer.train_feed = _hinder(trainer.train_feed, faults)
    if error := faults.get("miscompile"):
        scale = 1 + error * (int(os.environ["RANK"]) == faults["rank"])
        torch.compile = lambda function, **_: lambda *inputs: function(*inputs) * scale
    if stretches := faults.get("left_out"):
        StepGuard.skips = lambda self, step: any(first <= step <= last for first, last in stretches)
    if faults.get("late"):
        make_log = trainer.StepLog
        trainer.StepLog = lambda *arguments: make_log(*arguments[:-1], late=True)
    pipeline.run.main()


def _poison(create: Any, factors: dict[str, Any]) -> Any:
    def poisoned(*arguments: Any) -> Any:
        objective = create(*arguments)
        honest = objective.loss

        def loss(model: Any, batch: Any, step: int) -> Any:
            return honest(model, batch, step) * (float(factors.get(str(step + 1), 1)) if 0 in batch.slots else 1.0)

        objective.loss = loss
        return objective

    return poisoned


def _hinder(create: Any, faults: dict[str, Any]) -> Any:
    def hindered(recipe: Any, data: Any, seed: int, world: Any, *others: Any) -> Any:
        feed = create(recipe, data, seed, world, *others)
        if folder := faults.get("record"):
            record_batches(feed, recipe, seed, world, Path(folder))
        honest = feed.slots

        def slots(step: int) -> Iterator[Any]:
            if any(sys.argv[1].endswith(f"/{end}") and step + 1 == at for end, at in faults.get("hold", {}).items()):
                _hold()
            for end, (at, file) in faults.get("gate", {}).items():
                if sys.argv[1].endswith(f"/{end}") and step + 1 == at:
                    _wait_for(file)
            if world.rank == faults.get("rank"):
                time.sleep(faults.get("sleep", {}).get(str(step + 1), 0))
                if code := faults.get("gpu_error", {}).get(str(step + 1)):
                    raise _gpu_error(code)
                if step + 1 == faults.get("hang"):
                    while True:  # a signal, such as the one that makes it write its stacks, ends a sleep
                        ctypes.PyDLL(None).sleep(10**6)
            yield from honest(step)

        feed.slots = slots
        return feed

    return hindered


def _gpu_error(code: int) -> torch.AcceleratorError:
    error = torch.AcceleratorError(f"CUDA error: {(PROGRAM | HARDWARE)[code]}\nSearch for `cudaError' in ...")
    error.error_code = code
    return error


def _hold() -> None:
    request, deadline = signal.getsignal(signal.SIGTERM).__self__, time.monotonic() + 900
    while not request.number and time.monotonic() < deadline:  # a test that has failed leaves nobody behind
        time.sleep(0.01)


def _wait_for(file: str) -> None:
    deadline = time.monotonic() + 900
    while not os.path.exists(file) and time.monotonic() < deadline:
        time.sleep(0.01)


def _rename_host(name: str) -> None:
    clone_new_uts, clone_new_user = 0x04000000, 0x10000000
    unshare = ctypes.CDLL(None, use_errno=True).unshare
    if unshare(clone_new_uts) and unshare(clone_new_user | clone_new_uts):
        raise OSError(ctypes.get_errno(), "no namespace of host names")
    socket.sethostname(name)


if __name__ == "__main__":
    main()
