"""Read the weights, or their moving average, from a committed checkpoint of a stage."""

from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from pipeline.checkpoint.manifest import COMMIT, CheckpointName
from pipeline.checkpoint.verification import verify_checkpoint
from pipeline.errors import CheckpointError
from pipeline.storage.folder import Folder


def read_checkpoint_weights(checkpoint: str, ema: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Verify a checkpoint and read its weights, or with `ema` their moving average.

    Returns:
        The tensors on the CPU, and the step and recipe hash from the manifest.

    Raises:
        CheckpointError: if the checkpoint is not committed, is damaged, or holds no moving average.
    """
    folder, prefix = Folder.at(checkpoint), "ema." if ema else "model."
    name = CheckpointName.parse(folder.path.rstrip("/").rpartition("/")[2])
    if name is None or not (folder / COMMIT).exists():
        raise CheckpointError(f"{folder} is not a committed checkpoint; `fcmae checkpoint ls` lists them")
    manifest, problems = verify_checkpoint(folder, name)
    if manifest is None:
        raise CheckpointError(f"{folder} is damaged ({problems[0]}); take an older one")
    reader = FsspecReader(folder.url)
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata) and name.startswith(prefix)
    }
    if not tensors:
        raise CheckpointError(f"{checkpoint} holds no moving average; leave --ema out")
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    facts = {key: manifest.facts[key] for key in ("step", "recipe") if key in manifest.facts}
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}, facts
