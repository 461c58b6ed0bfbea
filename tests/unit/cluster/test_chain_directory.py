"""A run belongs to its recipe from the first submitted job or the first step on, and not before."""

import errno
import os
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest

from cluster.chain import check_before_start, hold_run, open_chain
from cluster.slurm.job_history import note_job_event
from pipeline.data.beton import open_beton
from pipeline.data.beton_writer import BetonWriter
from pipeline.distributed.processes import start_time
from pipeline.errors import DataError, RecipeError, StageError
from pipeline.recipe import load_recipe
from pipeline.storage.file_names import ATTEMPTS_FOLDER, DATA_FILE, DONE_FILE
from pipeline.storage.folder import write_json
from tests.support import mark_done, open_journal, write_tiny_recipe

OTHER = ["stages.pretrain.batch.global_batch=16", "stages.finetune=null"]


@pytest.fixture
def refused(tmp_path) -> tuple[Path, Path]:
    """A recipe, and the run of it that was refused in its ranks: nothing but an attempt was noted."""
    recipe = write_tiny_recipe(tmp_path)
    run = tmp_path / "run"
    stage = open_chain(load_recipe(recipe), run)[0]
    stage.attempts.claim(1)
    open_journal(stage.directory).write("attempt", step=0)
    stage.pin_data({"train": "a" * 64})
    owner = stage.directory / ATTEMPTS_FOLDER / "000001.json"
    write_json(owner, {"attempt": 1, "host": socket.gethostname(), "pid": 2**22, "pid_start_time": 1})
    return recipe, run


def files(run: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_a_corrected_recipe_starts_in_the_same_directory(refused):
    recipe, run = refused
    stages = open_chain(load_recipe(recipe, OTHER), run)
    assert [stage.directory.name for stage in stages] == ["pretrain", "intermediate"]
    assert stages[0].recipe.batch.global_batch == 16
    assert not (run / "finetune").exists()
    assert not (run / "pretrain" / DATA_FILE).exists()
    assert stages[0].attempts.newest() == 0


def test_files_of_the_user_are_never_removed(refused):
    recipe, run = refused
    notes = run / "finetune" / "notes.txt"
    notes.write_text("mine")
    open_chain(load_recipe(recipe, OTHER), run)
    assert [path.name for path in (run / "finetune").iterdir()] == ["notes.txt"]


def test_a_folder_with_a_recipe_that_a_person_wrote_is_no_run(tmp_path):
    project = tmp_path / "project"
    (project / "pretrain").mkdir(parents=True)
    (project / "pretrain" / "photo.jpg").write_bytes(b"mine")
    write_tiny_recipe(project).rename(project / "recipe.yaml")
    before = files(project)
    for refuse in (open_chain, lambda chain, run: check_before_start(chain, run, 1)):
        with pytest.raises(StageError, match=r"holds a recipe.yaml that no run wrote; choose another directory"):
            refuse(load_recipe(project / "recipe.yaml", OTHER), project)
    assert files(project) == before


def test_an_unchanged_recipe_keeps_what_there_is(refused):
    recipe, run = refused
    before = files(run)
    open_chain(load_recipe(recipe), run)
    assert files(run) == before


@pytest.mark.parametrize(
    "begin",
    [
        lambda stage: open_journal(stage).write("step", step=1),
        lambda stage: open_journal(stage).write("save", step=0),
        lambda stage: note_job_event(stage, "submitted", "7", committed=-1),
        lambda stage: (stage / DONE_FILE).write_text("{}"),
    ],
    ids=["a step", "a checkpoint", "a job", "an end"],
)
def test_a_run_that_began_keeps_its_recipe(refused, begin):
    recipe, run = refused
    begin(run / "intermediate")
    before = files(run)
    for refuse in (open_chain, lambda chain, run: check_before_start(chain, run, 1)):
        with pytest.raises(RecipeError, match=r"was started with another recipe .*; choose another directory, or undo"):
            refuse(load_recipe(recipe, OTHER), run)
    assert files(run) == before


def test_a_job_in_the_queue_binds_as_well(refused):
    recipe, run = refused
    with pytest.raises(RecipeError, match="was started with another recipe"):
        open_chain(load_recipe(recipe, OTHER), run, bound=True)


def test_a_live_attempt_or_command_is_not_disturbed(refused):
    recipe, run = refused
    before = files(run)
    with hold_run(run), pytest.raises(StageError, match="is just being started by another command; wait for it"):
        open_chain(load_recipe(recipe, OTHER), run)
    assert files(run) == before
    live = {"attempt": 1, "host": socket.gethostname(), "pid": os.getpid(), "pid_start_time": start_time(os.getpid())}
    write_json(run / "pretrain" / ATTEMPTS_FOLDER / "000001.json", live)
    with pytest.raises(StageError, match="is being run by process"):
        open_chain(load_recipe(recipe, OTHER), run)


@pytest.mark.parametrize("change", ["stages.finetune.data.train=nowhere.beton", "stages.finetune.objective.classes=3"])
def test_a_refused_start_makes_nothing(tmp_path, change):
    recipe = write_tiny_recipe(tmp_path)
    with pytest.raises(DataError):
        check_before_start(load_recipe(recipe, [change]), tmp_path / "run", 1)
    assert not (tmp_path / "run").exists()
    open_chain(load_recipe(recipe), tmp_path / "run")
    before = files(tmp_path / "run")
    with pytest.raises(DataError):
        check_before_start(load_recipe(recipe, [change]), tmp_path / "run", 1)
    assert files(tmp_path / "run") == before


@pytest.mark.parametrize(
    "change",
    [
        "stages.finetune.model.dims=[8,24]",
        "stages.intermediate.model.stem_stride=4",
        "stages.finetune.model.response=none",
        "stages.pretrain.model.layer_scale=0.1",
    ],
)
def test_weights_that_the_next_stage_could_not_take_are_refused_before_they_are_trained(tmp_path, change):
    recipe = write_tiny_recipe(tmp_path)
    with pytest.raises(RecipeError, match=r"stage \w+ could not start from the weights of stage \w+: .* in the model;"):
        check_before_start(load_recipe(recipe, [change]), tmp_path / "run", 1)
    assert not (tmp_path / "run").exists()


def test_a_finished_stage_keeps_its_data(tmp_path):
    recipe, run = write_tiny_recipe(tmp_path), tmp_path / "run"
    stage = open_chain(load_recipe(recipe), run)[0]
    own = Path(stage.recipe.data.train)
    stage.pin_data({"train": open_beton(own).identity})
    mark_done(stage.directory)
    for name in ("copy.beton", "copy.beton.json"):
        shutil.copy(str(own) + name.removeprefix("copy.beton"), tmp_path / name)
    with BetonWriter(tmp_path / "other.beton", ["one", "two"], 2) as writer:
        for label in range(2):
            writer.add(np.full((32, 32, 3), label, np.uint8), label)
    before = files(run)

    def start(data: str) -> None:
        check_before_start(load_recipe(recipe, [f"stages.pretrain.data.train={tmp_path / data}"]), run, 1)

    start("copy.beton")
    start("gone.beton")
    with pytest.raises(DataError, match=r"was started with data.train of sha256 .*, or start another --out"):
        start("other.beton")
    assert files(run) == before


def test_a_corrected_recipe_starts_on_a_disk_without_locks(refused, monkeypatch):
    def lock(*_: object) -> None:  # as NFS answers for a directory
        raise OSError(errno.EBADF, "Bad file descriptor")

    recipe, run = refused
    monkeypatch.setattr("fcntl.flock", lock)
    assert len(open_chain(load_recipe(recipe, OTHER), run)) == 2
