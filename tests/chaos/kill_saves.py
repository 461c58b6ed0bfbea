"""Runs that are killed at random moments, also inside a save and inside retention, and restarted until they are done:

    python -m tests.chaos.kill_saves [--runs 100] [--seed 0]

Real stages, attempts and checkpoints, two real ranks; only the model is tiny and its data are hashes of the step. Every
restart must find the very state that an undisturbed run had after that step, and every run must end with its bits.
"""

import argparse
import contextlib
import hashlib
import itertools
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from fsspec.implementations.local import LocalFileSystem

from pipeline.checkpoint.store import flatten
from pipeline.distributed.agreement import Agreement
from pipeline.distributed.world import World
from pipeline.recipe import StageRecipe, load_recipe
from pipeline.recipe.sections import CheckpointSettings
from pipeline.stage.directory import Stage
from pipeline.training.saving import Checkpoints, has_checkpoint, open_store
from tests.processes import PROCESSES
from tests.support import write_tiny_recipe

STEPS, RANKS = 16, 2
SETTINGS = CheckpointSettings(every_steps=2, keep_last=1, keep_every_epochs=1.0)


class TinyEngine:
    """Adam on two layers; the gradient is the mean over ranks, the data a hash of step and rank."""

    def __init__(self, world: World):
        torch.manual_seed(1)
        self.world = world
        self.model = torch.nn.Sequential(torch.nn.Linear(64, 1000), torch.nn.Tanh(), torch.nn.Linear(1000, 64))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        for parameter in self.model.parameters():
            moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[parameter] = {"step": torch.zeros(()), **moments}

    def step(self, step: int) -> None:
        generator = torch.Generator().manual_seed(1000 * step + self.world.rank)
        x = torch.randn(8, 64, generator=generator)
        (self.model(x) - x.roll(1)).square().mean().backward()
        for parameter in self.model.parameters():
            dist.all_reduce(parameter.grad, group=self.world.group)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state(self, step: int) -> dict:
        named = dict(self.model.named_parameters())
        moments = {name: dict(self.optimizer.state[parameter]) for name, parameter in named.items()}
        return {
            "model": {name: p.detach() for name, p in named.items()}, "optim": moments, "step": torch.tensor(step),
        }  # fmt: skip

    def digest(self, step: int) -> str:
        tensors = flatten(self.state(step))
        return hashlib.sha256(b"".join(tensors[name].numpy().tobytes() for name in sorted(tensors))).hexdigest()


@dataclass
class Log:
    """What the journal would get."""

    lines: list[dict] = field(default_factory=list)

    def flush(self) -> None: ...

    def write(self, kind: str, **fields) -> None:
        self.lines.append({"kind": kind, **fields})


def train(stage_directory, rank, meeting, pipe, settings, gate, dies_at_removal) -> None:
    """One rank of one attempt. Sends ("resumed", step, digest), ("step", step) after each one, then ("done", digest by
    step, journal). With a `gate` it waits before the third step until that file is there. It is killed before its
    removal of this number, counted from 1, of a file of checkpoints; 0 for never."""
    torch.set_num_threads(1)
    remove, removals = LocalFileSystem.rm_file, itertools.count(1)

    def remove_or_die(fs: LocalFileSystem, path: str) -> None:
        if next(removals) == dies_at_removal:
            os.kill(os.getpid(), signal.SIGKILL)
        remove(fs, path)

    LocalFileSystem.rm_file = remove_or_die
    try:
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=RANKS)
        world = World(rank, rank, RANKS, torch.device("cpu"), dist.group.WORLD)
        stage, engine, log = Stage(stage_directory), TinyEngine(world), Log()
        stage.attempts.own = world.on_main(lambda: stage.attempts.claim(RANKS))
        with stage.attempts.heartbeat() if rank == 0 else contextlib.nullcontext():
            resumes = has_checkpoint(stage, world)
            store = open_store(stage, {}, lambda message: log.write("event", message=message))
            start = store.restore(engine.state(0)) if resumes else 0
            pipe.send(("resumed", start, engine.digest(start)))
            health = stage.recipe.health.model_copy(update={"window_steps": 0, "skip_before": 0})  # prune at once
            recipe = stage.recipe.model_copy(update={"checkpoint": settings, "health": health})
            agreement = Agreement.among(world)
            checkpoints = Checkpoints(
                store, engine, log, recipe, steps_per_epoch=10, restored=start or None, agreement=agreement
            )
            digests = {}
            for step in range(start + 1, STEPS + 1):
                while gate and step == 3 and not gate.exists():
                    time.sleep(0.01)
                agreement.read()
                agreement.begin()
                engine.step(step)
                digests[step] = engine.digest(step)
                pipe.send(("step", step))
                if checkpoints.due(step):
                    checkpoints.save(step, why="due", wait=False)
                checkpoints.poll()
            checkpoints.save(STEPS, why="end")
        pipe.send(("done", digests, log.lines))
    except Exception:
        pipe.send(("failed", traceback.format_exc(), []))
    os._exit(0)


def make_recipe(directory: Path) -> StageRecipe:
    return load_recipe(write_tiny_recipe(directory)).stages["pretrain"]


