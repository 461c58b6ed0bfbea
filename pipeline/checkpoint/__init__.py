"""Checkpoints of a stage: what a resume needs, and nothing else."""

from pipeline.checkpoint.retention import prune_store
from pipeline.checkpoint.store import CheckpointStore

__all__ = ["CheckpointStore", "prune_store"]
