"""Forward a stage's journal to MLflow, in a separate process: training never waits for MLflow or fails with it.

    python -P -m pipeline.tracking.forwarder STAGE_DIR [--uri URI] [--experiment NAME]

Run by hand with `</dev/null`, it forwards what is missing and ends. Use this for servers that compute nodes cannot
reach, and after an outage. URI and NAME are those of the recipe, unless given.

There is one MLflow run per chain (its id is in RUN_DIR/mlflow.json) and below it one per stage (STAGE_DIR/mlflow.json);
a resume continues both. The forwarder always reads the journal from its first line and skips steps that are logged, so
no step is lost in an outage and none is logged twice after a resume or rollback: MLflow keeps the first line of a step,
the journal keeps all. Metrics carry the time of their journal line, and MLflow's databases store the same key, step,
time and value only once, so a kill between logging a step and recording that is harmless.
"""

import argparse
import contextlib
import fcntl
import json
import os
import re
import select
import shlex
import signal
import sys
import threading
import time
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.distributed.processes import module_command
from pipeline.errors import UserError, first_line
from pipeline.storage.bounded_files import read_yaml
from pipeline.storage.file_names import CURVES_FILE, JOURNAL_FILE, RECIPE_FILE
from pipeline.storage.folder import write_json
from pipeline.storage.run_records import is_count, read_record, text_of
from pipeline.tracking.forwarder_process import DRAIN_SECONDS
from pipeline.tracking.journal import Event, Tail, is_number
from pipeline.tracking.mlflow_store import (
    DATABASE_FILE,
    artifacts_beside,
    bring_artifacts_home,
    create_database,
)
from pipeline.url_secrets import find_secret, redact, redact_tracebacks

POLL_SECONDS = 3.0
BATCH_METRICS = 1000  # MLflow's limit of metrics per request
BATCH_PARAMS = 100  # MLflow's limit of parameters per request
PARAM_LENGTH = 6000  # MLflow's limit of characters per parameter
STATUS_OF_OUTCOME = {"done": "FINISHED", "permanent": "FAILED"}  # all other outcomes can be resumed: KILLED


