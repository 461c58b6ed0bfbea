"""The checkpoints of one stage: save, restore the newest that verifies, never believe anything else.

What is marked collective is called by all ranks together, and an error on one is an error on all. Rank 0 alone looks,
decides and moves. The group handed in must work on CPU tensors, because the default group may not, and must be the
store's own: a save in the background talks over it while the training talks over others.
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
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.planner import LoadPlan

from pipeline.checkpoint.asynchronous import BackgroundSave, Buffers, StagingPlanner
from pipeline.checkpoint.dcp_writer import CommittingWriter, remove_checkpoint
from pipeline.checkpoint.manifest import COMMIT, CheckpointName
from pipeline.checkpoint.verification import file_problem, read_manifest, verify_checkpoint
from pipeline.distributed.collective import from_rank_zero
from pipeline.errors import CheckpointError, OvertakenError, UserError
from pipeline.storage.folder import Folder, is_storage_error

QUARANTINE, EVER_COMMITTED = "quarantine", "EVER_COMMITTED"
State = Mapping[str, "torch.Tensor | State"]
T = TypeVar("T")


class CheckpointStore:
    """Checkpoints `step-<step>.<attempt>` in one directory, on a local path or an fsspec URL.

    `still_current()` is false once a newer attempt has taken the stage: this one then commits nothing and leaves all
    other checkpoints alone. `facts` (JSON) go into every manifest, with what the checkpoint comes from: its parent is
    the one restored or saved before. `on_event` gets one sentence, on rank 0, about anything a person should know.
    At most `most_fallbacks` damaged checkpoints are set aside in one restore: more look like a broken disk.
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
        most_fallbacks: int = 3,
    ) -> None:
        self.folder = Folder.at(directory)
        self.attempt, self.group, self.facts, self.on_event = attempt, group, facts, on_event
        self.most_fallbacks = most_fallbacks
        self.parents: list[str] = []
        self._still_current = still_current
        self._buffers: Buffers = {}
        self._background: BackgroundSave | None = None

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
        return verify_checkpoint(self.folder / name, parsed)[1]

    def ever_committed(self) -> bool:
        """Whether a checkpoint was ever committed here, even if none of them is usable now. Collective."""
        return self.from_rank_zero(
            lambda: (
                (self.folder / EVER_COMMITTED).exists() or (self.folder / QUARANTINE).exists() or bool(self.committed())
            )
        )

    def damage(self, name: CheckpointName) -> list[str]:
        """`verify`, with the reading shared among the ranks. Collective.

        Raises CheckpointError when an object store does not answer, which is no damage.
        """
        folder = self.folder / str(name)
        manifest, problems = self.from_rank_zero(lambda: read_manifest(folder, name))
        if manifest is None:
            return problems
        rank, world = dist.get_rank(self.group), dist.get_world_size(self.group)
        share = sorted(manifest.files.items())[rank::world]
        mine: list[str] | CheckpointError
        try:
            mine = [problem for file, record in share if (problem := file_problem(folder, file, record))]
        except Exception as error:  # the other ranks wait for it
            mine = CheckpointError(f"{folder} could not be read ({type(error).__name__}: {error}); repair the storage")
        found: list[Any] = [None] * world
        dist.all_gather_object(found, mine, group=self.group)
        for problems in found:
            if isinstance(problems, CheckpointError):
                raise problems
        return sorted(problem for problems in found for problem in problems)

    # ---- saving

    def save(self, state: State, *, step: int, why: str) -> str:
        """Save and commit `state` (a nested dict of tensors by name); returns the checkpoint's name. Collective.

        Saving a step again that this attempt has committed already returns its name and writes nothing. On any
        failure nothing is committed and all ranks raise: CheckpointError where a person can help.
        """
        return self._write(flatten(state), step, why, DefaultSavePlanner())

    def save_in_background(
        self, state: State, *, step: int, why: str, then: Callable[[], None] = lambda: None
    ) -> BackgroundSave:
        """`save` in a thread, and `then` in it after the commit; returns when `state` may change again. Collective.

        One is open at most: whatever else is asked of the store waits for its end.
        """
        tensors = flatten(state)
        self._wait()

        def work(staged: Callable[[], None]) -> str:
            return self._write(tensors, step, why, StagingPlanner(self._buffers, staged))

        self._background = BackgroundSave(step, work, then)
        return self._background

    def _wait(self) -> None:
        if self._background and not self._background.is_this_thread:
            self._background.wait()

    def _write(self, tensors: dict[str, torch.Tensor], step: int, why: str, planner: DefaultSavePlanner) -> str:
        name = CheckpointName(attempt=self.attempt, step=step)
        folder = self.folder / str(name)
        if not self.from_rank_zero(lambda: self._make_room(folder)):
            return str(name)
        facts = {**self.facts, "step": step, "attempt": self.attempt, "why": why, "parents": self.parents}
        facts["world_size"] = dist.get_world_size(self.group)
        writer = CommittingWriter(folder, name, facts, self._still_current)
        try:
            dcp.save(tensors, storage_writer=writer, planner=planner, process_group=self.group)
        except CheckpointException as failure:
            with contextlib.suppress(CheckpointError):  # tidying: what made the save fail is what matters
                self.from_rank_zero(lambda: self._remove_uncommitted(folder))
            raise _explained(failure, f"{folder} could not be saved", "free or repair the storage") from failure
        self.parents = [str(name)]
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

        Damaged ones are moved to quarantine/ and reported. Raises CheckpointError when none is left, when more than
        `most_fallbacks` are damaged, or when keys, shapes or dtypes are not those of `state`.
        """
        tensors = flatten(state)
        fallbacks = 0
        while problems := self.damage(name := self.from_rank_zero(self._newest)):
            if fallbacks == self.most_fallbacks:
                raise CheckpointError(
                    f"{self.folder}: {fallbacks + 1} checkpoints are damaged, the last one {name} ({problems[0]}); "
                    "look after the storage, then run again or raise checkpoint.most_fallbacks"
                )
            fallbacks += 1
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
        self.parents = [str(name)]
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
            raise OvertakenError(
                f"{self.folder} is left alone: a newer attempt than {self.attempt} has taken the stage; "
                "let this process end"
            )

    def from_rank_zero(self, work: Callable[[], T]) -> T:
        """`work` on rank 0 alone, for all; the storage's errors become a CheckpointError. Collective."""

        def explained() -> T:
            try:
                return work()
            except Exception as error:
                if not is_storage_error(error):
                    raise
                raise CheckpointError(f"{self.folder}: {error}; free, unlock or repair the storage") from error

        self._wait()
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
        if is_storage_error(error):
            return CheckpointError(f"{what} because rank {rank} met {type(error).__name__} ({error}); {remedy}")
    return RuntimeError(f"{what}: {failure}")
