"""What DeepSpeed is told: the user's settings where they do not break the contract, then the recipe's."""

import importlib.metadata
import logging
import os
import warnings
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch

from pipeline.errors import RecipeError
from pipeline.recipe import StageRecipe

VERSION = "0.19.8"

# What a user may not set in engine.deepspeed, and what says it instead.
_TAKEN = {
    "train_batch_size": "batch.global_batch",
    "train_micro_batch_size_per_gpu": "batch.slot and batch.micro_slots",
    "gradient_accumulation_steps": "batch.micro_slots and the number of processes",
    "managed_gradient_accumulation": "batch.micro_slots and the number of processes",
    "gradient_clipping": "optimizer.clip_norm",
    "optimizer": "optimizer",
    "scheduler": "schedule",
    "fp16": "engine.precision",
    "bf16": "engine.precision",
    "amp": "engine.precision",
    "torch_autocast": "engine.precision",
    "data_types": "engine.precision",
    "checkpoint": "checkpoint",
    "compile": "engine.compile",
    "activation_checkpointing": "model.checkpointing",
    "zero_force_ds_cpu_optimizer": "optimizer",
    "zero_optimization.stage": "engine.zero_stage",
    "zero_optimization.offload_optimizer": "engine.offload",
    "zero_optimization.offload_param": "engine.offload",
    "zero_optimization.cpu_offload": "engine.offload",
    "zero_optimization.compute_grad_norm": "optimizer.clip_norm",
}
# What would change what is computed, or where the state lies, behind the recipe's back.
_BREAKING = {
    "data_efficiency", "curriculum_learning", "progressive_layer_drop", "eigenvalue", "compression_training",
    "sparse_gradients", "sparse_attention", "autotuning", "elasticity", "gradient_allreduce_op", "hybrid_engine",
    "zero_optimization.zenflow", "zero_optimization.round_robin_gradients", "zero_optimization.zero_hpz_partition_size",
    "zero_optimization.zero_quantized_weights", "zero_optimization.zero_quantized_gradients",
    "zero_optimization.zero_quantized_nontrainable_weights", "zero_optimization.legacy_stage1",
    "zero_optimization.elastic_checkpoint", "zero_optimization.load_from_fp32_weights",
}  # fmt: skip


def configuration(recipe: StageRecipe, world_size: int) -> dict[str, Any]:
    """DeepSpeed's configuration for a stage: the user's settings, then the recipe's.

    Raises:
        RecipeError: naming a setting that is not the user's to make here.
    """
    mine, batch = recipe.engine.deepspeed, recipe.batch
    zero = mine.get("zero_optimization", {})
    if not isinstance(zero, Mapping):
        raise RecipeError(f"engine.deepspeed.zero_optimization is {zero!r}; give it settings by name")
    for key in [*mine, *(f"zero_optimization.{key}" for key in zero)]:
        if key in _TAKEN:
            raise RecipeError(f"engine.deepspeed.{key} is said by {_TAKEN[key]}; remove it there")
        if key in _BREAKING:
            raise RecipeError(
                f"engine.deepspeed.{key} would change what is computed or saved, unseen by the recipe; remove it"
            )
    micro = batch.slot * batch.micro_slots
    low = recipe.engine.precision == "bf16_parameters"
    ours: dict[str, Any] = {
        "train_batch_size": batch.global_batch,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": batch.global_batch // micro // world_size,
        "gradient_clipping": recipe.optimizer.clip_norm or 0.0,
        "zero_optimization": {"overlap_comm": False, **zero, "stage": recipe.engine.zero_stage},
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,  # it is torch's, under another name
        "bf16": {"enabled": low},
        "data_types": {"grad_accum_dtype": "fp32"},
    }
    if recipe.engine.offload:
        ours["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    return {"steps_per_print": 10**9, "communication_data_type": "fp32", **mine, **ours}


def load(device: torch.device, local_rank: int) -> ModuleType:
    try:
        found = importlib.metadata.version("deepspeed")
    except importlib.metadata.PackageNotFoundError:
        raise RecipeError(
            "engine.kind is deepspeed, which is not installed; run `pip install 'fcmae[deepspeed]'`, or choose fsdp"
        ) from None
    if found != VERSION:
        raise RecipeError(
            f"engine.kind is deepspeed, which works with version {VERSION} and {found} is installed; run"
            " `pip install 'fcmae[deepspeed]'`, or choose fsdp"
        )
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ.setdefault("LOCAL_RANK", str(local_rank))  # it insists, also where there is one process
    import deepspeed
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled at start
    deepspeed.utils.logger.setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*torch.distributed.*is deprecated")
    return deepspeed