class Forwarder:
    """A connection to MLflow, and what is still to be sent. `forward` and `close` may be repeated after an error."""

    def __init__(self, stage_dir: Path, uri: str | None, experiment: str) -> None:
        self.stage_dir, self.run_dir = stage_dir, stage_dir.parent
        self.uri = uri or f"sqlite:///{self.run_dir}/{DATABASE_FILE}"
        self.experiment = experiment
        self.tail = Tail(stage_dir / JOURNAL_FILE)
        self.pending: list[Event] = []
        self.pictures: list[Event] = []
        self.tags: dict[str, str] = {}
        self.messages: list[str] = []
        self.last: Event = {}  # the newest "attempt" or "end" event
        self.client: Any = None
        self.imported = threading.Event()
        self.parent = self.child = ""  # ids of the chain's run and the stage's run
        self.logged: dict[str, int] = {}  # of each family of metrics the last step in MLflow

    # -- runs ---------------------------------------------------------------------------------------------------

    def connect(self) -> None:
        """Open or create both runs, and log the recipe."""
        from mlflow import MlflowClient

        self.imported.set()
        artifacts = None  # a server has its own place
        if self.uri.startswith("sqlite:///"):
            database = Path(self.uri.removeprefix("sqlite:///"))
            artifacts = artifacts_beside(database)
            create_database(database)
        client = MlflowClient(tracking_uri=self.uri)
        with locked(self.run_dir / "mlflow.lock"):
            bring_artifacts_home(self.run_dir / DATABASE_FILE)
            known = client.get_experiment_by_name(self.experiment)
            if known and known.lifecycle_stage == "deleted":
                raise UserError(
                    f"its experiment {self.experiment} was deleted; restore it with `MLFLOW_TRACKING_URI={self.uri}"
                    f" mlflow experiments restore --experiment-id {known.experiment_id}`, or set tracking.experiment to"
                    " another name"
                )
            experiment = known.experiment_id if known else client.create_experiment(self.experiment, artifacts)
            name = str(_yaml(self.run_dir / RECIPE_FILE).get("name") or self.run_dir.name)
            self.parent, _ = open_run(client, self.run_dir / "mlflow.json", experiment, name, {})
        tags = {"mlflow.parentRunId": self.parent}
        self.child, state = open_run(client, self.stage_dir / "mlflow.json", experiment, self.stage_dir.name, tags)
        self.logged = dict(state.get("logged", {}))
        self.log_recipe(client)
        self.client = client

    def log_recipe(self, client: Any) -> None:
        """Log the recipe as an artifact, and those of its fields that are not yet parameters."""
        from mlflow.entities import Param

        recipe = self.stage_dir / RECIPE_FILE
        logged = client.get_run(self.child).data.params  # MLflow refuses to change these; the artifact is up to date
        params = [Param(k[:250], v[:PARAM_LENGTH]) for k, v in flat(_yaml(recipe)) if k[:250] not in logged]
        for start in range(0, len(params), BATCH_PARAMS):
            client.log_batch(self.child, params=params[start : start + BATCH_PARAMS])
        if recipe.exists():
            client.log_artifact(self.child, str(recipe))

    # -- events -------------------------------------------------------------------------------------------------

    def forward(self) -> None:
        """Log all events that the journal has by now."""
        if self.client is None:
            self.connect()
        self.pending += self.tail.poll()
        while self.pending:
            self.send_metrics()
        while self.tags:
            key, value = next(iter(self.tags.items()))
            self.client.set_tag(self.child, key, value[:PARAM_LENGTH])
            del self.tags[key]
        while self.pictures:
            self.send_picture(self.pictures[0])
            del self.pictures[0]

    def send_metrics(self) -> None:
        """Send one request with the metrics of as many pending events as fit in it."""
        from mlflow.entities import Metric

        metrics: list[Metric] = []
        logged, count = dict(self.logged), 0
        for event in self.pending:
            family, values = metrics_of(event)
            step, seconds = event.get("step"), event.get("time")
            if values and isinstance(step, int) and isinstance(seconds, float) and step > logged.get(family, -1):
                if count and len(metrics) + len(values) > BATCH_METRICS:
                    break
                at = int(seconds * 1000)
                metrics += [Metric(f"{family}/{k}"[:250], v, at, step) for k, v in values[:BATCH_METRICS]]
                logged[family] = step
            count += 1
        if metrics:
            self.client.log_batch(self.child, metrics=metrics)
            self.save_progress(logged)
        for event in self.pending[:count]:
            self.collect(event)
        del self.pending[:count]

    def collect(self, event: Event) -> None:
        """Remember the tags, pictures and messages of an event, to be sent later."""
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
        self.save_progress({**self.logged, "picture": max(event["step"], self.logged.get("picture", 0))})

    def warn_of_rest(self, reason: str) -> None:
        """Say what is not in MLflow, why, and how it gets there."""
        command = shlex.join(module_command("pipeline.tracking.forwarder", self.stage_dir))
        warn(
            f"the rest of {self.stage_dir / JOURNAL_FILE} is not in MLflow ({reason}); the next attempt forwards it, or"
            f" afterwards `{command} </dev/null`"
        )

    def save_progress(self, logged: dict[str, int]) -> None:
        """Save which steps MLflow has."""
        self.logged = logged
        write_json(self.stage_dir / "mlflow.json", {"run_id": self.child, "logged": logged})

    def close(self) -> None:
        """Log messages and curves and set the statuses of the runs; call it when nothing is pending."""
        if self.messages:
            self.client.log_text(self.child, "\n".join(self.messages) + "\n", "events.jsonl")
        if (self.stage_dir / CURVES_FILE).is_file():
            self.client.log_artifact(self.child, str(self.stage_dir / CURVES_FILE))
        end = self.last
        if end.get("kind") != "end":
            end = {"outcome": "interrupted", "reason": "the attempt wrote no end"}
        for key in ("outcome", "reason"):
            self.client.set_tag(self.child, key, str(end.get(key))[:PARAM_LENGTH])
        status = STATUS_OF_OUTCOME.get(str(end.get("outcome")), "KILLED")
        self.client.set_terminated(self.child, status)
        stages = list(_yaml(self.run_dir / RECIPE_FILE).get("stages") or [])
        if status != "FINISHED" or self.stage_dir.name in stages[-1:]:
            self.client.set_terminated(self.parent, status)


def open_run(client: Any, path: Path, experiment: str, name: str, tags: dict[str, str]) -> tuple[str, dict[str, Any]]:
    """Reopen the run named in the file `path`, or create one if there is none or MLflow does not know it.

    Returns the run's id and the content of the file.
    """
    from mlflow.exceptions import MlflowException

    state = read_record(path)
    logged = state.get("logged")
    state["logged"] = {k: v for k, v in logged.items() if is_count(v)} if isinstance(logged, dict) else {}
    if text_of(state, "run_id"):
        try:
            if client.get_run(state["run_id"]).info.lifecycle_stage == "active":
                client.update_run(state["run_id"], status="RUNNING")
                return state["run_id"], state
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
        warn(f"MLflow does not know run {state['run_id']} of {path}; a new one takes its place")
        state = {}
    # The key is on disk before the run is created, so that a run is found by its key after a kill in between.
    key = re.sub("[^0-9a-f]", "", text_of(state, "key") or "") or uuid.uuid4().hex
    write_json(path, {"key": key})
    runs = client.search_runs([experiment], f"tags.`fcmae.key` = '{key}'")
    run = runs[0] if runs else client.create_run(experiment, run_name=name, tags={**tags, "fcmae.key": key})
    state = {"run_id": run.info.run_id, "logged": {}}
    write_json(path, state)
    return run.info.run_id, state


def metrics_of(event: Event) -> tuple[str, list[tuple[str, float]]]:
    """The metrics of an event: their family and (name, value) pairs; ("", []) for an event without metrics."""
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
    return family, [(allowed_name(key), float(value)) for key, value in values.items() if is_number(value)]


