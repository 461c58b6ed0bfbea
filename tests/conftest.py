"""What all tests share: a clean environment, one seed, and how files are spread over parallel workers.

Variables that a scheduler, hook, launcher or terminal has left in the environment reach neither the tests nor their
commands. With CI=true hypothesis draws the same examples each time, so that a failure is the change's fault.
"""

import atexit
import gc
import os
import re
import signal
import subprocess
import sys
import zlib

LEFT_BEHIND = re.compile(
    r"(SLURM|SBATCH|SRUN|MASTER|AWS)_.*|FCMAE_(?!GOLDEN).*|(LOCAL_)?(RANK|WORLD_SIZE)|FAULTS|MLFLOW_TRACKING_URI"
    r"|GIT_(DIR|WORK_TREE|INDEX_FILE|PREFIX)|NUMBA_CACHE_DIR|PYTHONDONTWRITEBYTECODE"
    r"|COLUMNS|LINES|FORCE_COLOR|PY_COLORS|TTY_COMPATIBLE|GITHUB_ACTIONS"
)
for name in filter(LEFT_BEHIND.fullmatch, list(os.environ)):
    del os.environ[name]
for name in ("NO_PROXY", "no_proxy"):  # the tests' own servers
    os.environ[name] = ",".join(filter(None, (os.environ.get(name), "127.0.0.1,0.0.0.0,localhost")))
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background job; commands would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: tests that compare bits need the same order of sums
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # two threads of a test that wait for each other leave the cores to others

sys.dont_write_bytecode = False  # compiling all tests again, in each worker, takes as long as their imports
gc.disable()  # until all tests are collected: half the time of their imports was garbage collection

import pytest  # noqa: E402
import torch.distributed as dist  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402
from xdist.scheduler import LoadScopeScheduling  # noqa: E402

# No deadline: how long an example takes depends on what else the machine does.
settings.register_profile("here", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", settings.get_profile("here"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") == "true" else "here")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, default=0, help="of the moments at which tests disturb what they watch")


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """Of all chance in a test; printed if the test fails."""
    print(f"--seed {request.config.option.seed}")
    return request.config.option.seed


LONGEST_FIRST = (
    "tests/slurm/", "tests/multiprocess/", "tests/unit/tracking/test_forwarder.py", "tests/unit/test_fcmae.py",
    "tests/unit/tools/",
)  # fmt: skip


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    """A real gloo group of this process alone."""
    meeting = tmp_path_factory.mktemp("meeting") / "file"
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


COMPILE = """
import compileall
for folder in ("cluster", "pipeline", "tools"):
    compileall.compile_dir(folder, quiet=1)
from pipeline.data.decode import compile_decoder
compile_decoder()
"""


def pytest_sessionstart(session: pytest.Session) -> None:
    """Compile the program and its decoder while parallel workers import the tests: the copies of the code that jobs on
    Slurm run would come without it otherwise, and tests would wait for it."""
    if getattr(session.config.option, "numprocesses", None):
        command = [sys.executable, "-c", COMPILE]
        session.config.compilation = subprocess.Popen(command, cwd=session.config.rootpath)


@pytest.fixture(scope="module")
def world():
    """A world of one rank with one thread on the CPU."""
    import torch

    from pipeline.distributed.world import World

    threads = torch.get_num_threads()
    joined = World.join("cpu", threads=1)
    yield joined
    joined.leave()
    torch.set_num_threads(threads)


class FileByFile(LoadScopeScheduling):
    """Each file is run by one worker, as its fixtures are dear; all files that need Slurm by one, as they share it.

    The slow tests with Slurm mostly wait, and one after another for longer than all others take: they are divided
    between two workers, each with a cluster of its own.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.split("::")[0]
        if not file.startswith("tests/slurm/"):
            return file
        clusters = 1 if self.config.option.markexpr == "not slow" else 2
        return f"slurm {zlib.crc32(nodeid.encode()) % clusters}"

    def schedule(self) -> None:
        self.config.compilation.wait()
        super().schedule()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()
    atexit.register(gc.unfreeze)  # triton complains of what it still has at the end


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> FileByFile:
    config.option.loadscopereorder = False  # keep the order of pytest_collection_modifyitems
    return FileByFile(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start the longest files first, so that at the end no worker is left alone with one of them."""
    items.sort(key=lambda item: [not item.nodeid.startswith(longest) for longest in LONGEST_FIRST])
