"""Save the checkpoints of a stage, and restore the newest one that verifies.

All ranks call a collective method together, and an error on one rank is raised on all. Only rank 0 lists, decides,
moves and deletes. The process group must work on CPU tensors and must be the store's own, because a save in the
background uses it while the training uses others.
"""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.planner import LoadPlan

from pipeline.checkpoint.asynchronous import BackgroundSave, Buffers, StagingPlanner
from pipeline.checkpoint.dcp_writer import CommittingWriter, remove_checkpoint
from pipeline.checkpoint.fallback import newest_usable
from pipeline.checkpoint.manifest import COMMIT, CheckpointName
from pipeline.checkpoint.save_plan import Planner, Plans
from pipeline.checkpoint.verification import file_problem, read_manifest
from pipeline.distributed.collective import from_rank_zero
from pipeline.errors import CheckpointError, OvertakenError, UserError
from pipeline.storage.folder import Folder, is_storage_error, storage_failure

QUARANTINE, EVER_COMMITTED = "quarantine", "EVER_COMMITTED"
State = Mapping[str, "torch.Tensor | State"]
T = TypeVar("T")


class CheckpointStore:
    """The checkpoints `step-<step>.<attempt>` in one directory.

    Args:
        directory: a local path or an fsspec URL.
        attempt: the number of this attempt.
        group: a process group of all ranks for CPU tensors, used by nothing else.
        still_current: false once a newer attempt has taken the stage; then nothing is committed, moved or deleted.
        facts: JSON for every manifest.
        on_event: gets a sentence on rank 0 about anything that a person should know.
        parents: where the weights of the first checkpoint are from; later ones have the one restored or saved before.
        most_fallbacks: most damaged checkpoints that one restore sets aside; more mean a broken disk.
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
        parents: Iterable[str] = (),
        most_fallbacks: int = 3,
    ) -> None:
        self.folder = Folder.at(directory)
        self.attempt, self.group, self.facts, self.on_event = attempt, group, facts, on_event
        self.most_fallbacks = most_fallbacks
        self.parents = list(parents)
        self._still_current = still_current
        self._plans = Plans(dist.get_rank(group), dist.get_world_size(group))
        self._buffers: Buffers = {}
        self._background: BackgroundSave | None = None

    # ---- list and verify

    def committed(self) -> list[CheckpointName]:
        """Checkpoints with a COMMIT, verified or not, old to new. Not collective."""
        return committed_checkpoints(self.folder)

    def verify(self, name: CheckpointName) -> list[str]:
        """Re-read a checkpoint, each rank a share of its files; returns the problems of all. Collective.

        Raises:
            CheckpointError: if the storage does not answer, which says nothing about the checkpoint.
        """
        folder = self.folder / str(name)
        manifest, problems = self.from_rank_zero(lambda: read_manifest(folder, name))
        if manifest is None:
            return problems
        rank, world = dist.get_rank(self.group), dist.get_world_size(self.group)
        share = sorted(manifest.files.items())[rank::world]
        problems_or_error: list[str] | CheckpointError
        try:
            problems_or_error = [problem for file, record in share if (problem := file_problem(folder, file, record))]
        except Exception as error:  # sent to the other ranks, which wait in the gather
            reason = f"{type(error).__name__}: {error}"
            problems_or_error = storage_failure(f"{folder} could not be read ({reason}); repair the storage", error)
        of_all_ranks: list[Any] = [None] * world
        dist.all_gather_object(of_all_ranks, problems_or_error, group=self.group)
        for result in of_all_ranks:
            if isinstance(result, CheckpointError):
                raise result
        return sorted(problem for problems in of_all_ranks for problem in problems)

    # ---- save

    def save(self, state: State, *, step: int, why: str) -> str:
        """Save the state of all ranks, a nested dict of tensors by name, and commit it; returns its name. Collective.

        Writes nothing if this attempt has committed the step already.

        Raises:
            CheckpointError: on all ranks, if a person can repair the cause; nothing is committed then.
        """
        return self._write(flatten(state), step, why, Planner(self._plans))

    def save_in_background(
        self, state: State, *, step: int, why: str, then: Callable[[], None] = lambda: None
    ) -> BackgroundSave:
        """`save` in a thread, followed there by `then`; returns when `state` may change again. Collective.

        At most one save is open: all other collective methods wait for its end.
        """
        tensors = flatten(state)
        self._wait()

        def work(staged: Callable[[], None]) -> str:
            return self._write(tensors, step, why, StagingPlanner(self._plans, self._buffers, staged))

        self._background = BackgroundSave(step, work, then)
        return self._background

    def _wait(self) -> None:
        if self._background and not self._background.is_this_thread:
            self._background.wait()

    def _write(self, tensors: dict[str, torch.Tensor], step: int, why: str, planner: Planner) -> str:
        name = CheckpointName(attempt=self.attempt, step=step)
        folder = self.folder / str(name)
        if not self.from_rank_zero(lambda: self._make_room(folder)):
            return str(name)
        facts = {**self.facts, "step": step, "attempt": self.attempt, "why": why, "parents": self.parents}
        facts["world_size"] = dist.get_world_size(self.group)
        writer = CommittingWriter(folder, name, facts, planner, self._still_current)
        try:
            dcp.save(tensors, storage_writer=writer, planner=planner, process_group=self.group)
        except CheckpointException as failure:
            with contextlib.suppress(CheckpointError):  # the save's own error matters more than this clean-up's
                self.from_rank_zero(lambda: self._remove_uncommitted(folder))
            raise _one_error(failure, f"{folder} could not be saved", "free or repair the storage") from failure
        self.parents = [str(name)]
        self.from_rank_zero(self._note_first_commit)
        return str(name)

    def _make_room(self, folder: Folder) -> bool:
        """Create the directory and clear a failed save's files from it; False if it holds a committed checkpoint."""
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

    # ---- restore

    def restore(self, state: State) -> int:
        """Load the newest checkpoint that verifies into the tensors of `state`; returns its step. Collective.

        Damaged checkpoints are moved to quarantine/ and reported.

        Raises:
            CheckpointError: if no checkpoint is left, if more than `most_fallbacks` are damaged, or if the names,
                shapes or dtypes of the tensors differ from those of `state`.
        """
        tensors = flatten(state)
        name = newest_usable(
            lambda: self.from_rank_zero(self._newest),
            self.verify,
            lambda name, problems: self.from_rank_zero(lambda: self._quarantine(name, problems)),
            self.most_fallbacks,
        )
        folder = self.folder / str(name)
        try:
            dcp.load(
                tensors,
                storage_reader=FsspecReader(folder.url),
                planner=_StrictLoadPlanner(str(folder)),
                process_group=self.group,
            )
        except CheckpointException as failure:
            raise _one_error(failure, f"{folder} could not be loaded", "repair the storage") from failure
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

    def _quarantine(self, name: CheckpointName, problems: Sequence[str]) -> None:
        self.refuse_if_overtaken()
        shelf = self.folder / QUARANTINE
        shelf.fs.makedirs(shelf.path, exist_ok=True)
        existing, target, copies = shelf.entries(), str(name), 1
        while target in existing:
            copies += 1
            target = f"{name}.{copies}"
        shelf.fs.mv((self.folder / str(name)).path, (shelf / target).path, recursive=True)
        first = "; ".join(problems[:3]) + (f"; and {len(problems) - 3} more" if len(problems) > 3 else "")
        self.on_event(f"checkpoint {name} is damaged and was moved to {QUARANTINE}/{target}: {first}")

    # ---- on rank 0

    def refuse_if_overtaken(self) -> None:
        """Raise OvertakenError if a newer attempt has taken the stage."""
        if not self._still_current():
            raise OvertakenError(
                f"{self.folder} is left alone: a newer attempt than {self.attempt} has taken the stage; "
                "let this process end"
            )

    def from_rank_zero(self, work: Callable[[], T]) -> T:
        """Run `work` on rank 0; returns its result on all ranks. Collective.

        Raises:
            CheckpointError: if the storage raises an error.
        """

        def run() -> T:
            with _storage_errors_explained(self.folder):
                return work()

        self._wait()
        return from_rank_zero(run, self.group)


