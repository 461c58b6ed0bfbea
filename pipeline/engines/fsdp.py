"""FSDP2: parameters, gradients and moments are sharded over the ranks, and gathered block by block to compute."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import Shard

from pipeline.distributed.torch_versions import fsdp_parameters
from pipeline.distributed.world import match_timeout
from pipeline.engines.base import DTYPES, sharding_units
from pipeline.engines.torch_native import NativeEngine
from pipeline.errors import RecipeError
from pipeline.recipe import StageRecipe
from pipeline.recipe.stage_sections import divisors

MOST_KEPT_BYTES = 4 * 2**30  # of parameters that stay gathered by default, a twentieth of a GPU of 80 GB


class FSDPEngine(NativeEngine):
    """Shards the model with `fully_shard`, over all ranks or within groups of `engine.shard_ranks`."""

    def _place(self, model: nn.Module) -> nn.Module:
        self._shard(model)
        model.to_empty(device="cpu" if self.recipe.engine.offload else self.world.device)
        for module in model.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = buffer.to(self.world.device)
        self._callable = model
        return model

    def _shard(self, model: nn.Module) -> None:
        """Shard the parameters, on the meta device."""
        settings = self.recipe.engine
        mesh = self._mesh()
        ranks, self._shard_group = mesh.shape[-1], mesh.get_group(mesh.ndim - 1)
        low = torch.bfloat16 if settings.precision == "bf16_parameters" else None
        # Inputs stay uncast because the loss compares with them; autocast casts where it must.
        precision = MixedPrecisionPolicy(
            param_dtype=low, reduce_dtype=torch.float32 if low else None, cast_forward_inputs=False
        )
        offload = CPUOffloadPolicy(pin_memory=self.world.device.type == "cuda") if settings.offload else OffloadPolicy()
        model.to(DTYPES[settings.precision])
        # The warning is about writing into views of features, which nothing here does.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        for module in [*sharding_units(model), model]:
            fully_shard(
                module,
                mesh=mesh,
                mp_policy=precision,
                offload_policy=offload,
                shard_placement_fn=lambda parameter: Shard(sharded_dim(parameter.shape, ranks)),
            )
        size = sum(parameter.numel() for parameter in model.parameters())
        self._keeps_gathered = keeps_gathered(self.recipe, self.world.size, size, self.world.device.type)
        if self._keeps_gathered:
            model.set_reshard_after_forward(False)
        self._last: bool | None = None  # of the micro-batch before, whose settings the modules have

    def refresh(self) -> None:
        # After a forward without a backward the root's parameters stay gathered, with their old values.
        for module in self.module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def _mesh(self) -> DeviceMesh:
        world, ranks = self.world, self.recipe.engine.shard_ranks or self.world.size
        if world.size % ranks:
            raise RecipeError(
                f"engine.shard_ranks is {ranks} but {world.size} processes run; choose one of"
                f" {', '.join(map(str, divisors(world.size)))}, or remove it to shard over all"
            )
        if ranks == world.size:
            return init_device_mesh(world.device.type, (ranks,), mesh_dim_names=("shard",))
        mesh = init_device_mesh(world.device.type, (world.size // ranks, ranks), mesh_dim_names=("replicate", "shard"))
        for group in mesh.get_all_groups():
            match_timeout(group)
        return mesh

    @contextmanager
    def _synchronising(self, last: bool) -> Iterator[None]:
        if last != self._last:
            self.module.set_requires_gradient_sync(last)
            if self._keeps_gathered:
                self.module.set_reshard_after_backward(last)
            self._last = last
        yield

    def _discard_gradients(self) -> None:
        super()._discard_gradients()
        if self._keeps_gathered:
            self.refresh()
        # FSDP has no public API for accumulated, unreduced gradients, so clear its private fields.
        for module in self.module.modules():
            for parameter in fsdp_parameters(module) if isinstance(module, FSDPModule) else []:
                parameter.unsharded_accumulated_grad = None
                if hasattr(parameter, "_unsharded_param"):
                    parameter._unsharded_param.grad = None


def keeps_gathered(recipe: StageRecipe, ranks: int, parameters: int, device: str) -> bool:
    """Whether the parameters stay gathered between the micro-batches of a step, which then gathers them once.

    Args:
        parameters: their number.
        device: "cpu" or "cuda".
    """
    batch, settings = recipe.batch_on(ranks), recipe.engine
    if settings.offload or batch.slots // ranks <= batch.micro_slots:
        return False
    if settings.keep_gathered != "auto":
        return settings.keep_gathered
    dtype = torch.bfloat16 if settings.precision == "bf16_parameters" else DTYPES[settings.precision]
    return device == "cuda" and parameters * dtype.itemsize <= MOST_KEPT_BYTES


def sharded_dim(shape: torch.Size, ranks: int) -> int:
    """The dimension that FSDP shards: the first one, unless its size is 1, as of GRN's (1, 1, 1, C), which would lie
    whole on one rank; then the first one that `ranks` divides."""
    if shape and shape[0] == 1:
        return next((dim for dim, size in enumerate(shape) if size > 1 and size % ranks == 0), 0)
    return 0
