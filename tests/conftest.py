"""Hypothesis looks further on a person's machine; in CI it repeats itself, so that a red run is the change's fault.

What a scheduler, hook, launcher or terminal has left in the environment reaches neither the tests nor their commands.
"""

import os
import re

LEFT_BEHIND = re.compile(
    r"(SLURM|SBATCH|SRUN|MASTER|AWS)_.*|FCMAE_(?!GOLDEN).*|(LOCAL_)?(RANK|WORLD_SIZE)|FAULTS|MLFLOW_TRACKING_URI"
    r"|GIT_(DIR|WORK_TREE|INDEX_FILE|PREFIX)"
    r"|COLUMNS|LINES|FORCE_COLOR|PY_COLORS|TTY_COMPATIBLE|GITHUB_ACTIONS"
)
for name in filter(LEFT_BEHIND.fullmatch, list(os.environ)):
    del os.environ[name]
for name in ("NO_PROXY", "no_proxy"):  # the tests' own servers
    os.environ[name] = ",".join(filter(None, (os.environ.get(name), "127.0.0.1,0.0.0.0,localhost")))
os.environ["OMP_NUM_THREADS"] = "1"  # before torch comes: where tests compare bits, all must round alike

import pytest  # noqa: E402
import torch.distributed as dist  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

# How long an example takes says something of the machine, and of what else it does.
settings.register_profile("here", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", settings.get_profile("here"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") == "true" else "here")


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    """A real gloo group of this process alone."""
    meeting = tmp_path_factory.mktemp("meeting") / "file"
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()
