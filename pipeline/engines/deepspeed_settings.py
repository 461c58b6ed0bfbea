"""DeepSpeed's configuration, and its import. A recipe's `engine.deepspeed` may set all that the recipe does not."""

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

# Settings that engine.deepspeed must not have, and the recipe key that sets them.
_SET_BY_RECIPE = {
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
    "zero_optimization.cpu_offload_param": "engine.offload",
    "zero_optimization.compute_grad_norm": "optimizer.clip_norm",
}
# Settings that would change the computation or the place of the state without the recipe's knowledge.
_FORBIDDEN = {
    "data_efficiency", "curriculum_learning", "progressive_layer_drop", "eigenvalue", "compression_training",
    "sparse_gradients", "sparse_attention", "autotuning", "elasticity", "gradient_allreduce_op", "hybrid_engine",
    "tensor_parallel", "sequence_parallel_size", "expert_parallel",
    "zero_optimization.zenflow", "zero_optimization.round_robin_gradients", "zero_optimization.zero_hpz_partition_size",
    "zero_optimization.zero_quantized_weights", "zero_optimization.zero_quantized_gradients",
    "zero_optimization.zero_quantized_nontrainable_weights", "zero_optimization.legacy_stage1",
    "zero_optimization.elastic_checkpoint", "zero_optimization.load_from_fp32_weights",
}  # fmt: skip


def deepspeed_config(recipe: StageRecipe, world_size: int, device: str) -> dict[str, Any]:
    """DeepSpeed's configuration for a stage: the user's `engine.deepspeed`, and what follows from the recipe.

    device: "cpu" or "cuda".

    Raises:
        RecipeError: naming a setting that `engine.deepspeed` must not have.
    """
    user, batch = recipe.engine.deepspeed, recipe.batch_on(world_size)
    user_zero = user.get("zero_optimization", {})
    if not isinstance(user_zero, Mapping):
        raise RecipeError(f"engine.deepspeed.zero_optimization is {user_zero!r}; give a mapping of settings")
    for key in [*user, *(f"zero_optimization.{key}" for key in user_zero)]:
        if key in _SET_BY_RECIPE:
            raise RecipeError(f"engine.deepspeed.{key} is set by {_SET_BY_RECIPE[key]}; remove it")
        if key in _FORBIDDEN:
            raise RecipeError(
                f"engine.deepspeed.{key} would change what is computed or saved without the recipe's knowledge;"
                " remove it"
            )
    micro_batch = batch.slot * batch.micro_slots
    zero = {"overlap_comm": zero_overlaps(recipe, device), **user_zero, "stage": recipe.engine.zero_stage}
    if recipe.engine.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    return {
        "steps_per_print": 10**9,
        "communication_data_type": "fp32",
        **user,
        "train_batch_size": batch.global_batch,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": batch.global_batch // micro_batch // world_size,
        "gradient_clipping": recipe.optimizer.clip_norm or 0.0,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,  # the optimizer is a subclass of torch's
        "bf16": {"enabled": recipe.engine.precision == "bf16_parameters"},
        "data_types": {"grad_accum_dtype": "fp32"},
    }


def zero_overlaps(recipe: StageRecipe, device: str) -> bool:
    """Whether ZeRO communicates while the ranks compute: by default on a GPU, because a CPU has no streams for it."""
    user_zero = recipe.engine.deepspeed.get("zero_optimization")
    user_zero = user_zero if isinstance(user_zero, Mapping) else {}
    return bool(user_zero.get("overlap_comm", device == "cuda"))


def import_deepspeed(device: torch.device, local_rank: int) -> ModuleType:
    """Import DeepSpeed for this device, without compiling anything.

    Raises:
        RecipeError: if it is not installed, or in another version.
    """
    try:
        version = importlib.metadata.version("deepspeed")
    except importlib.metadata.PackageNotFoundError:
        raise RecipeError(
            "engine.kind is deepspeed, which is not installed; run `pip install 'fcmae[deepspeed]'`, or choose fsdp"
        ) from None
    if version != VERSION:
        raise RecipeError(
            f"engine.kind is deepspeed, which works with version {VERSION} and {version} is installed; run"
            " `pip install 'fcmae[deepspeed]'`, or choose fsdp"
        )
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    # DeepSpeed takes the GPU of this number, and requires it even with a single process.
    if device.type == "cuda":
        os.environ["LOCAL_RANK"] = str(device.index or 0)
    os.environ.setdefault("LOCAL_RANK", str(local_rank))
    import deepspeed
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled at start
    deepspeed.utils.logger.setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*torch.distributed.*is deprecated")
    return deepspeed
