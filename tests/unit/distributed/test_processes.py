import os
import subprocess
import sys

from pipeline.distributed.processes import start_time


def test_zombies_are_dead():
    child = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert start_time(child.pid) == 0
    child.wait()
    assert start_time(os.getpid()) > 0
