"""Evaluation over all ranks: every image once, whatever their number."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pipeline.data.feed import Batch, EvaluationFeed
from pipeline.engines import Engine
from pipeline.objectives import Objective


def evaluate(
    engine: Engine,
    objective: Objective,
    feed: EvaluationFeed,
    should_stop: Callable[[], bool],
    look: Callable[[nn.Module, Batch], None] = lambda model, batch: None,
) -> dict[str, float] | None:
    """Metrics of the weights that are handed on; None if the ranks agreed to stop. Collective.

    `look` is shown the model and this rank's first batch.
    """
    sums: dict[str, Tensor] = {}
    with engine.evaluating() as model:
        for index, batch in enumerate(feed):
            if should_stop():
                return None
            batch = engine.to_device(batch)
            for name, value in objective.evaluate(model, batch).items():
                value = value.double()
                sums[name] = sums[name] + value if name in sums else value
            if index == 0:
                look(model, batch)
    total = engine.world.sum(torch.stack([value.cpu() for value in sums.values()]))
    return objective.metrics(dict(zip(sums, total.tolist(), strict=True)))
