"""`make setup` says what stopped it."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

SETUP = Path(__file__).parents[3] / "tools" / "setup" / "setup.sh"
# Like pip, it ends with code 1 after Ctrl-C.
PIP = "#!/bin/sh\ntrap 'echo ERROR: cancelled; kill $!; exit 1' INT\ntouch started\nsleep 60 &\nwait\n"


def test_ctrl_c_is_no_failure_of_pip(tmp_path):
    for folder in ("tools/setup", ".venv/bin", "bin"):
        (tmp_path / folder).mkdir(parents=True)
    shutil.copy(SETUP, tmp_path / "tools" / "setup")
    for name, text in ((".venv/bin/pip", PIP), ("bin/dpkg-query", "#!/bin/sh\necho install ok installed\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "constraints.txt").write_text("torch==2\n")
    environment = {**os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    command = ["bash", tmp_path / "tools" / "setup" / "setup.sh"]
    setup = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "started").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(setup.pid, signal.SIGINT)  # as a terminal does
    assert setup.wait(60) == 130
    assert setup.stderr.read() == "setup: interrupted; the same command goes on\n"
