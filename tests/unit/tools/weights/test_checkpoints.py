"""`fcmae verify` of directories and `fcmae checkpoint`, on a stage with real checkpoints."""

import json
import shutil
import tempfile

import fsspec
import pytest
import torch
import torch.distributed as dist
from typer.testing import CliRunner

from pipeline.errors import CheckpointError, StageError
from pipeline.stage.directory import Stage
from pipeline.stage.outcome import Outcome, OutcomeKind
from pipeline.training.saving import open_store
from pipeline.weights.safetensors_file import read_facts, read_weights, write_weights
from tests.support import make_tiny_run
from tools.cli import app as cli
from tools.verify.run_directory import examine, verify_run
from tools.weights.checkpoint_commands import app


def state_of(step: int) -> dict:
    weights = {"head.weight": torch.full((3, 2), float(step)), "head.bias": torch.zeros(3)}
    average = {name: tensor + 1 for name, tensor in weights.items()}
    return {"model": weights, "ema": average, "step": torch.tensor(step)}


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    """A stage that finished at step 40 and had its best evaluation at step 20."""
    directory = tmp_path_factory.mktemp("checkpoints")
    stage = Stage(make_tiny_run(directory) / "intermediate")
    dist.init_process_group("gloo", init_method=f"file://{directory}/meeting", rank=0, world_size=1)
    stage.attempts.claim(1)
    store = open_store(stage, {"recipe": "abc"}, print)
    for step in (10, 20, 30, 40):
        store.save(state_of(step), step=step, why="due")
    dist.destroy_process_group()
    lines = [{"kind": "attempt", "step": 0}]
    lines += [{"kind": "evaluate", "step": step, "metrics": {"top1": top1}} for step, top1 in ((20, 70.0), (40, 60.0))]
    (stage.directory / "journal.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    digest = write_weights(stage.directory / "weights.safetensors", state_of(40)["model"], {})
    stage.attempts.record(Outcome(OutcomeKind.DONE, step=40))
    stage.finish({"weights": "weights.safetensors", "weights_sha256": digest}, 40)
    return stage


def checkpoint_of(stage, step):
    return stage.directory / "checkpoints" / f"step-{step:09d}.000001"


@pytest.fixture
def broken(stage):
    """Change a byte of a file until the test ends."""
    changed = []

    def change(path):
        changed.append((path, path.read_bytes()))
        data = bytearray(path.read_bytes())
        data[data.index(b"{", len(data) // 3) if path.suffix == ".jsonl" else len(data) // 2] ^= 1
        path.write_bytes(data)

    yield change
    for path, data in changed:
        path.write_bytes(data)


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_a_whole_run_is_verified(stage, capsys):
    verify_run(stage.directory.parent)
    said = capsys.readouterr().out
    assert said.count("ok ") == 8  # four checkpoints, journal, weights, two stages that have not started
    assert "DAMAGED" not in said


@pytest.mark.parametrize(
    ("path", "named"),
    [
        ("checkpoints/step-000000020.000001/__0_0.distcp", "another sha256"),
        ("weights.safetensors", "sha256 is"),
        ("journal.jsonl", "line 2 is no JSON object"),
    ],
)
def test_a_changed_byte_is_found_from_the_run_and_from_the_stage(stage, broken, capsys, path, named):
    broken(stage.directory / path)
    for directory in (stage.directory.parent, stage.directory):
        with pytest.raises(CheckpointError, match="1 damaged"):
            verify_run(directory)
        [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("DAMAGED")]
        assert named in line


def test_a_checkpoint_and_a_folder_of_them_are_verified(stage, broken):
    assert [checked.intact for checked in examine(checkpoint_of(stage, 20))] == [True]
    assert [checked.intact for checked in examine(stage.directory / "checkpoints")] == [True] * 4
    broken(checkpoint_of(stage, 20) / "manifest.json")
    assert [checked.intact for checked in examine(checkpoint_of(stage, 20))] == [False]
    commit = checkpoint_of(stage, 30) / "COMMIT"
    kept = commit.read_bytes()
    commit.unlink()
    assert "not committed" in next(examine(checkpoint_of(stage, 30))).detail
    commit.write_bytes(kept)


@pytest.fixture
def remote(stage):
    """The same run in an object store."""
    store = fsspec.filesystem("memory")
    store.put(str(stage.directory.parent), "/bucket/run", recursive=True)
    yield store
    store.rm("/bucket", recursive=True)


def test_a_run_in_a_store_is_looked_at_by_its_url(stage, remote, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # other programs use the default folder, too

    def fcmae(*arguments):
        return CliRunner().invoke(cli, [*arguments, "memory://bucket/run"])

    here = CliRunner().invoke(cli, ["status", "--json", str(stage.directory.parent)])
    there = fcmae("status", "--json")
    assert there.exit_code == 0, there.output
    ages = [[s.pop("last_checkpoint_age_seconds") for s in json.loads(r.output)] for r in (here, there)]
    seen = [[{**s, "last_checkpoint_age_seconds": 0} for s in json.loads(r.output)] for r in (here, there)]
    assert seen[0] == seen[1]
    assert seen[1][1]["state"] == "done"
    assert (ages[1][0], ages[1][1] < 600) == (None, True)
    whole = fcmae("verify")
    assert whole.exit_code == 0, whole.output
    assert whole.output.count("ok      memory://") == 8
    assert "memory:///bucket/run/intermediate/weights.safetensors: as DONE says" in whole.output
    for name in ("weights.safetensors", f"checkpoints/{checkpoint_of(stage, 20).name}/__0_0.distcp"):
        path = f"/bucket/run/intermediate/{name}"
        good = remote.cat_file(path)
        remote.pipe_file(path, good[:-1] + bytes([good[-1] ^ 1]))
        with pytest.raises(CheckpointError, match="1 damaged"):
            verify_run("memory://bucket/run")
        with pytest.raises(CheckpointError, match="1 damaged"):
            verify_run("memory://bucket/run/intermediate")
        remote.pipe_file(path, good)
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def test_a_url_without_a_run_is_one_sentence(remote):
    done = CliRunner().invoke(cli, ["status", "memory://bucket"])
    assert str(done.exception) == (
        "memory://bucket is no run directory: it has no recipe.yaml; give the --out of `fcmae run`"
    )


def test_what_is_nothing_of_ours_is_refused(tmp_path):
    with pytest.raises(StageError, match="no run, stage or checkpoint"):
        verify_run(tmp_path)


def test_they_are_listed(stage):
    listed = invoke("ls", stage.directory)
    assert listed.exit_code == 0
    assert listed.stdout.count("committed") == 4
    assert "name a stage that has started" in str(invoke("ls", stage.directory.parent).exception)


@pytest.mark.parametrize("ema", [False, True])
def test_weights_are_taken_out(stage, tmp_path, ema):
    done = invoke("export", checkpoint_of(stage, 20), tmp_path / "w.safetensors", *(["--ema"] if ema else []))
    assert done.exit_code == 0, done.exception
    weights = read_weights(tmp_path / "w.safetensors")
    expected = state_of(20)["ema" if ema else "model"]
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    facts = read_facts(tmp_path / "w.safetensors")
    assert facts == {
        "checkpoint": "step-000000020.000001",
        "weights": "ema" if ema else "model",
        "step": 20,
        "recipe": "abc",
    }
    again = invoke("export", checkpoint_of(stage, 20), tmp_path / "w.safetensors")
    assert "--overwrite" in str(again.exception)


def test_damaged_weights_are_not_taken_out(stage, broken, tmp_path):
    broken(checkpoint_of(stage, 20) / "__0_0.distcp")
    assert "is damaged" in str(invoke("export", checkpoint_of(stage, 20), tmp_path / "w.safetensors").exception)
    assert not (tmp_path / "w.safetensors").exists()


def test_pruning_asks_first_and_keeps_the_best_and_the_last(stage, tmp_path):
    shutil.copytree(stage.directory.parent, tmp_path / "run")  # other tests need all checkpoints
    directory = tmp_path / "run" / stage.directory.name
    asked = invoke("prune", directory)
    assert [line for line in asked.stdout.splitlines() if "delete" in line] == [
        f"would delete step-0000000{step}.000001" for step in (10, 30)
    ]
    assert len(list((directory / "checkpoints").glob("step-*"))) == 4
    done = invoke("prune", directory, "--yes")
    assert done.exit_code == 0, done.exception
    assert sorted(path.name for path in (directory / "checkpoints").glob("step-*")) == [
        f"step-0000000{step}.000001" for step in (20, 40)
    ]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("journal.jsonl", '{"kind": "evaluate", "step": "20"}\n', "line 1 has step '20'"),
        ("DONE", "{", "DONE cannot be read"),
    ],
)
def test_nothing_is_pruned_while_a_record_may_hide_the_best_checkpoint(stage, tmp_path, name, content, words):
    shutil.copytree(stage.directory.parent, tmp_path / "run")
    directory = tmp_path / "run" / stage.directory.name
    (directory / name).write_text(content)
    refused = invoke("prune", directory, "--yes")
    assert isinstance(refused.exception, CheckpointError)
    assert words in str(refused.exception)
    assert len(list((directory / "checkpoints").glob("step-*"))) == 4
