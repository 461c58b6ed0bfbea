"""The forwarder as a process with real MLflow databases: kills, resumes, outages."""

import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.tracking.forwarder import Forwarder, flat
from pipeline.tracking.forwarder_process import ForwarderProcess, start_forwarder
from pipeline.tracking.journal import Journal

WAIT_SECONDS = 400.0  # on a busy machine the forwarder, at low priority, needs minutes to import MLflow


@pytest.fixture(autouse=True, scope="module")
def _quiet() -> None:
    """MLflow is imported here, because only the worker that runs this file needs it."""
    global mlflow
    mlflow = pytest.importorskip("mlflow")
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An initialised database. Making one takes seconds, so tests copy it."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    mlflow.MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


def make_run(run: Path, *stages: str) -> list[Path]:
    run.mkdir()
    (run / "recipe.yaml").write_text(f"name: tiny\nstages: {{{', '.join(f'{s}: {{}}' for s in stages)}}}\n")
    for stage in stages:
        (run / stage).mkdir()
        (run / stage / "recipe.yaml").write_text(f"optimizer: {{lr: 0.001, betas: [0.9, 0.95]}}\nnote: {'n' * 9000}\n")
    return [run / stage for stage in stages]


def train(journal: Journal, start: int, stop: int) -> None:
    journal.write("attempt", step=start, total_steps=100, world_size=1, global_batch=8, objective="fcmae", device="cpu")
    for step in range(start + 1, stop + 1):
        journal.write("step", step=step, loss=1 / step, lr=0.1, images_per_second=10.0, note="text is no metric")
        if step % 10 == 0:
            journal.write("evaluate", step=step, metrics={"loss": 2 / step})


def points(run: Path, child: str, key: str) -> list[int]:
    return sorted(m.step for m in mlflow.MlflowClient(f"sqlite:///{run}/mlflow.db").get_metric_history(child, key))


def runs(run: Path) -> dict[str, "mlflow.entities.Run"]:
    client = mlflow.MlflowClient(f"sqlite:///{run}/mlflow.db")
    experiment = client.get_experiment_by_name("fcmae")
    found = client.search_runs([experiment.experiment_id])
    assert len({r.info.run_name for r in found}) == len(found)
    return {r.info.run_name: r for r in found}


def wait_until(true: object, seconds: float = WAIT_SECONDS) -> None:
    end = time.monotonic() + seconds
    while not true():  # type: ignore[operator]
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


def rows(run: Path) -> int:
    try:
        database = sqlite3.connect(f"file:{run}/mlflow.db?mode=ro", uri=True)
        return database.execute("select count(*) from metrics").fetchone()[0]
    except sqlite3.OperationalError:
        return 0


