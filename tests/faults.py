"""A rank in which things go wrong on purpose: `python -m tests.faults STAGE`, told by FAULTS in the environment.

FAULTS is JSON. Steps are numbered as in the journal.
    poison     {step: factor}: the loss of the step's first slot is multiplied ("nan" does what one bad image may do)
    left_out   [[first, last]]: steps left out from the start
    rank       the rank that the following happen to
    sleep      {step: seconds}: loading the step's first micro-batch takes so long
    hosts      {rank: name}: the host names that ranks have (in namespaces of their own)
    hang       step: its loading never returns, and never lets another thread run
    hold       {how a stage's path ends: step}: all ranks wait there until they are told to stop, or killed. So no stage
               is done before a test comes to disturb it
    record     folder: what each rank is given is noted there, by `tests.batches`

`python -m tests.faults launch STAGE PROCESSES` is the launcher of such ranks; its exit code is the outcome's.
`python -m tests.faults fcmae ...` is the command, whose ranks they are.
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

import cluster.local
from tests.batches import recorded

FAULTS: dict[str, Any] = json.loads(os.environ.get("FAULTS", "{}"))


class FaultyLauncher(cluster.local.LocalLauncher):
    module = "tests.faults"


def _poison(create: Any) -> Any:
    def poisoned(*arguments: Any) -> Any:
        objective = create(*arguments)
        honest = objective.loss

        def loss(model: Any, batch: Any, step: int) -> Any:
            value, terms = honest(model, batch, step)
            factor = float(FAULTS.get("poison", {}).get(str(step + 1), 1)) if 0 in batch.slots else 1.0
            return value * factor, terms

        objective.loss = loss
        return objective

    return poisoned


def _hold(stage: str, step: int) -> None:
    if any(stage.endswith(f"/{end}") and step == at for end, at in FAULTS.get("hold", {}).items()):
        request, deadline = signal.getsignal(signal.SIGTERM).__self__, time.monotonic() + 900
        while not request.number and time.monotonic() < deadline:  # a test that has failed leaves nobody behind
            time.sleep(0.01)


def _hinder(create: Any) -> Any:
    def hindered(recipe: Any, data: Any, seed: int, world: Any, workers: int) -> Any:
        feed = create(recipe, data, seed, world, workers)
        if folder := FAULTS.get("record"):
            recorded(feed, recipe, seed, world, Path(folder))
        honest = feed.slots

        def slots(step: int) -> Iterator[Any]:
            _hold(sys.argv[1], step + 1)
            if world.rank == FAULTS.get("rank"):
                time.sleep(FAULTS.get("sleep", {}).get(str(step + 1), 0))
                if step + 1 == FAULTS.get("hang"):
                    while True:  # a signal, such as the one that makes it write its stacks, ends a sleep
                        ctypes.PyDLL(None).sleep(10**6)
            yield from honest(step)

        feed.slots = slots
        return feed

    return hindered


def _rename_host(name: str) -> None:
    clone_new_uts, clone_new_user = 0x04000000, 0x10000000
    unshare = ctypes.CDLL(None, use_errno=True).unshare
    if unshare(clone_new_uts) and unshare(clone_new_user | clone_new_uts):
        raise OSError(ctypes.get_errno(), "no namespace of host names")
    socket.sethostname(name)


def _be_a_rank() -> None:
    import pipeline.run
    from pipeline.training.step_guard import Guard

    if name := FAULTS.get("hosts", {}).get(os.environ["RANK"]):
        _rename_host(name)
    if FAULTS.get("poison"):  # its loss would be that of copies of the objective, too, though they are to have another
        pipeline.run.create_objective = _poison(pipeline.run.create_objective)
    pipeline.run.train_feed = _hinder(pipeline.run.train_feed)
    if stretches := FAULTS.get("left_out"):
        Guard.skips = lambda self, step: any(first <= step <= last for first, last in stretches)
    pipeline.run.main()


def main() -> None:
    if sys.argv[1] == "launch":
        with FaultyLauncher(int(sys.argv[3])) as launcher:
            outcome = launcher.run(Path(sys.argv[2]))
        print(outcome.reason)
        sys.exit(outcome.kind.exit_code)
    elif sys.argv[1] == "fcmae":
        import tools.cli

        cluster.local.LocalLauncher.module = FaultyLauncher.module
        del sys.argv[0]
        tools.cli.main()
    else:
        _be_a_rank()


if __name__ == "__main__":
    main()
