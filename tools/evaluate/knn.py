"""k-nearest-neighbour classification on pooled features: it judges pre-trained weights without training a head.

The 20 training images nearest by cosine similarity vote for their class, each with the weight exp(similarity / 0.07)
(Wu et al. 2018, arXiv 1805.01978; k and temperature as in DINO).
"""

from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.data.batch import Batch
from pipeline.objectives.classification import accuracies, count_correct
from pipeline.objectives.objective import Scorer, SummedScores
from pipeline.objectives.pixels import normalise
from pipeline.recipe.channel_statistics import ChannelStatistics
from pipeline.training.evaluation import FixedModel
from tools.evaluate.confusions import AnswerLog, gather_rows

NEIGHBOURS, TEMPERATURE = 20, 0.07


def unit_features(model: nn.Module, images: Tensor, statistics: ChannelStatistics) -> Tensor:
    """uint8 images (N, 3, H, W) -> unit vectors (N, C) of the pooled features."""
    pooled = model.pooled_features(normalise(images, next(model.parameters()).dtype, statistics))
    return F.normalize(pooled.float(), dim=1)


def collect_features(fixed: FixedModel, feed: Iterable[Batch], statistics: ChannelStatistics) -> tuple[Tensor, Tensor]:
    """Features (images, C) and labels (images,) of all images of the feed, on every rank, in the order of the file."""
    features, labels, ids = [], [], []
    with fixed.evaluating() as model:
        for batch in feed:
            batch = fixed.to_device(batch)
            units = unit_features(model, batch.images, statistics)
            features.append(units[batch.valid.to(batch.images.device)].cpu())
            labels.append(batch.labels.cpu()[batch.valid])
            ids.append(batch.ids[batch.valid])
    parts = [torch.cat(part) for part in (features, labels, ids)]
    whole = [gather_rows(part, fixed.world) for part in parts]
    order = whole[2].argsort()  # ties must not depend on the number of ranks
    return whole[0][order].to(fixed.world.device), whole[1][order].to(fixed.world.device)


class Neighbours(Scorer):
    """Scorer: counts the images that their nearest neighbours classify correctly."""

    def __init__(self, bank: Tensor, labels: Tensor, classes: int, statistics: ChannelStatistics):
        self._bank, self._labels, self._classes, self._statistics = bank, labels, classes, statistics
        self.log = AnswerLog()

    def evaluate(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        features = unit_features(model, batch.images, self._statistics)
        votes = vote(features, self._bank, self._labels, self._classes)
        self.log.add(batch.labels, votes.argmax(1), batch.valid)
        return count_correct(votes, batch.labels, batch.valid.to(votes.device))

    def tally(self) -> SummedScores:
        return SummedScores(self.metrics)

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        return {**accuracies(sums), "images": int(sums["count"])}


def vote(queries: Tensor, bank: Tensor, labels: Tensor, classes: int, rows: int = 1 << 16) -> Tensor:
    """Votes (N, classes) of the nearest vectors in `bank` (images, C) for each of `queries` (N, C).

    rows: vectors of the bank that are compared at a time, which bounds the memory.
    """
    best = queries.new_full((len(queries), 0), 0.0)
    voters = labels.new_zeros(len(queries), 0)
    for first in range(0, len(bank), rows):
        with torch.autocast(queries.device.type, enabled=False):  # bf16 similarities would mostly be ties
            near = queries @ bank[first : first + rows].t()
        near, rank = near.topk(min(NEIGHBOURS, len(bank) - first, rows), dim=1)
        best, voters = torch.cat([best, near], 1), torch.cat([voters, labels[first + rank]], 1)
        best, rank = best.topk(min(NEIGHBOURS, best.shape[1]), dim=1)
        voters = voters.gather(1, rank)
    return best.new_zeros(len(queries), classes).scatter_add_(1, voters, (best / TEMPERATURE).exp())
