"""What a site demands of its nodes, and what a rank expects of its node."""

from dataclasses import dataclass, field
from pathlib import Path

from pydantic import Field

from pipeline.distributed.processes import gpu_of_rank
from pipeline.recipe.settings_base import YEAR_SECONDS, Settings


class PreflightSettings(Settings):
    """The `preflight` section of a site. A floor of 0 measures and reports but refuses nothing."""

    enabled: bool = True
    host_memory_gib: float = Field(1.0, ge=0, le=1e9)
    """Free memory that a rank needs, inside the job's own limit."""
    device_memory_fraction: float = Field(0.9, ge=0, le=1)
    """The part of a GPU's memory that must be free."""
    disk_gib: float = Field(1.0, ge=0, le=1e9)
    """Free space needed in the local scratch and in the run directory."""
    disk_timeout_seconds: float = Field(30.0, gt=0, le=YEAR_SECONDS)
    """The time to write and read back 4 MiB, which a hung mount exceeds."""
    clock_seconds: float = Field(10.0, gt=0, le=YEAR_SECONDS)
    """The largest difference between this node's clock and the shared file system's."""
    stray_seconds: float = Field(5.0, ge=0, le=YEAR_SECONDS)
    """How long ranks left over from an earlier attempt may take to end."""
    allowed_processes: list[str] = Field(["nvidia-cuda-mps-server", "nvidia-cuda-mps-control", "dcgm"])
    """Programs that may use the same GPU, by a part of their name."""
    matrix_floor_tflops: float = Field(0.0, ge=0, le=1e9)
    """The least rate of a matrix product: in bf16 on a GPU, in float32 on a CPU."""
    matrix_fraction: float = Field(0.7, ge=0, le=1)
    """The least part of the median rate of the other ranks' GPUs; see `cluster.preflight.network`."""
    allreduce_floor_gb_per_second: float = Field(0.0, ge=0, le=1e9)
    """The least bus bandwidth of an all-reduce over all ranks (10^9 bytes/s)."""
    join_timeout_seconds: float = Field(120.0, gt=0, le=YEAR_SECONDS)
    """The time for all ranks to reach the network check."""


@dataclass(frozen=True)
class Expectations:
    """What a rank expects of its node."""

    stage_directory: Path
    """On the file system that all nodes share."""
    scratch: Path | None = None
    """Local disk that data is staged to."""
    devices: int = 0
    """GPUs that this rank must see; 0 for training on CPUs."""
    local_rank: int = 0
    ranks: int = 1
    """Ranks on this node."""
    settings: PreflightSettings = field(default_factory=PreflightSettings)

    def gpu(self, visible: int) -> int | None:
        """Which of the visible GPUs this rank uses; None if fewer are visible than expected. One alone is enough where
        the cluster shows each task its own: `check_network` finds out whether the ranks of a node share it."""
        enough = visible >= self.devices or visible == 1 < self.ranks
        return gpu_of_rank(self.local_rank, self.ranks, visible) if enough else None
