"""Evaluation over all ranks: every image once, whatever their number."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from pipeline.data.batch import Batch
from pipeline.data.feed import EvaluationFeed
from pipeline.distributed.world import World


class Subject(Protocol):
    """Whose weights are evaluated: an engine, or a `FixedModel`."""

    world: World

    def evaluating(self) -> AbstractContextManager[nn.Module]:
        """The model in evaluation mode, without gradients."""

    def to_device(self, batch: Batch) -> Batch: ...


class Scorer(Protocol):
    """What is counted: an objective is one."""

    def evaluate(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Sums over the batch's valid images, and their `count`."""

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """The sums over all images and ranks, as metrics."""


@dataclass
class FixedModel:
    """A model that is not trained, on `world`'s device; bf16 is autocast."""

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
    subject: Subject,
    scorer: Scorer,
    feed: EvaluationFeed,
    should_stop: Callable[[], bool] = lambda: False,
    look: Callable[[nn.Module, Batch], None] = lambda model, batch: None,
) -> dict[str, float] | None:
    """Metrics of the weights that are handed on; None if the ranks agreed to stop. Collective.

    `look` is shown the model and this rank's first batch.
    """
    sums: dict[str, Tensor] = {}
    with subject.evaluating() as model:
        for index, batch in enumerate(feed):
            if should_stop():
                return None
            batch = subject.to_device(batch)
            for name, value in scorer.evaluate(model, batch).items():
                value = value.double()
                sums[name] = sums[name] + value if name in sums else value
            if index == 0:
                look(model, batch)
    total = subject.world.sum(torch.stack([value.cpu() for value in sums.values()]))
    return scorer.metrics(dict(zip(sums, total.tolist(), strict=True)))
