"""The checkpoints of one stage: save, restore the newest that verifies, never believe anything else.

What is marked collective is called by all ranks together, and an error on one is an error on all. Rank 0 alone looks,
decides and moves. The group handed in must work on CPU tensors, because the default group may not.
"""

import contextlib
import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.planner import LoadPlan

from pipeline.checkpoint.manifest import COMMIT, CheckpointName
from pipeline.checkpoint.storage import CommittingWriter, Folder, read_committed, remove_checkpoint
from pipeline.collective import from_rank_zero
from pipeline.errors import CheckpointError, UserError

QUARANTINE, EVER_COMMITTED = "quarantine", "EVER_COMMITTED"
State = Mapping[str, "torch.Tensor | State"]
T = TypeVar("T")


class CheckpointStore:
    """Checkpoints `step-<step>.<attempt>` in one directory, on a local path or an fsspec URL.

    `still_current()` is false once a newer attempt has taken the stage: this one then commits nothing and leaves all
    other checkpoints alone. `facts` (JSON) go into every manifest. `on_event` gets one sentence, on rank 0, about
    anything a person should know.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        *,
        attempt: int,
        group: dist.ProcessGroup,
        still_current: Callable[[], bool],
        facts: dict[str, Any],
        on_event: Callable[[str], None],
    ) -> None:
        self.folder = Folder.at(directory)
        self.attempt, self.group, self.facts, self.on_event = attempt, group, facts, on_event
        self._still_current = still_current

    # ---- looking

    def committed(self) -> list[CheckpointName]:
        """Checkpoints with a COMMIT, old to new; whether they verify is another question. Any process may ask."""
        names = (CheckpointName.parse(entry) for entry in self.folder.entries())
        return sorted(name for name in names if name and (self.folder / str(name) / COMMIT).exists())

    def steps(self) -> list[int]:
        """The steps of `committed()`, old to new."""
        return [name.step for name in self.committed()]

    def verify(self, name: str) -> list[str]:
        """What is wrong with a checkpoint, by re-reading it whole; empty when it is good. Any process may ask."""
        parsed = CheckpointName.parse(name)
        if parsed is None or not (self.folder / name / COMMIT).exists():
            return [f"{name} is not a committed checkpoint"]
        manifest, problems = read_committed(self.folder / name, parsed)
        if manifest is None:
            return problems
        found = ((self.folder / name).problem_of(file, record) for file, record in sorted(manifest.files.items()))
        return [problem for problem in found if problem]

    def ever_committed(self) -> bool:
        """Whether a checkpoint was ever committed here, even if none of them is usable now. Collective."""
        return self.from_rank_zero(
            lambda: (
                (self.folder / EVER_COMMITTED).exists() or (self.folder / QUARANTINE).exists() or bool(self.committed())
            )
        )

    def damage(self, name: CheckpointName) -> list[str]:
        """`verify`, with the reading shared among the ranks. Collective."""
        folder = self.folder / str(name)
        manifest, problems = self.from_rank_zero(lambda: read_committed(folder, name))
        if manifest is None:
            return problems
        rank, world = dist.get_rank(self.group), dist.get_world_size(self.group)
        share = sorted(manifest.files.items())[rank::world]
        found: list[list[str]] = [[]] * world
        mine = [problem for file, record in share if (problem := folder.problem_of(file, record))]
        dist.all_gather_object(found, mine, group=self.group)
        return sorted(problem for problems in found for problem in problems)

    # ---- saving

    def save(self, state: State, *, step: int, why: str) -> str:
        """Save and commit `state` (a nested dict of tensors by name); returns the checkpoint's name. Collective.

        Saving a step again that this attempt has committed already returns its name and writes nothing. On any
        failure nothing is committed and all ranks raise: CheckpointError where a person can help.
        """
        name, tensors = CheckpointName(attempt=self.attempt, step=step), flatten(state)
        folder = self.folder / str(name)
        if not self.from_rank_zero(lambda: self._make_room(folder)):
            return str(name)
        facts = {**self.facts, "step": step, "attempt": self.attempt, "why": why}
        facts["world_size"] = dist.get_world_size(self.group)
        writer = CommittingWriter(folder, name, facts, self._still_current)
        try:
            dcp.save(tensors, storage_writer=writer, process_group=self.group)
        except CheckpointException as failure:
            with contextlib.suppress(CheckpointError):  # tidying: what made the save fail is what matters
                self.from_rank_zero(lambda: self._remove_uncommitted(folder))
            raise _explained(failure, f"{folder} could not be saved", "free or repair the storage") from failure
        self.from_rank_zero(self._note_first_commit)
        return str(name)

    def _make_room(self, folder: Folder) -> bool:
        """False when the checkpoint is there already; leftovers of this attempt's failed save are cleared."""
        self.refuse_if_overtaken()
        if (folder / COMMIT).exists():
            return False
        self._remove_uncommitted(folder)
        folder.fs.makedirs(folder.path, exist_ok=True)
        self.folder.sync()
        return True

    def _remove_uncommitted(self, folder: Folder) -> None:
        if not (folder / COMMIT).exists():
            remove_checkpoint(folder)

    def _note_first_commit(self) -> None:
        if not (self.folder / EVER_COMMITTED).exists():
            self.folder.publish(EVER_COMMITTED, b"A checkpoint was committed here: this stage is resumed, not begun.\n")

    # ---- restoring

    def restore(self, state: State) -> int:
        """Load the newest checkpoint that verifies into the tensors of `state`, in place; returns its step. Collective.

        Damaged ones are moved to quarantine/ and reported. Raises CheckpointError when none is left, or when
        keys, shapes or dtypes are not those of `state`.
        """
        tensors = flatten(state)
        while problems := self.damage(name := self.from_rank_zero(self._newest)):
            self.from_rank_zero(lambda name=name, problems=problems: self._quarantine(name, problems))
        folder = self.folder / str(name)
        try:
            dcp.load(
                tensors,
                storage_reader=FsspecReader(folder.url),
                planner=_StrictLoadPlanner(str(folder)),
                process_group=self.group,
            )
        except CheckpointException as failure:
            raise _explained(failure, f"{folder} could not be loaded", "repair the storage") from failure
        return name.step

    def _newest(self) -> CheckpointName:
        names = self.committed()
        if not names:
            raise CheckpointError(
                f"{self.folder}: no usable checkpoint is left; repair one in {QUARANTINE}/ and move it back, "
                "or remove this directory to begin the stage again"
            )
        return names[-1]

    def _quarantine(self, name: CheckpointName, problems: list[str]) -> None:
        self.refuse_if_overtaken()
        shelf = self.folder / QUARANTINE
        shelf.fs.makedirs(shelf.path, exist_ok=True)
        taken, goal, again = shelf.entries(), str(name), 1
        while goal in taken:
            again += 1
            goal = f"{name}.{again}"
        shelf.fs.mv((self.folder / str(name)).path, (shelf / goal).path, recursive=True)
        listed = "; ".join(problems[:3]) + (f"; and {len(problems) - 3} more" if len(problems) > 3 else "")
        self.on_event(f"checkpoint {name} is damaged and was moved to {QUARANTINE}/{goal}: {listed}")

    # ---- together

    def refuse_if_overtaken(self) -> None:
        if not self._still_current():
            raise CheckpointError(
                f"{self.folder} is left alone: a newer attempt than {self.attempt} has taken the stage; "
                "let this process end"
            )

    def from_rank_zero(self, work: Callable[[], T]) -> T:
        """`work` on rank 0 alone, for all; an OSError becomes a CheckpointError. Collective."""

        def explained() -> T:
            try:
                return work()
            except OSError as error:
                raise CheckpointError(f"{self.folder}: {error}; free, unlock or repair the storage") from error

        return from_rank_zero(explained, self.group)


