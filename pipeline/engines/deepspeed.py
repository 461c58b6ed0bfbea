"""DeepSpeed ZeRO: moments (stage 1), gradients too (2), or parameters too (3) are shared out among the ranks.

Used for its partitioning alone. Learning rates, clipping, accumulation and the decision whether a step is made are the
recipe's and this file's; its launcher, its optimizers, which are compiled at start, and its checkpoints, which resume
on the same ranks only and believe what is half-written, are not used. State lies in flat fp32 partitions, shown to the
world as `FlatShard`s. That takes knowledge of DeepSpeed's insides, hence one version.
"""

import importlib.metadata
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.data.feed import Batch
from pipeline.engines.adamw import AdamW
from pipeline.engines.base import Engine
from pipeline.engines.buffers import StepBuffers
from pipeline.engines.world import World
from pipeline.errors import RecipeError
from pipeline.logical import FlatShard
from pipeline.objectives import Objective
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


class DeepSpeedEngine(Engine):
    def __init__(self, model: nn.Module, recipe: StageRecipe, world: World):
        settings = configuration(recipe, world.size)
        deepspeed = self._deepspeed = _load(world.device)
        super().__init__(model, recipe, world)
        buffers = {name: b for name, b in self.module.named_buffers() if b.is_floating_point()}
        self._optimizer = AdamW(self.groups, recipe.optimizer.betas)
        self._engine, self._zero, *_ = deepspeed.initialize(
            model=_Loss(self.module), optimizer=self._optimizer, config=settings, dist_init_required=False
        )
        for name, buffer in buffers.items():  # bf16 parameters take the buffers with them
            owner, _, short = name.rpartition(".")
            self.module.get_submodule(owner)._buffers[short] = buffer
        self._buffers = StepBuffers(self.module, world.size)
        self._stage3 = recipe.engine.zero_stage == 3
        self._partitions = (
            self._zero.fp32_partitioned_groups_flat if self._stage3 else self._zero.single_partition_of_fp32_groups
        )
        self._optimizer.make_state(self._partitions)
        self._homes = dict(self._find_homes())
        # The engine decides before the update; ZeRO is told the norm instead of computing it again.
        self._norm = torch.zeros(())
        if self._stage3:
            self._groups_of_norm = self._zero._get_norm_groups
            self._zero._get_norm_groups = lambda: [self._norm]
        else:
            self._whole_norm = self._zero.scaled_global_norm
            self._zero.scaled_global_norm = lambda: self._norm

    def _place(self, model: nn.Module) -> nn.Module:
        if self.recipe.engine.zero_stage < 3:
            return super()._place(model)
        # One module at a time gets memory and gives most of it back.
        settings = configuration(self.recipe, self.world.size)
        self._deepspeed.init_distributed(dist_init_required=False)  # the group is there; this makes DeepSpeed see it
        share_out = self._deepspeed.zero.Init(module=nn.Module(), config_dict_or_path=settings)
        for module in model.modules():
            module.to_empty(device=self.world.device, recurse=False)
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(share_out.dtype)
            share_out._convert_to_zero_parameters(module.parameters(recurse=False))
        return model

    def items(self) -> dict[str, Tensor]:
        buffers = {name: b for name, b in self.module.named_buffers() if b.is_floating_point()}
        return {**self._shards(lambda partition: partition.detach()), **buffers}

    @torch.no_grad()
    def refresh(self) -> None:
        zero = self._zero
        if not self._stage3:
            zero.update_lp_params()
            return
        zero._partition_all_parameters()
        for index in range(len(self._partitions)):
            zero._reassign_or_swap_out_partitioned_parameters(index)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)

    def _backward(self, batch: Batch, objective: Objective, step: int, share: float, *, last: bool) -> Tensor:
        self._engine.set_gradient_accumulation_boundary(last)
        loss = self._engine(objective, batch, step, self.precision())
        self._engine.backward(loss * share, scale_wrt_gas=False)
        return loss.detach() * share

    def _gradient_norm(self) -> Tensor:
        if self._stage3:
            from deepspeed.runtime.utils import combine_grad_norm_groups

            self._norm = combine_grad_norm_groups(self._groups_of_norm())
        else:
            self._norm = self._whole_norm()
        # DeepSpeed says -1 for what is not finite.
        return torch.where(self._norm < 0, torch.inf, self._norm).to(self.world.device)

    def _update(self, lr: float, norm: Tensor) -> None:
        # With a norm that is not finite ZeRO itself leaves all as it is.
        self._optimizer.prepare(lr, self._accepted)
        self._zero.step()
        self._zero.zero_grad()

    def _discard_gradients(self) -> None:
        zero = self._zero
        zero.zero_grad()
        if self._stage3:
            zero.averaged_gradients = {}
        else:
            zero.micro_step_id = -1
            zero.averaged_gradients = dict.fromkeys(zero.averaged_gradients)
            zero.all_grad_tensors = dict.fromkeys(zero.all_grad_tensors)

    def _optimizer_state(self) -> dict[str, dict[str, Tensor]]:
        state = self._optimizer.state
        moments = {key: self._shards(lambda p, key=key: state[p][key]) for key in ("exp_avg", "exp_avg_sq")}
        return {
            name: {"step": state[self._partitions[partition]]["step"]}
            | {key: tensors[name] for key, tensors in moments.items()}
            for name, (partition, *_) in self._homes.items()
        }

    def _shards(self, flat: Any) -> dict[str, Tensor]:
        """Each parameter's shard of `flat(partition)`, a tensor as long as the partition."""
        tensors = [flat(partition) for partition in self._partitions]
        return {
            name: FlatShard(tensors[partition].narrow(0, offset, size), start, shape)
            for name, (partition, offset, size, start, shape) in self._homes.items()
        }

    def _find_homes(self) -> Iterator[tuple[str, tuple[int, int, int, int, torch.Size]]]:
        """For each parameter: which partition, from where in it, how many elements, which is the first, full shape."""
        names = {parameter: name for name, parameter in self.module.named_parameters()}
        for index, group in enumerate(self._zero.fp16_groups if self._stage3 else self._zero.bit16_groups):
            offset = 0
            for parameter in group:
                name = names[parameter]
                if self._stage3:
                    size = parameter.partition_numel()
                    start = min(self.world.rank * size, parameter.ds_numel)
                    held = min(size, parameter.ds_numel - start)  # the last ranks' partitions are padded
                    yield name, (index, offset, held, start, parameter.ds_shape)
                    offset += size
                elif (fragment := parameter._hp_mapping) is None:
                    yield name, (index, 0, 0, 0, parameter.shape)
                else:
                    there, here = fragment.hp_fragment_address, fragment.lp_fragment_address
                    yield name, (index, there.start, there.numel, here.start, parameter.shape)


class _Loss(nn.Module):
    """What DeepSpeed runs and hooks into: from a batch to its loss, so that its output is what is differentiated."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, objective: Objective, batch: Batch, step: int, precision: torch.autocast) -> Tensor:
        with precision:
            return objective.loss(self.model, batch, step)[0]


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


def _load(device: torch.device) -> ModuleType:
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
    import deepspeed
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled at start
    deepspeed.utils.logger.setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*torch.distributed.*is deprecated")
    return deepspeed