@pytest.mark.slow
def test_kill_rewind_and_resume_keep_one_child_without_duplicates(tmp_path: Path, empty_store: Path) -> None:
    run = tmp_path / "run"
    first, last = make_run(run, "pretrain", "finetune")
    shutil.copy(empty_store, run / "mlflow.db")
    with Journal(first / "journal.jsonl", 1) as journal:
        handle = start_forwarder(first)
        train(journal, 0, 40)
        wait_until(lambda: rows(run) > 0)
        handle.process.send_signal(signal.SIGKILL)
        train(journal, 40, 60)
        assert handle.finish(5) is False
    (child,) = [r.info.run_id for name, r in runs(run).items() if name == "pretrain"]
    assert runs(run)["pretrain"].info.status == "RUNNING"
    # Simulate a kill between logging and recording that: the same events are sent again.
    (first / "mlflow.json").write_text(f'{{"run_id": "{child}", "logged": {{}}}}')

    with Journal(first / "journal.jsonl", 2) as journal:
        handle = start_forwarder(first)
        train(journal, 30, 80)
        picture = first / "pictures" / "step.png"
        picture.parent.mkdir()
        picture.write_bytes(b"png")
        journal.write("picture", step=80, path="pictures/step.png")
        journal.write("picture", step=80, path="pictures/gone.png")
        journal.write("end", outcome="saved", reason="SIGTERM", step=80)
        assert handle.finish(WAIT_SECONDS) is True
        assert handle.finish(WAIT_SECONDS) is True
    assert points(run, child, "train/loss") == list(range(1, 81))
    assert points(run, child, "evaluate/loss") == list(range(10, 81, 10))
    found = runs(run)
    assert found["pretrain"].info.run_id == child
    assert found["pretrain"].info.status == found["tiny"].info.status == "KILLED"
    assert found["pretrain"].data.tags["outcome"] == "saved"
    assert found["pretrain"].data.tags["attempt"] == "2"
    assert found["pretrain"].data.tags["mlflow.parentRunId"] == found["tiny"].info.run_id
    assert found["pretrain"].data.params["optimizer.lr"] == "0.001"
    assert len(found["pretrain"].data.params["note"]) == 6000
    assert "train/note" not in found["pretrain"].data.metrics
    assert (run / "mlartifacts" / child / "artifacts" / "pictures" / "step.png").read_bytes() == b"png"

    (first / "recipe.yaml").write_text("optimizer: {lr: 0.002}\n")  # a changed parameter must not stop the forwarder
    with Journal(first / "journal.jsonl", 3) as journal:
        handle = start_forwarder(first)
        train(journal, 80, 100)
        (first / "curves.png").write_bytes(b"curves")
        journal.write("end", outcome="done", reason="all steps", step=100)
        assert handle.finish(WAIT_SECONDS) is True
    found = runs(run)
    assert (found["pretrain"].info.run_id, found["pretrain"].info.status) == (child, "FINISHED")
    assert found["tiny"].info.status == "RUNNING"  # one stage is still to come
    assert points(run, child, "train/loss") == list(range(1, 101))
    assert {p.name for p in (run / "mlartifacts" / child / "artifacts").iterdir()} == {
        "curves.png", "events.jsonl", "pictures", "recipe.yaml",
    }  # fmt: skip

    with Journal(last / "journal.jsonl", 1) as journal:
        train(journal, 0, 3)
        journal.write("end", outcome="done", reason="all steps", step=3)
    by_hand = [sys.executable, "-m", "pipeline.tracking.forwarder", str(last)]
    assert subprocess.run(by_hand, stdin=subprocess.DEVNULL, timeout=WAIT_SECONDS).returncode == 0
    assert set(runs(run)) == {"tiny", "pretrain", "finetune"}
    assert {r.info.status for r in runs(run).values()} == {"FINISHED"}


@pytest.mark.slow
def test_two_stages_at_once_make_one_database_and_one_parent(tmp_path: Path) -> None:
    stages = make_run(tmp_path / "run", "a", "b")
    for stage in stages:
        with Journal(stage / "journal.jsonl", 1) as journal:
            train(journal, 0, 5)
            journal.write("end", outcome="done", reason="", step=5)
    handles = [start_forwarder(stage) for stage in stages]
    assert [handle.finish(WAIT_SECONDS) for handle in handles] == [True] * 2
    found = runs(tmp_path / "run")
    assert set(found) == {"tiny", "a", "b"}
    assert {found[s].data.tags["mlflow.parentRunId"] for s in "ab"} == {found["tiny"].info.run_id}


