"""Feeds MLflow from the journal, in a process of its own: training never waits for a tracker and never fails by one.

    python -m pipeline.tracking.forwarder STAGE_DIR [--uri URI] [--experiment NAME]

Run by hand with `</dev/null` it catches up and ends: for tracking servers that compute nodes cannot reach.

One MLflow run per chain (its id in RUN_DIR/mlflow.json) and below it one per stage (STAGE_DIR/mlflow.json), kept
through every resume. The forwarder always reads the journal from its first line and skips steps that are logged, so
nothing is missing after an outage and nothing is there twice after a rewind (the first line of a step counts here; the
journal has them all). Metrics carry the time of their journal line, and MLflow's databases take the same key, step,
time and value only once: a kill between logging and noting it is harmless.
"""

import argparse
import contextlib
import fcntl
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from pipeline.storage.file_names import CURVES_FILE, JOURNAL_FILE, RECIPE_FILE
from pipeline.storage.folder import write_json
from pipeline.tracking.journal import Event, Tail, is_number

POLL_SECONDS = 3.0
DRAIN_SECONDS = 60.0
BATCH_METRICS = 1000  # MLflow's limits: metrics of a request, parameters of a request, length of a parameter
BATCH_PARAMS = 100
PARAM_LENGTH = 6000
STATUS_OF_OUTCOME = {"done": "FINISHED", "permanent": "FAILED"}  # all others: KILLED, to be resumed


