"""What a site may demand of its nodes, and what a rank counts on."""

from dataclasses import dataclass, field
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field


class PreflightSettings(BaseModel):
    """The `preflight` section of a site. A floor of 0 measures and reports without judging."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    enabled: bool = True
    host_memory_gib: float = Field(1.0, ge=0)
    """Free memory that a rank must find, inside the job's own limit."""
    device_memory_fraction: float = Field(0.9, ge=0, le=1)
    """Of a GPU's memory, what must be free before we start."""
    disk_gib: float = Field(1.0, ge=0)
    """Free space in the local scratch and in the run directory."""
    disk_timeout_seconds: float = Field(30.0, gt=0)
    """For a directory to take and give back 4 MiB; a hung mount takes longer."""
    clock_seconds: float = Field(10.0, gt=0)
    """Between this node's clock and the shared file system's."""
    stray_seconds: float = Field(5.0, ge=0)
    """How long what is left of an earlier attempt may take to end."""
    allowed_processes: list[str] = ["nvidia-cuda-mps-server", "nvidia-cuda-mps-control", "dcgm"]
    """Programs that may be on a GPU beside us, by a part of their name."""
    matrix_floor_tflops: float = Field(0.0, ge=0)
    """A GPU's bf16 matrix product; a CPU's in float32."""
    matrix_fraction: float = Field(0.7, ge=0, le=1)
    """Of the median of the other ranks' products, on GPUs; see `cluster.preflight.network`."""
    allreduce_floor_gb_per_second: float = Field(0.0, ge=0)
    """Bus bandwidth of an all-reduce over all ranks (10^9 bytes)."""
    join_timeout_seconds: float = Field(120.0, gt=0)
    """For all ranks to reach the network check."""


@dataclass(frozen=True)
class Expectations:
    """What a rank counts on."""

    stage_directory: Path
    """On the file system that the nodes share."""
    scratch: Path | None = None
    """Local disk that data is staged to."""
    devices: int = 0
    """GPUs that this rank must see; 0 is training on CPUs."""
    local_rank: int = 0
    settings: PreflightSettings = field(default_factory=PreflightSettings)
