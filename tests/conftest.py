"""Hypothesis looks further on a person's machine; in CI it repeats itself, so that a red run is the change's fault.

Nowhere does it judge how long an example takes: a busy machine, or the first call of what is compiled, is no mistake.

What the shell, job or hook that started the tests has in its environment is not for the program under test.
"""

import os
import re

import pytest
import torch.distributed as dist
from hypothesis import HealthCheck, settings

LEFT_BEHIND = re.compile(
    r"(?!SLURM_CONF$)SLURM_.*|GIT_(DIR|WORK_TREE|INDEX_FILE|PREFIX)|FCMAE_(DATA|MIRROR|SCRATCH|JOB_STARTED)|(LOCAL_)?(RANK|WORLD_SIZE)"
    r"|MASTER_(ADDR|PORT)|AWS_PROFILE|MLFLOW_TRACKING_URI|FORCE_COLOR|COLUMNS|LINES"
)
for name in filter(LEFT_BEHIND.fullmatch, list(os.environ)):
    del os.environ[name]
for name in ("NO_PROXY", "no_proxy"):  # the tests' own servers
    os.environ[name] = ",".join(filter(None, (os.environ.get(name), "127.0.0.1,0.0.0.0,localhost")))

settings.register_profile("person", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", settings.get_profile("person"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") == "true" else "person")


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    """A real gloo group of this process alone."""
    meeting = tmp_path_factory.mktemp("meeting") / "file"
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()
