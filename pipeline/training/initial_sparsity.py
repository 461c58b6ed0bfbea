"""Draw the masks that a sparse stage starts with, from the density of each layer."""

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.data.batch import Batch
from pipeline.distributed.sharded_tensors import whole
from pipeline.engines import Engine
from pipeline.kernels.large_kernel import DepthwiseConv2d
from pipeline.objectives import Objective
from pipeline.optim.pruning import erk_densities, snip_densities, uniform_densities
from pipeline.optim.sparsity import DynamicSparsity


def start_sparsity(engine: Engine, objective: Objective, batches: Iterable[Batch]) -> dict[str, float]:
    """Draw the first masks of the engine's sparsity; returns the density of each layer. Collective.

    Args:
        batches: this rank's micro-batches of the first step; only SNIP reads them.
    """
    sparsity: DynamicSparsity = engine.component("sparsity")
    settings = sparsity.settings
    shapes = {name: tuple(weight.shape) for name, weight in sparsity.weights.items()}
    if settings.distribution == "handed_on":
        sparsity.start_from_zeros()
    elif settings.distribution == "snip":
        sparsity.start(snip_densities(snip_scores(engine, objective, batches, list(shapes)), settings.sparsity))
    else:
        densities = {"erk": erk_densities, "uniform": uniform_densities}[settings.distribution]
        sparsity.start(densities(shapes, settings.sparsity))
    engine.refresh()
    return sparsity.densities()


def snip_scores(engine: Engine, objective: Objective, batches: Iterable[Batch], names: list[str]) -> dict[str, Tensor]:
    """Compute |weight * gradient| of the named weights: float64, whole on every rank. Collective.

    The gradient is that of the loss without mixing, of a whole copy of the model on every rank. It is computed slot by
    slot and summed in float64, so that it does not depend on which rank had which slots. On a CPU the copy is float64
    too, because sums there depend on the number of threads, which differs with the number of ranks.
    """
    dtype = torch.float64 if engine.world.device.type == "cpu" else torch.float32
    model = _copy_model(engine, objective).to(engine.world.device, dtype).train()
    plain, slots = objective.without_mixing(), engine.recipe.batch.slots
    parameters = dict(model.named_parameters())
    weights = [parameters[name] for name in names]
    sums = [torch.zeros_like(weight, dtype=torch.float64) for weight in weights]
    for batch in batches:
        for slot in single_slots(batch):
            loss = plain.loss(model, engine.to_device(slot), 0)
            for total, gradient in zip(sums, torch.autograd.grad(loss, weights), strict=True):
                total.add_(gradient, alpha=1 / slots)
    if engine.world.size > 1:
        for total in sums:
            dist.all_reduce(total)
    return {n: (w.detach() * total).abs() for n, w, total in zip(names, weights, sums, strict=True)}


def single_slots(batch: Batch) -> Iterator[Batch]:
    """Cut a micro-batch into its slots."""
    size = len(batch.images) // len(batch.slots)
    for index, slot in enumerate(batch.slots):
        yield batch.part(slice(index * size, (index + 1) * size), (slot,))


@torch.no_grad()
def _copy_model(engine: Engine, objective: Objective) -> nn.Module:
    model = objective.build_model()
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, tensor in engine.items().items():
        own[name].copy_(whole(tensor))
    forms = {name: conv.form for name, conv in engine.module.named_modules() if isinstance(conv, DepthwiseConv2d)}
    for name, form in forms.items():
        model.get_submodule(name).form = form
    return model