def flatten(state: State, prefix: str = "") -> dict[str, torch.Tensor]:
    """{"model": {"head.bias": t}} -> {"model.head.bias": t}; raises TypeError for a value that is no tensor."""
    flat: dict[str, torch.Tensor] = {}
    for key, value in state.items():
        name = f"{prefix}{key}"
        if not isinstance(value, torch.Tensor | Mapping):
            raise TypeError(f"{name} of the state is a {type(value).__name__}; a checkpoint holds tensors")
        items = {name: value} if isinstance(value, torch.Tensor) else flatten(value, f"{name}.")
        assert not flat.keys() & items.keys(), f"two tensors of the state share one of the names {sorted(items)}"
        flat.update(items)
    return flat


class _StrictLoadPlanner(DefaultLoadPlanner):
    """Refuses a state that is not exactly the checkpoint's: torch's planner lets surplus tensors and dtypes pass."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self._where = where

    def create_local_plan(self) -> LoadPlan:
        saved = {name: (tuple(m.size), m.properties.dtype) for name, m in self.metadata.state_dict_metadata.items()}
        wanted = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in self.state_dict.items()}
        for name in sorted(saved.keys() | wanted.keys()):
            if saved.get(name) != wanted.get(name):
                raise CheckpointError(
                    f"{self._where} does not fit: {name} is {_described(saved.get(name))} in the checkpoint and "
                    f"{_described(wanted.get(name))} here; resume with the recipe that the stage was started with"
                )
        return super().create_local_plan()


def _described(tensor: tuple[tuple[int, ...], torch.dtype] | None) -> str:
    return f"{tensor[0]} {str(tensor[1]).removeprefix('torch.')}" if tensor else "absent"


def _explained(failure: CheckpointException, what: str, remedy: str) -> Exception:
    """One error for all ranks: a UserError as it is, a sentence about a failing disk, or a bug with its traces."""
    causes = {rank: error for rank, (error, _) in sorted(failure.failures.items())}
    for error in causes.values():
        if isinstance(error, UserError):
            return error
    for rank, error in causes.items():
        if isinstance(error, OSError):
            return CheckpointError(f"{what} because rank {rank} met {type(error).__name__} ({error}); {remedy}")
    return RuntimeError(f"{what}: {failure}")