class Handle:
    """The forwarder process of this attempt, as rank 0 sees it."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process

    def finish(self, timeout_seconds: float = DRAIN_SECONDS) -> bool:
        """Asks for the rest of the journal to be logged and waits; False if it was not (the next attempt will)."""
        if self.process.poll() is None:
            try:
                self.process.communicate(b"\n", timeout_seconds)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        return self.process.returncode == 0


def start_forwarder(stage_dir: str | Path, uri: str | None = None, experiment: str = "fcmae") -> Handle:
    """Starts the forwarder of a stage. It ends with `Handle.finish`, or by itself when this process is gone.

    uri: any MLflow tracking URI; None is `sqlite:///RUN_DIR/mlflow.db`. Artifacts of a sqlite database lie beside it in
    `mlartifacts`; a server puts them where it was told to.
    """
    command = [sys.executable, "-m", "pipeline.tracking.forwarder", str(stage_dir), "--experiment", experiment]
    if uri:
        command += ["--uri", uri]
    # Of its own session, so that an interrupt typed at the terminal reaches the training alone.
    return Handle(subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True))


class Forwarder:
    """One connection to MLflow and what is still to be sent over it. `once` and `close` may be repeated."""

    def __init__(self, stage_dir: Path, uri: str | None, experiment: str) -> None:
        self.stage_dir, self.run_dir = stage_dir, stage_dir.parent
        self.uri = uri or f"sqlite:///{self.run_dir}/mlflow.db"
        self.experiment = experiment
        self.tail = Tail(stage_dir / JOURNAL_FILE)
        self.pending: list[Event] = []
        self.pictures: list[Event] = []
        self.tags: dict[str, str] = {}
        self.messages: list[str] = []
        self.last: Event = {}  # the newest "attempt" or "end"
        self.client: Any = None
        self.parent = self.child = ""
        self.logged: dict[str, int] = {}  # family of metrics -> last step in MLflow

    # -- runs ---------------------------------------------------------------------------------------------------

    def connect(self) -> None:
        from mlflow import MlflowClient

        artifacts = None  # a server knows where to put them
        if self.uri.startswith("sqlite:///"):
            database = Path(self.uri.removeprefix("sqlite:///"))
            artifacts = (database.resolve().parent / "mlartifacts").as_uri()
            create_database(database)
        client = MlflowClient(tracking_uri=self.uri)
        with locked(self.run_dir / "mlflow.lock"):
            found = client.get_experiment_by_name(self.experiment)
            experiment = found.experiment_id if found else client.create_experiment(self.experiment, artifacts)
            name = str(_yaml(self.run_dir / RECIPE_FILE).get("name") or self.run_dir.name)
            self.parent, _ = open_run(client, self.run_dir / "mlflow.json", experiment, name, {})
        tags = {"mlflow.parentRunId": self.parent}
        self.child, state = open_run(client, self.stage_dir / "mlflow.json", experiment, self.stage_dir.name, tags)
        self.logged = dict(state.get("logged", {}))
        self.log_recipe(client)
        self.client = client

    def log_recipe(self, client: Any) -> None:
        from mlflow.entities import Param

        recipe = self.stage_dir / RECIPE_FILE
        there = client.get_run(self.child).data.params  # a parameter cannot be changed; the artifact has today's value
        params = [Param(k[:250], v[:PARAM_LENGTH]) for k, v in flat(_yaml(recipe)) if k[:250] not in there]
        for start in range(0, len(params), BATCH_PARAMS):
            client.log_batch(self.child, params=params[start : start + BATCH_PARAMS])
        if recipe.exists():
            client.log_artifact(self.child, str(recipe))

    # -- what the journal says ----------------------------------------------------------------------------------

    def once(self) -> None:
        """Logs all that the journal has by now."""
        if self.client is None:
            self.connect()
        self.pending += self.tail.poll()
        while self.pending:
            self.send()
        while self.tags:
            key, value = next(iter(self.tags.items()))
            self.client.set_tag(self.child, key, value[:PARAM_LENGTH])
            del self.tags[key]
        while self.pictures:
            self.send_picture(self.pictures[0])
            del self.pictures[0]

    def send(self) -> None:
        """One request with the metrics of as many pending lines as it can take."""
        from mlflow.entities import Metric

        metrics: list[Metric] = []
        logged, taken = dict(self.logged), 0
        for event in self.pending:
            family, values = metrics_of(event)
            step, seconds = event.get("step"), event.get("time")
            if values and isinstance(step, int) and isinstance(seconds, float) and step > logged.get(family, -1):
                if taken and len(metrics) + len(values) > BATCH_METRICS:
                    break
                at = int(seconds * 1000)
                metrics += [Metric(f"{family}/{k}"[:250], v, at, step) for k, v in values[:BATCH_METRICS]]
                logged[family] = step
            taken += 1
        if metrics:
            self.client.log_batch(self.child, metrics=metrics)
            self.note(logged)
        for event in self.pending[:taken]:
            self.take(event)
        del self.pending[:taken]

    def take(self, event: Event) -> None:
        kind = event.get("kind")
        if kind == "attempt":
            for key in ("attempt", "world_size", "global_batch", "objective", "device", "versions"):
                if key in event:
                    self.tags[key] = event[key] if isinstance(event[key], str) else json.dumps(event[key])
        if kind == "verdict":
            self.tags["verdict"] = str(event.get("sentence"))
        if kind in ("attempt", "end"):
            self.last = event
        if kind == "picture" and isinstance(event.get("step"), int) and event["step"] >= self.logged.get("picture", 0):
            self.pictures.append(event)
        if kind in ("event", "attempt", "rollback", "handoff", "verdict", "end"):
            self.messages.append(json.dumps(event, ensure_ascii=False))

    def send_picture(self, event: Event) -> None:
        path = self.stage_dir / str(event.get("path"))
        if path.is_file() and path.is_relative_to(self.stage_dir):
            folder = path.parent.relative_to(self.stage_dir).as_posix()
            self.client.log_artifact(self.child, str(path), None if folder == "." else folder)
        self.note({**self.logged, "picture": max(event["step"], self.logged.get("picture", 0))})

    def note(self, logged: dict[str, int]) -> None:
        self.logged = logged
        write_json(self.stage_dir / "mlflow.json", {"run_id": self.child, "logged": logged})

    def close(self) -> None:
        """Sets the statuses and logs what belongs to the end; called when nothing is pending."""
        if self.messages:
            self.client.log_text(self.child, "\n".join(self.messages) + "\n", "events.jsonl")
        if (self.stage_dir / CURVES_FILE).is_file():
            self.client.log_artifact(self.child, str(self.stage_dir / CURVES_FILE))
        ended = self.last
        if ended.get("kind") != "end":
            ended = {"outcome": "interrupted", "reason": "the attempt wrote no end"}
        for key in ("outcome", "reason"):
            self.client.set_tag(self.child, key, str(ended.get(key))[:PARAM_LENGTH])
        status = STATUS_OF_OUTCOME.get(str(ended.get("outcome")), "KILLED")
        self.client.set_terminated(self.child, status)
        stages = list(_yaml(self.run_dir / RECIPE_FILE).get("stages") or [])
        if status != "FINISHED" or self.stage_dir.name in stages[-1:]:
            self.client.set_terminated(self.parent, status)


def create_database(path: Path) -> None:
    """Makes the database under another name and links it into place: of several processes that create one database
    at its own name two break it, and one that is killed leaves a database that never opens again."""
    from mlflow import MlflowClient

    if not path.exists():
        part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
        try:
            MlflowClient(tracking_uri=f"sqlite:///{part}").search_experiments()
            with contextlib.suppress(FileExistsError):
                os.link(part, path)
        finally:
            part.unlink(missing_ok=True)


def open_run(client: Any, path: Path, experiment: str, name: str, tags: dict[str, str]) -> tuple[str, dict[str, Any]]:
    """The run named in the file `path`, running again; a new one if there is none or the store does not know it."""
    from mlflow.exceptions import MlflowException

    state = json.loads(path.read_text()) if path.exists() else {}
    if "run_id" in state:
        try:
            if client.get_run(state["run_id"]).info.lifecycle_stage == "active":
                client.update_run(state["run_id"], status="RUNNING")
                return state["run_id"], state
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
        say(f"MLflow does not know run {state['run_id']} of {path}; a new one takes its place")
        state = {}
    # The key goes to disk before the run is created: after a kill in between the run is found again by it.
    key = state.get("key") or uuid.uuid4().hex
    write_json(path, {"key": key})
    found = client.search_runs([experiment], f"tags.`fcmae.key` = '{key}'")
    run = found[0] if found else client.create_run(experiment, run_name=name, tags={**tags, "fcmae.key": key})
    state = {"run_id": run.info.run_id, "logged": {}}
    write_json(path, state)
    return run.info.run_id, state


def metrics_of(event: Event) -> tuple[str, list[tuple[str, float]]]:
    """(family, [(name, value)]) of a journal line; nothing for a line without numbers to plot."""
    match event.get("kind"):
        case "step":
            family, values = "train", {k: v for k, v in event.items() if k not in ("kind", "time", "attempt", "step")}
        case "evaluate":
            family, values = "evaluate", event.get("metrics")
        case "save":
            family, values = "save", {"seconds": event.get("seconds")}
        case _:
            return "", []
    if not isinstance(values, dict):
        return family, []
    numbers = [(k, v) for k, v in values.items() if is_number(v)]
    return family, [(re.sub(r"[^\w\-. /:]", "_", k, flags=re.ASCII), float(v)) for k, v in numbers]


def flat(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """("optimizer.lr", "0.001") for every leaf of a nested recipe."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from flat(item, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield re.sub(r"[^\w\-. /:]", "_", prefix, flags=re.ASCII), str(value)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _yaml(path: Path) -> dict[str, Any]:
    value = yaml.safe_load(path.read_text()) if path.exists() else None
    return value if isinstance(value, dict) else {}