def test_it_ends_by_itself_when_rank_zero_is_gone(tmp_path: Path, empty_store: Path) -> None:
    """Also while a forked child of rank 0 holds the other end of the pipe."""
    (stage,) = make_run(tmp_path / "run", "pretrain")
    shutil.copy(empty_store, tmp_path / "run" / "mlflow.db")
    with Journal(stage / "journal.jsonl", 1) as journal:
        train(journal, 0, 20)
    program = (
        "import os, sys, time\nfrom pipeline.tracking.forwarder_process import start_forwarder\n"
        "forwarder, worker = start_forwarder(sys.argv[1]).process.pid, os.fork()\n"
        "if worker: print(forwarder, worker, flush=True)\n"
        "time.sleep(900)"
    )
    rank_zero = subprocess.Popen([sys.executable, "-c", program, str(stage)], stdout=subprocess.PIPE, text=True)
    assert rank_zero.stdout is not None
    forwarder, worker = map(int, rank_zero.stdout.readline().split())
    wait_until((stage / "mlflow.lock").exists)
    try:
        os.kill(forwarder, signal.SIGTERM)  # schedulers signal all processes; the forwarder must continue
        rank_zero.kill()
        rank_zero.wait()
        wait_until(lambda: _ended(forwarder))
    finally:
        os.kill(worker, signal.SIGKILL)
    found = runs(tmp_path / "run")["pretrain"]
    assert (found.info.status, found.data.tags["outcome"]) == ("KILLED", "interrupted")
    assert points(tmp_path / "run", found.info.run_id, "train/loss") == list(range(1, 21))


def _ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def start(stage: Path, *options: str, before: str = "") -> ForwarderProcess:
    program = f"import sys; {before}sys.argv[1:] = {[str(stage), *options]!r}; " + (
        "from pipeline.tracking.forwarder import main; main()"
    )
    with (stage / "stderr").open("w") as errors:
        return ForwarderProcess(subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stderr=errors))


@pytest.mark.slow
def test_an_outage_is_one_line_and_nothing_is_lost(tmp_path: Path, empty_store: Path) -> None:
    (stage,) = make_run(tmp_path / "run", "pretrain")
    away = tmp_path / "away" / "mlflow.db"
    away.parent.write_text("a file where the folder of the store should be")
    with Journal(stage / "journal.jsonl", 1) as journal:
        handle = start(stage, "--uri", f"sqlite:///{away}", "--poll-seconds", "0.2")
        train(journal, 0, 7)
        wait_until(lambda: (stage / "stderr").read_text().endswith("\n"))
        time.sleep(1)  # for some more failing attempts
        (tmp_path / "back").mkdir()
        shutil.copy(empty_store, tmp_path / "back" / "mlflow.db")
        away.parent.unlink()
        (tmp_path / "back").rename(away.parent)
        journal.write("end", outcome="permanent", reason="diverged", step=7)
        assert handle.finish(WAIT_SECONDS) is True
    lines = (stage / "stderr").read_text().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("tracking: MLflow at sqlite:///")
    client = mlflow.MlflowClient(f"sqlite:///{away}")
    (child,) = client.search_runs([client.get_experiment_by_name("fcmae").experiment_id], "tags.outcome = 'permanent'")
    assert child.info.status == "FAILED"
    assert len(client.get_metric_history(child.info.run_id, "train/loss")) == 7


@pytest.mark.parametrize(
    ("options", "before", "sentence"),
    [
        (["--uri", "http://127.0.0.1:9", "--drain-seconds", "1"], "", "does not take the journal, trying again"),
        ([], "sys.modules['mlflow'] = None; ", "MLflow cannot be imported"),
    ],
    ids=["unreachable", "absent"],
)
def test_no_mlflow_is_a_sentence_and_not_a_hang(tmp_path: Path, options: list[str], before: str, sentence: str) -> None:
    (stage,) = make_run(tmp_path / "run", "pretrain")
    with Journal(stage / "journal.jsonl", 1) as journal:
        handle = start(stage, *options, before=before)
        train(journal, 0, 2)
        assert handle.finish(WAIT_SECONDS) is False
    errors = (stage / "stderr").read_text()
    assert errors.count(sentence) == 1
    assert "Traceback" not in errors


