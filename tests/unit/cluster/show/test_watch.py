"""`fcmae status --watch` of real directories, with a terminal and without."""

import io
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from cluster.show.watch import watch_run
from pipeline.storage.folder import write_json
from tests.support import mark_done

# Without what a person's shell may say of terminals.
ODD = ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE")
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if name not in ODD},
    **{"TERM": "xterm", "COLUMNS": "100", "LINES": "30"},
}
COMMAND = [sys.executable, "-m", "tools.cli", "status", "--watch", "--refresh-seconds", "0.1"]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "recipe.yaml").write_text("name: tiny\nstages: {pretrain: {}}\n")
    return tmp_path


def finish(stage: Path) -> None:
    stage.mkdir(exist_ok=True)
    write_json(stage / "result.json", {"steps": 10, "metrics": {"top1": 61.5}, "weights_sha256": "c0ffee" * 11})
    mark_done(stage)


def hear_ctrl_c() -> None:
    """A script in the background hands on that Ctrl-C is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_it_ends_with_the_chain(run):
    finish(run / "pretrain")
    console = Console(file=io.StringIO(), width=120)
    watch_run(run, console)
    text = console.file.getvalue()
    assert str(run) in text
    assert "top1 61.50 %" in text


def test_without_a_terminal_a_table_for_each_change(run):
    with subprocess.Popen([*COMMAND, run], stdout=subprocess.PIPE, text=True, env=ENVIRONMENT) as watching:
        try:
            seen = [watching.stdout.readline() for _ in range(3)]  # where and when, the header, the stage
            assert "waiting" in seen[2]
            finish(run / "pretrain")
            rest = watching.stdout.read()
            assert watching.wait(timeout=300) == 0
        finally:
            watching.kill()
    assert rest.count("pretrain") == 1
    assert "\x1b" not in rest


def test_a_terminal_is_redrawn_until_ctrl_c(run):
    own, its = pty.openpty()
    pipes = {"stdin": its, "stdout": its, "stderr": its}
    with subprocess.Popen([*COMMAND, run], **pipes, env=ENVIRONMENT, preexec_fn=hear_ctrl_c) as watching:
        try:
            text, deadline = b"", time.monotonic() + 300
            while text.count(b"waiting") < 3 and time.monotonic() < deadline:
                if select.select([own], [], [], 1)[0]:
                    text += os.read(own, 65536)
            assert text.count(b"waiting") >= 3, "drawn again and again"
            watching.send_signal(signal.SIGINT)
            # A terminal that is not read is full after some drawings, and the last words would never get out.
            while watching.poll() is None and time.monotonic() < deadline:
                if select.select([own], [], [], 0.1)[0]:
                    text += os.read(own, 65536)
            assert watching.wait(timeout=300) == 0
        finally:
            watching.kill()
            os.close(its)
            os.close(own)
    assert b"Traceback" not in text
