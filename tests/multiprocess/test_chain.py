"""The chain in real processes: killed, stopped, continued, on other numbers of ranks."""

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from pipeline.stage.directory import Stage
from pipeline.stage.outcome import OutcomeKind
from pipeline.tracking import journal
from tests.processes import Forked, run_stage, start_fcmae
from tests.support import (
    FCMAE,
    fcmae,
    make_tiny_run,
    wait_for_step,
    weights_sha256,
    write_tiny_recipe,
)

STAGES = ("pretrain", "intermediate", "finetune")
TRACKED = "stages.pretrain.tracking.mlflow=true"  # in one stage alone: importing MLflow takes seconds
ALONE = ("stages.intermediate=null", "stages.finetune=null")


def digests(run: Path) -> dict[str, str]:
    return {name: weights_sha256(run / name) for name in STAGES}


def start(recipe: Path, run: Path, nproc: int, hold: dict[str, int], *changes: str) -> Forked:
    """The command. A stage in `hold` waits before the given step until it is disturbed."""
    return start_fcmae("run", recipe, "--out", run, "--nproc", nproc, *changes, FAULTS=json.dumps({"hold": hold}))


@pytest.fixture(scope="module")
def chain(tmp_path_factory) -> tuple[Path, Path]:
    """A recipe, and its run on two ranks that nothing disturbed."""
    directory = tmp_path_factory.mktemp("chain")
    recipe = write_tiny_recipe(directory, ["defaults.tracking.log_every_steps=1"])
    done = fcmae("run", recipe, "--out", directory / "run", "--nproc", 2, TRACKED)
    assert done.returncode == 0, done.stderr
    return recipe, directory / "run"


def test_the_run_directory_keeps_its_contract(chain):
    run = chain[1]
    for name in STAGES:
        result = json.loads((run / name / "result.json").read_text())
        assert result["stage"] == name
        assert result["steps"] == 12
        assert result["images_seen"] == 12 * 32
        assert result["world_size"] == 2
        assert ("loss" if name == "pretrain" else "top1") in result["metrics"]
        assert (run / name / result["weights"]).is_file()
        steps = [e for e in journal.read_events(run / name / "journal.jsonl") if e["kind"] == "step"]
        assert [e["step"] for e in steps] == list(range(1, 13))
        assert {"attempt", "loss", "lr", "images_per_second", "data_wait_seconds"} <= steps[0].keys()
        assert (run / name / "curves.png").stat().st_size > 1000
    assert list((run / "pretrain" / "pictures").glob("*.png"))
    shown = json.loads(fcmae("status", run, "--json").stdout)
    assert [(s["stage"], s["state"], s["step"]) for s in shown] == [(name, "done", 12) for name in STAGES]


def test_every_start_is_timed(chain):
    told = json.loads(fcmae("times", chain[1], "--json").stdout)
    assert told["handovers"] == []
    assert [(start["stage"], start["attempt"]) for start in told["starts"]] == [(name, 1) for name in STAGES]
    for start in told["starts"]:
        began = journal.read_events(chain[1] / start["stage"] / "journal.jsonl")[0]["time"]
        laps = ["imports", "compile", "group", "data", "model", "weights", "warm-up", "first step"]
        assert list(start["laps"]) == laps
        assert sum(start["laps"].values()) == pytest.approx(start["seconds"], abs=0.01)
        assert start["cpu_seconds"] > 0
        # The process is older than its journal, but not older than its stage.
        event = next(
            e for e in journal.read_events(chain[1] / start["stage"] / "journal.jsonl") if e["kind"] == "started"
        )
        assert (chain[1] / "recipe.yaml").stat().st_mtime - 1 < event["time"] - start["seconds"] < began


