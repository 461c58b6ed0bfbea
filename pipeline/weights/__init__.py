"""Model weights outside a checkpoint: what a stage hands on, and files from other programs."""

from pipeline.weights.safetensors_file import read_facts, read_weights, write_weights
from pipeline.weights.transfer import encoder_to_classifier, plan_transfer

__all__ = ["encoder_to_classifier", "plan_transfer", "read_facts", "read_weights", "write_weights"]