def test_a_finish_that_takes_too_long_is_cut_off(tmp_path: Path) -> None:
    (stage,) = make_run(tmp_path / "run", "pretrain")
    handle = start(stage, "--uri", "http://127.0.0.1:9")
    assert handle.finish(1.0) is False
    assert handle.process.returncode == -signal.SIGKILL


def test_a_server_that_hangs_is_waited_for_for_seconds_and_named(tmp_path: Path) -> None:
    """It accepts connections and says nothing: MLflow's own time-out is 20 s, and it asks again and again."""
    (stage,) = make_run(tmp_path / "run", "pretrain")
    said: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as server, Journal(stage / "journal.jsonl", 1) as journal:
        uri = f"http://127.0.0.1:{server.getsockname()[1]}"
        handle = start(stage, "--uri", uri, "--server-drain-seconds", "4")  # longer than the two seconds without a word
        handle.uri = uri
        train(journal, 0, 2)
        assert handle.finish(WAIT_SECONDS, said.append) is False
    assert handle.process.returncode == 1  # it ended by itself
    assert said == [f"waiting for MLflow ({uri}) to take the rest of the journal, for at most 10 s"]
    last = (stage / "stderr").read_text().splitlines()[-1]
    assert "is not in MLflow (it did not answer in time); the next attempt forwards it, or afterwards `" in last
    assert last.endswith(f"-P -m pipeline.tracking.forwarder {stage} </dev/null`")


def forward_all(stage: Path) -> str:
    """Forward the journal within this process, as if in a process of its own; the id of the stage's run."""
    from mlflow.tracking._tracking_service import utils

    utils._artifact_repos_cache.clear()
    forwarder = Forwarder(stage, None, "fcmae")
    forwarder.forward()
    forwarder.close()
    return forwarder.child


def test_artifacts_of_a_moved_or_copied_run_lie_beside_it(tmp_path: Path, empty_store: Path) -> None:
    """MLflow's database holds absolute paths; the old directory was made again."""
    (stage,) = make_run(tmp_path / "a run", "pretrain")
    shutil.copy(empty_store, tmp_path / "a run" / "mlflow.db")
    with Journal(stage / "journal.jsonl", 1) as journal:
        train(journal, 0, 3)
    child = forward_all(stage)
    shutil.copytree(tmp_path / "a run", tmp_path / "copy")
    (tmp_path / "a run").rename(tmp_path / "moved")
    for run in (tmp_path / "moved", tmp_path / "copy"):
        (run / "pretrain" / "curves.png").write_bytes(run.name.encode())
        assert forward_all(run / "pretrain") == child
        assert (run / "mlartifacts" / child / "artifacts" / "curves.png").read_bytes() == run.name.encode()
        client = mlflow.MlflowClient(f"sqlite:///{run}/mlflow.db")
        assert {file.path for file in client.list_artifacts(child)} == {"curves.png", "events.jsonl", "recipe.yaml"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "moved"]


def test_a_deleted_experiment_names_the_remedy(tmp_path: Path, empty_store: Path) -> None:
    (stage,) = make_run(tmp_path / "run", "pretrain")
    shutil.copy(empty_store, tmp_path / "run" / "mlflow.db")
    with Journal(stage / "journal.jsonl", 1) as journal:
        train(journal, 0, 3)
    child = forward_all(stage)
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/run/mlflow.db")
    id = client.get_experiment_by_name("fcmae").experiment_id
    client.delete_experiment(id)
    remedy = (
        rf"experiment fcmae was deleted; restore it with `.*restore --experiment-id {id}`, or set tracking.experiment"
    )
    with pytest.raises(UserError, match=remedy):
        forward_all(stage)
    client.restore_experiment(id)
    assert forward_all(stage) == child


def test_flat_names_every_leaf() -> None:
    assert dict(flat({"a": {"b": 1, "c": [1, 2]}, "d": None, "e(x)": ""})) == {
        "a.b": "1", "a.c": "[1, 2]", "d": "None", "e_x_": "",
    }  # fmt: skip