def test_the_run_is_in_mlflow(chain):
    """One stage was forwarded as it ran, the others are afterwards, in this process, which has MLflow already.

    A stage waits a minute for its forwarder, which may be too short on a busy machine; forwarding again adds the rest.
    """
    import mlflow

    from pipeline.tracking.forwarder import Forwarder

    run = chain[1]
    for name in STAGES:
        forwarder = Forwarder(run / name, None, "fcmae")
        forwarder.forward()
        forwarder.close()
    client = mlflow.MlflowClient(f"sqlite:///{run}/mlflow.db")
    parent = json.loads((run / "mlflow.json").read_text())["run_id"]
    ids = {name: json.loads((run / name / "mlflow.json").read_text())["run_id"] for name in STAGES}
    assert len({parent, *ids.values()}) == 4
    for name in STAGES:
        child = client.get_run(ids[name])
        assert child.data.tags["mlflow.parentRunId"] == parent
        assert child.info.status == "FINISHED"
        assert child.data.tags["verdict"] == json.loads((run / name / "result.json").read_text())["verdict"]["sentence"]
        for metric in ("train/loss", "train/data_wait_seconds"):
            assert [m.step for m in client.get_metric_history(ids[name], metric)] == list(range(1, 13))
    assert client.get_run(parent).info.status == "FINISHED"
    files = [artifact.path for artifact in client.list_artifacts(ids["pretrain"])]
    assert any("pictures" in path or path.endswith(".png") for path in files)


def test_running_again_does_nothing(chain):
    recipe, run = chain
    before = digests(run), (run / "finetune" / "journal.jsonl").read_bytes()
    again = fcmae("run", recipe, "--out", run, "--nproc", 2, TRACKED)
    assert again.returncode == 0
    assert (digests(run), (run / "finetune" / "journal.jsonl").read_bytes()) == before


def test_killed_in_every_stage_and_stopped_once_it_ends_with_the_same_bits(chain, tmp_path, seed):
    recipe, undisturbed = chain
    run, chance = tmp_path / "run", random.Random(seed)
    for name in STAGES:
        process = start(recipe, run, 2, {name: 12})
        wait_for_step(run / name, chance.randint(1, 11))
        os.killpg(process.pid, signal.SIGKILL)  # the launcher; its ranks die with it
        process.wait()
        if name == "intermediate":
            process = start(recipe, run, 2, {name: 12})
            wait_for_step(run / name, chance.randint(1, 11), attempt=2)
            process.send_signal(signal.SIGTERM)
            _, said = process.communicate(400)
            assert process.returncode == 75, said
            assert "the same command resumes it" in said
    assert fcmae("run", recipe, "--out", run, "--nproc", 2).returncode == 0
    assert digests(run) == digests(undisturbed)


def test_a_stop_saves_the_very_step_and_loses_none(chain, tmp_path):
    recipe, undisturbed = chain
    run = tmp_path / "run"
    process = start(recipe, run, 2, {"pretrain": 12}, *ALONE)
    wait_for_step(run / "pretrain", 2)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(400)
    assert process.returncode == 75, said
    outcome = Stage(run / "pretrain").attempts.last_outcome()
    assert outcome.kind is OutcomeKind.SAVED
    reached = max(e["step"] for e in journal.read_events(run / "pretrain" / "journal.jsonl") if e["kind"] == "step")
    assert outcome.step == reached
    assert json.loads(fcmae("status", run, "--json").stdout)[0]["state"] == "saved"
    assert fcmae("run", recipe, "--out", run, "--nproc", 2, *ALONE).returncode == 0
    steps = [e["step"] for e in journal.read_events(run / "pretrain" / "journal.jsonl") if e["kind"] == "step"]
    assert steps == list(range(1, 13)), "a step was repeated or left out"
    assert weights_sha256(run / "pretrain") == weights_sha256(undisturbed / "pretrain")


def losses(stage: Path) -> list[float]:
    return [e["loss"] for e in journal.step_events(journal.read_events(stage / "journal.jsonl")).values()]


