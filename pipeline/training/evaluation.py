"""Evaluate a model over all ranks: every image counts once, on any number of ranks."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from pipeline.data.batch import Batch
from pipeline.distributed.world import World
from pipeline.engines import Engine
from pipeline.objectives.objective import Scorer


@dataclass
class FixedModel:
    """A model that is evaluated without an engine, on the device of `world`; `bf16` turns autocast on."""

    model: nn.Module
    world: World
    bf16: bool = False

    def __post_init__(self) -> None:
        self.model = self.model.to(self.world.device).eval()

    @contextmanager
    def evaluating(self) -> Iterator[nn.Module]:
        with torch.no_grad(), torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.bf16):
            yield self.model

    def to_device(self, batch: Batch) -> Batch:
        return batch.to(self.world.device)


def evaluate(
    owner: Engine | FixedModel,
    scorer: Scorer,
    feed: Iterable[Batch],
    should_stop: Callable[[], bool] = lambda: False,
    on_batch: Callable[[nn.Module, Batch], None] = lambda model, batch: None,
    around_first: Callable[[], AbstractContextManager] = nullcontext,
) -> dict[str, float] | None:
    """Compute the metrics of the weights that are handed on; None if the ranks agreed to stop. Collective.

    Args:
        owner: holds the model.
        should_stop: the same answer on all ranks; asked before each batch.
        on_batch: gets the model and each batch of this rank, as for pictures.
        around_first: what the first batch is computed in, whose shapes may have to be compiled.
    """
    tally, is_first = scorer.tally(), True
    with owner.evaluating() as model:
        for batch in feed:
            if should_stop():
                return None
            batch = owner.to_device(batch)
            with around_first() if is_first else nullcontext():
                scores = scorer.evaluate(model, batch)
            is_first = False
            tally.add(scores, batch)
            on_batch(model, batch)
    return tally.metrics(owner.world, should_stop)
