"""DeepSpeed ZeRO: moments (stage 1), gradients too (2), or parameters too (3) are sharded over the ranks.

Only DeepSpeed's partitioning is used. Learning rates, clipping, accumulation and the decision whether a step is made
are ours. Its launcher needs ssh, its optimizers are compiled at start, and its checkpoints resume on the same number of
ranks only and load half-written files. The state lies in flat fp32 partitions, which are shown as `FlatShard`s; this
uses DeepSpeed's internals, so one version is required.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.data.batch import Batch
from pipeline.distributed.sharded_tensors import FlatShard
from pipeline.distributed.world import World
from pipeline.engines.adamw import AdamW
from pipeline.engines.base import Engine, StepFilter
from pipeline.engines.buffers import StepBuffers
from pipeline.engines.deepspeed_settings import deepspeed_config, import_deepspeed
from pipeline.objectives import Objective
from pipeline.recipe import StageRecipe


class DeepSpeedEngine(Engine):
    """Shards the model with ZeRO of `engine.zero_stage`."""

    def __init__(self, model: nn.Module, recipe: StageRecipe, world: World, guard: StepFilter | None = None):
        config = deepspeed_config(recipe, world.size, world.device.type)
        deepspeed = import_deepspeed(world.device, world.local_rank)
        super().__init__(model, recipe, world, guard)
        buffers = self._float_buffers()
        self._optimizer = AdamW(self.groups, recipe.optimizer.betas)
        self._engine, self._zero, *_ = deepspeed.initialize(
            model=_Loss(self.module), optimizer=self._optimizer, config=config, dist_init_required=False
        )
        for name, buffer in buffers.items():  # DeepSpeed casts buffers to bf16 with the parameters
            owner, _, short = name.rpartition(".")
            self.module.get_submodule(owner)._buffers[short] = buffer
        self._buffers = StepBuffers(self.module, world.size)
        self._stage3 = recipe.engine.zero_stage == 3
        self._partitions = (
            self._zero.fp32_partitioned_groups_flat if self._stage3 else self._zero.single_partition_of_fp32_groups
        )
        self._optimizer.make_state(self._partitions)
        self._homes = dict(self._find_homes())
        # The engine needs the norm before the update, so ZeRO is given it instead of computing it again.
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
        import deepspeed

        # One module at a time is allocated and sharded, so that no rank holds the whole model.
        config = deepspeed_config(self.recipe, self.world.size, self.world.device.type)
        deepspeed.init_distributed(dist_init_required=False)  # use the process group that exists
        sharder = deepspeed.zero.Init(module=nn.Module(), config_dict_or_path=config)
        for module in model.modules():
            module.to_empty(device=self.world.device, recurse=False)
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(sharder.dtype)
            sharder._convert_to_zero_parameters(module.parameters(recurse=False))
        return model

    def items(self) -> dict[str, Tensor]:
        return {**self._shards(lambda partition: partition.detach()), **self._float_buffers()}

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
        # DeepSpeed returns -1 for a non-finite norm.
        return torch.where(self._norm < 0, torch.inf, self._norm).to(self.world.device)

    def _update(self, lr: float, norm: Tensor) -> None:
        # ZeRO itself skips a step with a non-finite norm.
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
        """The shard of each parameter in `flat(partition)`, a tensor as long as the partition."""
        tensors = [flat(partition) for partition in self._partitions]
        return {
            name: FlatShard(tensors[partition].narrow(0, offset, size), start, shape)
            for name, (partition, offset, size, start, shape) in self._homes.items()
        }

    def _find_homes(self) -> Iterator[tuple[str, tuple[int, int, int, int, torch.Size]]]:
        """Find each parameter: index of its partition, offset in it, number of elements on this rank, place of the
        first of them in the parameter, and the parameter's shape."""
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
                    high, low = fragment.hp_fragment_address, fragment.lp_fragment_address  # fp32, bf16
                    yield name, (index, high.start, high.numel, low.start, parameter.shape)


class _Loss(nn.Module):
    """Computes the loss of a batch; DeepSpeed needs a module whose output is differentiated."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, objective: Objective, batch: Batch, step: int, precision: torch.autocast) -> Tensor:
        with precision:
            return objective.loss(self.model, batch, step)