@pytest.mark.slow
def test_four_ranks_killed_and_resumed_are_bit_equal(tmp_path):
    """Two ranks cannot show it: DDP's buckets, summed in another order, give other bits from three ranks on."""
    wide = [
        "defaults.model.dims=[64,128]",
        "stages.pretrain.objective.decoder_dim=256",
        "defaults.tracking.log_every_steps=1",
    ]
    undisturbed = make_tiny_run(tmp_path / "a", wide) / "pretrain"
    assert run_stage(undisturbed, 4).kind is OutcomeKind.DONE
    recipe = tmp_path / "b" / "tiny.yaml"
    recipe.parent.mkdir()
    write_tiny_recipe(recipe.parent, wide)
    process = start(recipe, tmp_path / "b" / "run", 4, {"pretrain": 8})
    stage = tmp_path / "b" / "run" / "pretrain"
    wait_for_step(stage, 7)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert run_stage(stage, 4).kind is OutcomeKind.DONE
    assert Stage(stage).done() == Stage(undisturbed).done()
    starts = [e["step"] for e in journal.read_events(stage / "journal.jsonl") if e["kind"] == "attempt"]
    assert starts in ([0, 5], [0, 6])  # the second has the best evaluation, saved after step 6


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
@pytest.mark.parametrize(("precision", "bound"), [("fp64", 1e-10), ("fp32", 1e-4)])
def test_world_sizes_agree(tmp_path, capsys, stage, precision, bound):
    """Only the order of sums differs. In fp32 training amplifies that: the bound is generous, the figure is printed."""
    overrides = [
        f"defaults.engine.precision={precision}", f"stages.{stage}.schedule.epochs=9", "defaults.batch.micro_slots=1",
        *[f"stages.{name}=null" for name in STAGES if name != stage],
    ]  # fmt: skip
    curves = []
    for nproc in (1, 2, 4):
        run = make_tiny_run(tmp_path / str(nproc), overrides)
        assert run_stage(run / stage, nproc).kind is OutcomeKind.DONE
        curves.append(losses(run / stage))
    assert len(curves[0]) == 54
    for nproc, curve in zip((2, 4), curves[1:], strict=True):
        difference = max(abs(a - b) / abs(a) for a, b in zip(curves[0], curve, strict=True))
        with capsys.disabled():
            print(f"\n{stage} {precision}: 1 and {nproc} ranks differ by {difference:.1e} over 54 steps")
        assert difference <= bound


@pytest.mark.slow
def test_a_killed_rank_is_named_and_the_run_resumes(chain, tmp_path):
    recipe, undisturbed = chain
    run = tmp_path / "run"
    process = start(recipe, run, 2, {"pretrain": 12})
    wait_for_step(run / "pretrain", 6)
    os.kill(process.children()[1], signal.SIGKILL)
    wait_for_step(run / "pretrain", 11, attempt=2)  # by itself, and held there again
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(400)
    assert process.returncode == 75
    assert "rank 1 was killed by SIGKILL" in printed
    assert "it is retried" in printed
    assert fcmae("run", recipe, "--out", run, "--nproc", 2).returncode == 0
    assert digests(run) == digests(undisturbed)


@pytest.fixture
def starting(chain, tmp_path, request):
    """The command, whose ranks are there and have their imports before them; the parameter is their number."""
    command = [*FCMAE, "run", chain[0], "--out", tmp_path / "run", "--nproc", str(request.param)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as launcher:
        while subprocess.run(["pgrep", "-P", str(launcher.pid)], capture_output=True).returncode:
            assert launcher.poll() is None, launcher.stderr.read()
            time.sleep(0.02)
        yield launcher


@pytest.mark.parametrize("starting", [2], indirect=True)
def test_ranks_that_still_start_do_not_outlive_their_launcher(starting, tmp_path):
    stage = tmp_path / "run" / "pretrain"
    os.killpg(starting.pid, signal.SIGKILL)
    starting.wait()
    deadline = time.monotonic() + 400
    while subprocess.run(["pgrep", "-f", str(stage)], capture_output=True).stdout:
        assert time.monotonic() < deadline, "a rank goes on alone"
        time.sleep(0.1)
    assert not (stage / "journal.jsonl").exists()


@pytest.mark.slow
@pytest.mark.parametrize("starting", [1], indirect=True)
def test_a_stop_while_a_rank_still_starts_is_a_stop(starting, tmp_path):
    starting.send_signal(signal.SIGINT)
    _, said = starting.communicate(timeout=400)
    assert starting.returncode == 75, said
    assert Stage(tmp_path / "run" / "pretrain").attempts.last_outcome().step == 0
