"""Start the process that forwards a stage's journal to MLflow (`pipeline.tracking.forwarder`), and wait for its end."""

import contextlib
import subprocess
from collections.abc import Callable
from pathlib import Path

from pipeline.distributed.processes import module_command
from pipeline.errors import StageError
from pipeline.tracking.mlflow_store import is_server
from pipeline.url_secrets import redact

DRAIN_SECONDS = 60.0
SERVER_DRAIN_SECONDS = 10.0  # a server may hang, a database in the run directory is only busy
SAID_AFTER_SECONDS = 2.0


class ForwarderProcess:
    """Rank 0's handle on the forwarder process of this attempt."""

    def __init__(self, process: subprocess.Popen[bytes], uri: str | None = None) -> None:
        self.process = process
        self.uri = uri

    def finish(
        self, timeout_seconds: float = DRAIN_SECONDS, say: Callable[[str], None] = lambda sentence: None
    ) -> bool:
        """Wait until the rest of the journal is logged; False if it was not, and the next attempt will log it.

        A server that does not answer is waited for at most `SERVER_DRAIN_SECONDS`, see `follow`.

        Args:
            say: gets a sentence if that takes more than two seconds.
        """
        if self.process.poll() is None:
            try:
                self.process.communicate(b"\n", min(SAID_AFTER_SECONDS, timeout_seconds))
            except subprocess.TimeoutExpired:
                limit = min(timeout_seconds, SERVER_DRAIN_SECONDS if is_server(self.uri) else DRAIN_SECONDS)
                where = redact(self.uri) if self.uri else "in the run directory"
                say(f"waiting for MLflow ({where}) to take the rest of the journal, for at most {limit:.0f} s")
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.communicate(timeout=max(timeout_seconds - SAID_AFTER_SECONDS, 0))
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait()
        return self.process.returncode == 0


def start_forwarder(stage_dir: str | Path, uri: str | None = None, experiment: str = "fcmae") -> ForwarderProcess:
    """Start the forwarder of a stage. It ends with `finish`, or by itself when this process has ended.

    Args:
        uri: any MLflow tracking URI; None is `sqlite:///RUN_DIR/mlflow.db`. Artifacts of a sqlite database lie beside
            it in `mlartifacts`; a server has its own place for them.
    """
    command = module_command("pipeline.tracking.forwarder", stage_dir, "--experiment", experiment)
    if uri:
        StageError.refuse_secrets(uri, "tracking.mlflow_uri")
        command += ["--uri", uri]
    if is_server(uri):
        command += ["--server-drain-seconds", str(SERVER_DRAIN_SECONDS)]
    # In a session of its own, so that Ctrl-C at the terminal reaches only the training.
    return ForwarderProcess(subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True), uri)
