"""The table that `fcmae submit` prints before it queues jobs."""

from pathlib import Path

import pytest
from rich.console import Console

from cluster.site import Site
from cluster.slurm.gpu_memory_check import MemoryNeed
from cluster.slurm.submit import PlannedStage
from tools.run.commands import _plan_table


def printed(width: int, **names: str) -> str:
    site = Site(nodes=2, gpus_per_node=8, cpus_per_task=8, time_limit_minutes=1440)
    planned = [PlannedStage(name, Path(name), None, site) for name in names.values()]
    needed = {stage.name: MemoryNeed(stage.name, 12.3, 73.6, "H100") for stage in planned}
    console = Console(width=width)
    with console.capture() as capture:
        console.print(_plan_table(planned, needed))
    return capture.get()


def test_the_plan_of_a_chain_fits_in_a_terminal_of_80_columns() -> None:
    lines = printed(80, first="pretrain", second="intermediate", third="finetune").splitlines()
    header = ["stage", "partition", "nodes", "ranks", "GPUs", "CPUs", "minutes", "GiB", "of", "a", "GPU"]
    assert lines[0].split() == header
    cells = ["default", "2", "16", "16", "128", "1440", "12.3", "of", "73.6", "to", "submit"]
    assert lines[2].split() == ["intermediate", *cells]


@pytest.mark.parametrize("width", [50, 60, 70])
def test_a_number_that_is_cut_shows_it(width: int) -> None:
    cells = printed(width, first="pretrain").splitlines()[1].split()
    assert any("…" in cell for cell in cells)
    assert all("…" in cell or cell in ("2", "16", "128", "1440") for cell in cells[2:6])
