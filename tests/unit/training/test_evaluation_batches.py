"""Evaluation over the batches of one rank."""

from contextlib import contextmanager

import torch
from torch import nn

from pipeline.data.batch import Batch
from pipeline.distributed.world import World
from pipeline.objectives.objective import Scorer, SummedScores
from pipeline.training.evaluation import FixedModel, evaluate


def batch(number: int) -> Batch:
    return Batch(torch.full((2, 3, 4, 4), number, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64),
                 torch.arange(2), 0, (), torch.ones(2, dtype=torch.bool))  # fmt: skip


class Sum(Scorer):
    def __init__(self, said: list[str]):
        self.said = said

    def evaluate(self, model, batch):
        self.said.append(f"batch {int(batch.images[0, 0, 0, 0])}")
        return {"sum": batch.images.double().mean(), "count": torch.tensor(1.0)}

    def tally(self):
        return SummedScores(lambda sums: {"mean": sums["sum"] / sums["count"]})


def test_the_first_batch_alone_is_computed_in_what_is_given_for_it():
    said: list[str] = []

    @contextmanager
    def around():
        said.append("begin")
        yield
        said.append("end")

    model = FixedModel(nn.Identity(), World.alone())
    metrics = evaluate(model, Sum(said), [batch(1), batch(3)], around_first=around)
    assert said == ["begin", "batch 1", "end", "batch 3"]
    assert metrics == {"mean": 2.0} == evaluate(model, Sum([]), [batch(1), batch(3)])