class Attempt:
    """The ranks of one attempt at a stage."""

    def __init__(
        self, stage: Path, meeting: Path, settings: CheckpointSettings = SETTINGS, gate: Path | None = None,
        dies_at_removal: int = 0,
    ):  # fmt: skip
        self.ranks = []
        self.longest_seconds = 0.0  # between two messages of `let_pass`
        for rank in range(RANKS):
            ours, theirs = PROCESSES.Pipe(duplex=False)
            arguments = (stage, rank, meeting, theirs, settings, gate, dies_at_removal)
            process = PROCESSES.Process(target=train, args=arguments)
            process.start()
            theirs.close()
            self.ranks.append((process, ours))

    def receive(self, timeout_seconds: float = 400) -> tuple | None:
        """What rank 0 says next, but for its steps; None if it is gone."""
        while (said := self._next(timeout_seconds)) and said[0] == "step":
            pass
        return said

    def let_pass(self, steps: int) -> tuple | None:
        """Let rank 0 make so many steps. What it says at its end, if that comes before."""
        for _ in range(steps):
            began = time.monotonic()
            said = self._next(400)
            self.longest_seconds = max(self.longest_seconds, time.monotonic() - began)
            if not said or said[0] != "step":
                return said
        return None

    def _next(self, timeout_seconds: float) -> tuple | None:
        pipe = self.ranks[0][1]
        assert pipe.poll(timeout_seconds), "the run hangs"
        try:
            return pipe.recv()
        except (EOFError, ConnectionResetError):
            return None

    def kill(self, ranks: list[int]) -> None:
        """The ranks first, and the others, which would wait for them, right after."""
        for rank in [*ranks, *range(RANKS)]:
            self.ranks[rank][0].kill()
            if rank in ranks:
                time.sleep(0.02)
        for process, _ in self.ranks:
            process.join()


@dataclass(frozen=True)
class Reference:
    """An undisturbed run: the digest of the state after each step, and how long one took."""

    digests: dict[int, str]
    step_seconds: float


def undisturbed(directory: Path, recipe: StageRecipe) -> Reference:
    stage = Stage.create(directory / "reference", recipe)
    attempt = Attempt(stage.directory, directory / "meet-reference")
    assert attempt.receive()[0] == "resumed"
    began = time.monotonic()
    said = attempt.receive()
    assert said[0] == "done", said
    attempt.kill([])
    return Reference(said[1], (time.monotonic() - began) / STEPS)


@dataclass
class Count:
    """What the kills hit."""

    runs: int = 0
    killed_runs: int = 0
    kills: int = 0
    in_a_save: int = 0
    in_retention: int = 0


def kill_run(directory: Path, recipe: StageRecipe, reference: Reference, chance: random.Random, count: Count) -> None:
    """One run, killed until it gets through. AssertionError if it ever holds a state that the reference did not."""
    stage = Stage.create(directory, recipe).directory
    for number in range(200):
        # Every third attempt, on average, is killed in retention, which chance alone would seldom hit.
        removal = chance.randint(1, 8) if chance.random() < 1 / 3 else 0
        attempt = Attempt(stage, directory / f"meet-{number}", dies_at_removal=removal)
        said = attempt.receive()
        assert said[0] == "resumed", said
        assert said[1] == 0 or said[2] == reference.digests[said[1]], (
            f"attempt {number + 1} resumed another step {said[1]}"
        )
        # In steps, and in a share of the longest of them: whatever the machine's pace, the kills hit all of a run.
        said, share = attempt.let_pass(STEPS + 3 if removal else chance.randint(0, STEPS + 3)), chance.random()
        if said is not None:
            assert said[0] == "done", said
            assert all(reference.digests[step] == digest for step, digest in said[1].items())
            events = [line["message"] for line in said[2] if line["kind"] == "event"]
            assert not events, f"a kill leaves no damage, only leftovers: {events}"
            attempt.kill([])
            break
        time.sleep(share * (attempt.longest_seconds or reference.step_seconds))
        attempt.kill(chance.choice([[0], [1], [0, 1]]))
        count.kills += 1
        look_at_leftovers(stage / "checkpoints", number + 1, count)
    else:
        raise AssertionError("the run made no progress")
    count.runs += 1
    count.killed_runs += number > 0
    assert not (stage / "checkpoints" / "quarantine").exists()


def kill_runs(directory: Path, killed_runs: int, seed: int, report=lambda count: None) -> Count:
    """Runs until so many of them were killed, and three saves and three retentions hit; some may get through."""
    recipe, chance, count = make_recipe(directory), random.Random(seed), Count()
    reference = undisturbed(directory, recipe)
    while count.killed_runs < killed_runs or min(count.in_a_save, count.in_retention) < 3:
        assert count.runs < 10 * killed_runs, (
            f"the kills must hit the runs, their saves and retention, or this shows nothing: {count}"
        )
        kill_run(directory / f"run-{count.runs}", recipe, reference, chance, count)
        report(count)
    return count


def look_at_leftovers(checkpoints: Path, attempt: int, count: Count) -> None:
    folders = sorted(checkpoints.glob("step-*"))
    committed = [folder.name for folder in folders if (folder / "COMMIT").exists()]
    for folder in folders:
        if folder.name in committed:
            continue
        # Retention takes COMMIT first; a save writes it last, after the manifest.
        pruned = (folder / ".metadata").exists() != (folder / "manifest.json").exists()
        older = any(name > folder.name for name in committed)
        if older or pruned:
            count.in_retention += 1
        elif folder.name.endswith(f".{attempt:06d}"):
            count.in_a_save += 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        count = kill_runs(Path(name), given.runs, given.seed, report=lambda count: print(json.dumps(vars(count))))
    print(f"{count.runs} runs ended with the bits of the undisturbed one, after {count.kills} kills")
    return 0


if __name__ == "__main__":
    sys.exit(main())