def say(sentence: str) -> None:
    print(f"tracking: {sentence}", file=sys.stderr, flush=True)


def follow(stage_dir: Path, uri: str | None, experiment: str, poll_seconds: float, drain_seconds: float) -> int:
    """Forwards until told to finish or left alone, then the rest, for `drain_seconds` at most; 0 if all is logged."""
    forwarder = Forwarder(stage_dir, uri, experiment)
    rank_zero = os.getppid()
    give_up_at, silent, pause_seconds = None, False, 0.0
    with (stage_dir / "mlflow.lock").open("a") as lock:
        while True:
            # A line on stdin: finish. Its end, or another parent: rank 0 is gone (a forked worker may keep the pipe).
            told = bool(select.select([sys.stdin], [], [], pause_seconds)[0]) or os.getppid() != rank_zero
            if told and give_up_at is None:
                give_up_at = time.monotonic() + drain_seconds
            pause_seconds = poll_seconds
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the one of a killed attempt may still be draining
                forwarder.once()
                silent = False
                if told:
                    forwarder.close()
                    return 0
            except ImportError as error:
                packages = "mlflow-skinny, sqlalchemy and alembic"
                say(f"MLflow cannot be imported ({error}); install {packages}, or set tracking.mlflow=false")
                return 1
            except Exception as error:
                if not silent and not isinstance(error, BlockingIOError):
                    say(f"MLflow at {forwarder.uri} does not take the journal, trying again: {_first_line(error)}")
                    silent = True
                if give_up_at is not None and time.monotonic() > give_up_at:
                    say(f"the rest of {stage_dir / 'journal.jsonl'} is not in MLflow; the next attempt forwards it")
                    return 1
                if told:
                    time.sleep(1.0)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"


def main() -> None:
    # A scheduler signals every process of a job; this one has to log the save that the signal brings about.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage_dir", type=lambda text: Path(text).resolve())
    parser.add_argument("--uri")
    parser.add_argument("--experiment", default="fcmae")
    parser.add_argument("--poll-seconds", type=float, default=POLL_SECONDS)
    parser.add_argument("--drain-seconds", type=float, default=DRAIN_SECONDS)
    options = parser.parse_args()
    os.nice(10)  # the cores belong to training
    warnings.simplefilter("ignore")  # alembic's and sqlalchemy's, at each start
    os.environ.update(
        MLFLOW_DISABLE_TELEMETRY="true", MLFLOW_LOGGING_LEVEL="ERROR", OMP_NUM_THREADS="1",
        MLFLOW_HTTP_REQUEST_MAX_RETRIES="1", MLFLOW_HTTP_REQUEST_TIMEOUT="20",
    )  # fmt: skip
    sys.exit(follow(options.stage_dir, options.uri, options.experiment, options.poll_seconds, options.drain_seconds))


if __name__ == "__main__":
    main()
