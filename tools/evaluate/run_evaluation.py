"""Evaluate on one process or several of this machine."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.multiprocessing as mp

from cluster.local import reserve_port
from pipeline.data.beton import Beton, open_beton
from pipeline.data.feed import EvaluationFeed
from pipeline.data.subset import Subset
from pipeline.distributed.world import World
from pipeline.errors import DataError, UserError
from pipeline.recipe.sections import DataSettings
from pipeline.training.evaluation import FixedModel, evaluate
from pipeline.weights.heads import read_class_names
from tools.evaluate.answers import Answers, outputs_of, real_answers
from tools.evaluate.evaluated_model import EvaluatedModel, load_evaluated_model
from tools.evaluate.knn import Neighbours, make_bank

POLL_SECONDS = 0.1


@dataclass(frozen=True)
class EvaluationRequest:
    """What `fcmae evaluate` is asked."""

    weights: str
    data: str
    image_size: int | None = None
    crop_pct: float | None = None
    ema: bool | None = None
    classes: str | None = None
    """A file of the names of the classifier's classes."""
    real: str | None = None
    all_outputs: bool = False
    """Answers among all of the classifier's classes, not the data's alone."""
    knn: str | None = None
    """Training images for nearest neighbours, instead of the classifier."""
    batch: int = 64
    bf16: bool = False
    device: str = "auto"
    timeout_seconds: float = 600.0


@dataclass(frozen=True)
class EvaluationResult:
    """`metrics` in percent, and what was evaluated how."""

    metrics: dict[str, float]
    subject: str
    variant: str | None
    weights: str
    image_size: int
    crop_pct: float
    classes: int
    """Of the data, among which the answers are."""
    missing: tuple[str, ...]
    """Those that the classifier does not have: their images are all wrong."""
    data: str
    data_sha256: str

    def __str__(self) -> str:
        resized = "squashed" if self.crop_pct == 1 else f"cut from {int(self.image_size / self.crop_pct)}"
        lines = [
            f"{self.subject} ({self.variant or 'of no published shape'}, {self.weights}) on {self.data}",
            f"{self.metrics['images']:,} images of {self.classes:,} classes, {self.image_size} px {resized}:"
            f" top-1 {self.metrics['top1']:.3f} %, top-5 {self.metrics['top5']:.3f} %",
        ]
        if self.missing:
            lines.append(
                f"{len(self.missing)} of the classes are not the classifier's ({', '.join(self.missing[:5])}"
                f"{', ...' if len(self.missing) > 5 else ''}): their images count as wrong"
            )
        return "\n".join(lines)


def run_evaluation(job: EvaluationRequest, processes: int = 1) -> EvaluationResult:
    """Evaluate; every image counts once, whatever the number of processes.

    Raises:
        UserError: if weights and data do not go together, or cannot be read.
    """
    if processes == 1:
        return _rank(0, job)
    with reserve_port() as meeting:
        return _spread(job, processes, meeting.getsockname()[1])


def _spread(job: EvaluationRequest, processes: int, port: int) -> EvaluationResult:
    answers = mp.get_context("spawn").SimpleQueue()
    answer: EvaluationResult | str | None = None
    try:
        context = mp.spawn(_spawned, (processes, port, job, answers), nprocs=processes, join=False)
        # A process cannot end before its answer is taken: one with many names is longer than a pipe holds.
        while not context.join(POLL_SECONDS):
            answer = answer or _taken(answers)
    except mp.ProcessRaisedException:
        answer = answer or _taken(answers)
        if answer is None:
            raise
    except mp.ProcessExitedException as error:
        raise UserError(f"a process of the evaluation has ended: {error}; try a smaller --batch") from None
    answer = answer or _taken(answers)
    if isinstance(answer, str):
        raise UserError(answer)
    return answer


def _taken(answers: Any) -> EvaluationResult | str | None:
    return None if answers.empty() else answers.get()


def _spawned(rank: int, processes: int, port: int, job: EvaluationRequest, answers: Any) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    os.environ.update({name: str(value) for name, value in place.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    try:
        result = _rank(rank, job)
    except UserError as error:
        answers.put(str(error))
        raise
    if rank == 0:
        answers.put(result)


def _rank(rank: int, job: EvaluationRequest) -> EvaluationResult:
    subject = load_evaluated_model(job.weights, ema=job.ema, image_size=job.image_size, crop_pct=job.crop_pct)
    beton = open_beton(job.data)
    world = World.join(job.device, timeout_seconds=job.timeout_seconds)
    try:
        model = FixedModel(subject.model, world, job.bf16)
        outputs: list[int | None] = list(range(len(beton.classes)))
        if job.knn:
            train = open_beton(job.knn)
            if train.classes != beton.classes:
                raise DataError(f"{job.knn} and {job.data} hold different classes; prepare them with the same names")
            bank = make_bank(model, _feed(job, subject, train, world))
            scorer: Any = Neighbours(*bank, len(beton.classes))
        else:
            if not subject.classes:
                raise DataError(
                    f"{job.weights} has no head, so it gives no classes; give --knn TRAIN.beton to vote by neighbours"
                )
            names = read_class_names(job.classes) if job.classes else subject.class_names
            outputs = outputs_of(beton.classes, names, subject.classes)
            real = real_answers(job.real, beton, outputs) if job.real else None
            scorer = Answers(outputs, real, restricted=not job.all_outputs)
        metrics = evaluate(model, scorer, _feed(job, subject, beton, world))
        assert metrics is not None
    finally:
        world.leave()
    missing = tuple(name for name, output in zip(beton.classes, outputs, strict=True) if output is None)
    return EvaluationResult(
        metrics,
        str(job.weights),
        subject.name,
        subject.weights,
        subject.image_size,
        subject.crop_pct,
        len(beton.classes),
        missing,
        str(Path(job.data)),
        beton.sha256,
    )


def _feed(job: EvaluationRequest, subject: EvaluatedModel, beton: Beton, world: World) -> EvaluationFeed:
    settings = DataSettings(
        train=str(beton.path),
        image_size=subject.image_size,
        crop_pct=subject.crop_pct,
        timeout_seconds=job.timeout_seconds,
    )
    return EvaluationFeed(Subset(beton), settings, job.batch, world, workers=max(world.cores() - 1, 1))
