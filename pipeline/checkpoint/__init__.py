"""Checkpoints of a stage, and the weights it hands on."""

from pipeline.checkpoint.retention import prune
from pipeline.checkpoint.store import CheckpointStore
from pipeline.weights.files import (
    Transfer,
    encoder_to_classifier,
    plan_transfer,
    read_facts,
    read_weights,
    write_weights,
)

__all__ = [
    "CheckpointStore",
    "Transfer",
    "encoder_to_classifier",
    "plan_transfer",
    "prune",
    "read_facts",
    "read_weights",
    "write_weights",
]