def committed_checkpoints(folder: Folder) -> list[CheckpointName]:
    """The checkpoints with a COMMIT, old to new. They are not verified."""
    names = (CheckpointName.parse(entry) for entry in folder.entries())
    return sorted(name for name in names if name and (folder / str(name) / COMMIT).exists())


def ever_committed(folder: Folder) -> bool:
    """Whether a checkpoint was ever committed in a folder, even if none is usable now.

    Raises:
        CheckpointError: if the storage fails.
    """
    with _storage_errors_explained(folder):
        marked = (folder / EVER_COMMITTED).exists() or (folder / QUARANTINE).exists()
        return marked or bool(committed_checkpoints(folder))


@contextlib.contextmanager
def _storage_errors_explained(folder: Folder) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not is_storage_error(error):
            raise
        raise storage_failure(f"{folder}: {error}; free, unlock or repair the storage", error) from error


def flatten(state: State, prefix: str = "") -> dict[str, torch.Tensor]:
    """Flatten {"model": {"head.bias": t}} to {"model.head.bias": t}. Raises TypeError for a value that is no tensor."""
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
    """Refuses a state that differs from the checkpoint; torch's planner ignores surplus tensors and other dtypes."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self._folder = folder

    def create_local_plan(self) -> LoadPlan:
        saved = {name: (tuple(m.size), m.properties.dtype) for name, m in self.metadata.state_dict_metadata.items()}
        expected = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in self.state_dict.items()}
        for name in sorted(saved.keys() | expected.keys()):
            if saved.get(name) != expected.get(name):
                raise CheckpointError(
                    f"{self._folder} does not fit: {name} is {_describe(saved.get(name))} in the checkpoint and "
                    f"{_describe(expected.get(name))} here; resume with the recipe that the stage was started with"
                )
        self._plan = super().create_local_plan()
        return LoadPlan([])  # rank 0 changes nothing in the ranks' plans, so they need not pass through it

    def finish_plan(self, new_plan: LoadPlan) -> LoadPlan:
        return self._plan


def _describe(tensor: tuple[tuple[int, ...], torch.dtype] | None) -> str:
    return f"{tensor[0]} {str(tensor[1]).removeprefix('torch.')}" if tensor else "absent"


def _one_error(failure: CheckpointException, problem: str, remedy: str) -> Exception:
    """Choose the error for all ranks: a UserError, a CheckpointError about the storage, or the traces of a bug."""
    causes = {rank: error for rank, (error, _) in sorted(failure.failures.items())}
    for error in causes.values():
        if isinstance(error, UserError):
            return error
    for rank, error in causes.items():
        if is_storage_error(error):
            reason = f"because rank {rank} met {type(error).__name__} ({error})"
            return storage_failure(f"{problem} {reason}; {remedy}", error)
    return RuntimeError(f"{problem}: {failure}")