def flat(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield a pair such as ("optimizer.lr", "0.001") for every leaf of a nested recipe."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from flat(item, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield allowed_name(prefix), str(value)


def allowed_name(name: str) -> str:
    """Replace the characters that MLflow does not allow in names of metrics and parameters."""
    return re.sub(r"[^\w\-. /:]", "_", name, flags=re.ASCII)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _yaml(path: Path) -> dict[str, Any]:
    try:
        value = read_yaml(path)
    except (OSError, ValueError):
        value = None
    return value if isinstance(value, dict) else {}


def warn(sentence: str) -> None:
    """Print a sentence to stderr."""
    print(f"tracking: {redact(sentence)}", file=sys.stderr, flush=True)


def asked_to_finish(rank_zero: int, wait_seconds: float) -> bool:
    """Whether rank 0 asks to finish or has ended. A line on stdin asks; the end of stdin means that rank 0 has ended.
    So does another parent process, because a forked worker of rank 0 may keep the pipe open."""
    return bool(select.select([sys.stdin], [], [], wait_seconds)[0]) or os.getppid() != rank_zero


def end_in_time(forwarder: Forwarder, rank_zero: int, drain_seconds: float) -> None:
    """End this process `drain_seconds` after rank 0 asked to finish, also while a request hangs. The time to import
    MLflow is not counted."""
    while not asked_to_finish(rank_zero, 1.0):
        pass
    forwarder.imported.wait()
    time.sleep(drain_seconds)
    forwarder.warn_of_rest("it did not answer in time")
    os._exit(1)


def follow(
    stage_dir: Path, uri: str | None, experiment: str, poll_seconds: float, drain_seconds: float,
    server_drain_seconds: float | None = None,
) -> int:  # fmt: skip
    """Forward until rank 0 asks to finish or has ended, then drain until there were errors for `drain_seconds`, and in
    any case for at most `server_drain_seconds`.

    Returns the exit code: 0 if the whole journal is logged.
    """
    forwarder = Forwarder(stage_dir, uri, experiment)
    rank_zero = os.getppid()
    if server_drain_seconds is not None:
        threading.Thread(target=end_in_time, args=(forwarder, rank_zero, server_drain_seconds), daemon=True).start()
    give_up_at, warned, pause_seconds = None, False, 0.0
    with (stage_dir / "mlflow.lock").open("a") as lock:
        while True:
            finishing = asked_to_finish(rank_zero, pause_seconds)
            if finishing and give_up_at is None:
                give_up_at = time.monotonic() + drain_seconds
            pause_seconds = poll_seconds
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a killed attempt's forwarder may still be draining
                forwarder.forward()
                warned = False
                if finishing:
                    forwarder.close()
                    return 0
            except ImportError as error:
                packages = "mlflow-skinny, sqlalchemy and alembic"
                warn(f"MLflow cannot be imported ({error}); install {packages}, or set tracking.mlflow=false")
                return 1
            except Exception as error:
                forwarder.client = None  # connect again, because the run or its experiment may be gone
                reason = "another forwarder is at work"
                if not isinstance(error, BlockingIOError):
                    known = isinstance(error, UserError)
                    reason = str(error) if known else f"{type(error).__name__}: {first_line(error)[:300]}"
                    if not warned:
                        warn(f"MLflow at {forwarder.uri} does not take the journal, trying again: {reason}")
                    warned = True
                if give_up_at is not None and time.monotonic() > give_up_at:
                    forwarder.warn_of_rest(reason)
                    return 1
                if finishing:
                    time.sleep(1.0)


def main() -> None:
    """Run the forwarder as a program."""
    # A scheduler signals every process of a job, and this process must outlive the save that the signal causes.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage_dir", type=lambda text: Path(text).resolve())
    parser.add_argument("--uri")
    parser.add_argument("--experiment")
    parser.add_argument("--poll-seconds", type=float, default=POLL_SECONDS)
    parser.add_argument("--drain-seconds", type=float, default=DRAIN_SECONDS)
    parser.add_argument("--server-drain-seconds", type=float)
    redact_tracebacks()
    options = parser.parse_args()
    tracking = _yaml(options.stage_dir / RECIPE_FILE).get("tracking") or {}
    uri = options.uri or tracking.get("mlflow_uri")
    experiment = options.experiment or tracking.get("experiment") or "fcmae"
    if sentence := find_secret(uri or "", "tracking.mlflow_uri"):
        sys.exit(f"fcmae: {sentence}")
    os.nice(10)  # so that training keeps the cores
    warnings.simplefilter("ignore")  # alembic and sqlalchemy warn at every start
    os.environ.update(
        MLFLOW_DISABLE_TELEMETRY="true", MLFLOW_LOGGING_LEVEL="ERROR", OMP_NUM_THREADS="1",
        MLFLOW_HTTP_REQUEST_MAX_RETRIES="1", MLFLOW_HTTP_REQUEST_TIMEOUT="20",
    )  # fmt: skip
    drain = (options.drain_seconds, options.server_drain_seconds)
    sys.exit(follow(options.stage_dir, uri, experiment, options.poll_seconds, *drain))


if __name__ == "__main__":
    main()
