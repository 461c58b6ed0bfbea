"""Evaluate weights with one process or several processes of this machine."""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.multiprocessing as mp

from cluster.local import reserve_port
from pipeline.data.batch import Batch
from pipeline.data.beton import open_beton
from pipeline.data.subset import Subset
from pipeline.distributed.processes import die_with_parent
from pipeline.distributed.world import World
from pipeline.errors import DataError, UserError, counted, describe_full_gpu
from pipeline.recipe.image_size import ImageSize, describe_size, height_and_width
from pipeline.training.evaluation import FixedModel, evaluate
from pipeline.weights.heads import read_class_names
from pipeline.weights.input_channels import Adaptation
from tools.evaluate.answers import Answers, outputs_of, real_answers
from tools.evaluate.confusions import Confusions
from tools.evaluate.knn import Neighbours, collect_features
from tools.evaluate.stored_images import evaluation_batches
from tools.predict.image_model import BATCH, ImageModel, load_image_model

R = TypeVar("R")
POLL_SECONDS = 0.1


@dataclass(frozen=True)
class EvaluationRequest:
    """The arguments of `fcmae evaluate`."""

    weights: str
    data: str
    image_size: ImageSize | None = None
    crop_pct: float | None = None
    ema: bool | None = None
    channels: Adaptation | None = None
    """How the weights are adapted to another number of input channels."""
    classes: str | None = None
    """File with the class names of the classifier's outputs."""
    real: str | None = None
    all_outputs: bool = False
    """Compare all outputs, not only those of the data's classes."""
    knn: str | None = None
    """A .beton file of training images: classify by nearest neighbours instead of the head."""
    batch: int = BATCH
    bf16: bool = False
    device: str = "auto"
    timeout_seconds: float = 600.0


@dataclass(frozen=True)
class EvaluationResult:
    """`metrics` in percent, and what was evaluated, how, and on which data."""

    metrics: dict[str, float]
    subject: str
    variant: str | None
    weights: str
    image_size: ImageSize
    crop_pct: float
    classes: int
    """Classes of the data."""
    missing: tuple[str, ...]
    """Classes that the classifier lacks: their images count as wrong."""
    data: str
    data_sha256: str
    in_channels: int = 3
    """Channels of the network's input; with 1 the images were made grey."""
    neighbours_of: str | None = None
    """The training images whose nearest neighbours voted; None if the head answered."""
    stage: str | None = None
    """The stage directory of the weights, where they have one."""
    confusions: Confusions | None = None
    classes_with_images: int | None = None
    """Of the data's classes."""
    outputs: int | None = None
    """Outputs of the classifier, if only those of the data's classes were compared and it has others."""
    precision: Literal["fp32", "bf16"] = "fp32"

    real: str | None = None
    """The file of ImageNet-ReaL whose labels judged, in place of the images' own."""

    @property
    def input(self) -> str:
        """What goes through the network, in words."""
        cover = describe_size([int(side / self.crop_pct) for side in height_and_width(self.image_size)])
        resized = "squashed" if self.crop_pct == 1 else f"cut from {cover}"
        return f"{describe_size(self.image_size)} px {resized}{', in grey' if self.in_channels == 1 else ''}"

    @property
    def conditions(self) -> list[str]:
        """What else the figures depend on: a sentence for each thing."""
        said = [f"judged by the labels of {self.real}"] if self.real else []
        if self.outputs is not None:
            known = self.classes - len(self.missing)
            said.append(
                f"compared were {known:,} of the classifier's {self.outputs:,} outputs: those of the data's classes"
            )
        if self.missing:
            said.append(
                f"the classifier lacks {len(self.missing)} of the classes ({', '.join(self.missing[:5])}"
                f"{', ...' if len(self.missing) > 5 else ''}): their images count as wrong"
            )
        return said

    def __str__(self) -> str:
        lines = [
            f"{self.subject} ({self.variant or 'of no published shape'}, {self.weights}) on {self.data}"
            + (f", by the nearest neighbours in {self.neighbours_of}" if self.neighbours_of else ""),
            f"{counted(self.metrics['images'], 'image')} of {self._classes()}, {self.input}:"
            f" top-1 {self.metrics['top1']:.3f} %, top-5 {self.metrics['top5']:.3f} %",
            *self.conditions,
        ]
        return "\n".join(lines)

    def _classes(self) -> str:
        some = self.classes_with_images not in (None, self.classes)
        all_classes = counted(self.classes, "class", "classes")
        return f"{self.classes_with_images:,} of {all_classes}" if some else all_classes


def run_evaluation(request: EvaluationRequest, processes: int = 1) -> EvaluationResult:
    """Measure accuracy. Every image counts once, for any number of processes.

    Raises:
        UserError: if the weights and the data do not match, or one cannot be read.
    """
    return run_on_processes(partial(_evaluate, request), processes)


def run_on_processes(work: Callable[[], R], processes: int) -> R:
    """Call `work` on so many ranks of this machine, each a process of its own unless it is one; return rank 0's result.

    Raises:
        UserError: if a rank raises one, or is killed.
    """
    if processes == 1:
        return work()
    with reserve_port() as port:
        return _run_processes(work, processes, port.getsockname()[1])


def _run_processes(work: Callable[[], R], processes: int, port: int) -> R:
    answers = mp.get_context("spawn").SimpleQueue()
    answer: R | str | None = None
    try:
        with _workers((processes, port, work, answers, os.getpid())) as context:
            # Read the queue meanwhile, because a process cannot exit before a long answer is read from its pipe.
            while not context.join(POLL_SECONDS):
                answer = answer or _received(answers)
    except mp.ProcessRaisedException:
        answer = answer or _received(answers)
        if answer is None:
            raise
    except mp.ProcessExitedException as error:
        raise UserError(f"an evaluation process was killed: {error}; try a smaller --batch") from None
    answer = answer or _received(answers)
    if isinstance(answer, str):
        raise UserError(answer)
    return answer


@contextmanager
def _workers(arguments: tuple) -> Iterator[mp.ProcessContext]:
    """Start `_run_spawned(rank, *arguments)` for each rank; whatever ends the block, Ctrl-C and SIGTERM too, ends them.

    They leave Ctrl-C to this process: a rank that waits for another one's collective would not notice it.
    """
    before = set(multiprocessing.active_children())
    in_main = threading.current_thread() is threading.main_thread()
    earlier = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number)) if in_main else None
    try:
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT,))  # which the new processes inherit
        try:
            context = mp.spawn(_run_spawned, arguments, nprocs=arguments[0], join=False)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        yield context
    finally:
        for process in set(multiprocessing.active_children()) - before:
            process.kill()
            process.join()
        if in_main:
            signal.signal(signal.SIGTERM, earlier)


def _received(answers: Any) -> Any:
    return None if answers.empty() else answers.get()


def _run_spawned(rank: int, processes: int, port: int, work: Callable[[], Any], answers: Any, parent: int) -> None:
    die_with_parent(parent)
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    os.environ.update({name: str(value) for name, value in variables.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    try:
        result = work()
    except UserError as error:
        answers.put(str(error))
        raise
    except torch.OutOfMemoryError as error:
        answers.put(describe_full_gpu(error))
        raise
    if rank == 0:
        answers.put(result)


def _evaluate(request: EvaluationRequest) -> EvaluationResult:
    loaded = load_image_model(
        request.weights,
        ema=request.ema,
        image_size=request.image_size,
        crop_pct=request.crop_pct,
        channels=request.channels,
    )
    beton = open_beton(request.data)
    part, names = Subset(beton), beton.classes
    world = World.join(request.device, timeout_seconds=request.timeout_seconds)
    try:
        model = FixedModel(loaded.network, world, request.bf16)
        outputs: list[int | None] = list(range(len(beton.classes)))
        if request.knn:
            train = open_beton(request.knn)
            if unknown := sorted(set(beton.classes) - set(train.classes)):
                raise DataError(
                    f"--data {request.data} holds class {unknown[0]}, which --knn {request.knn} lacks; prepare both"
                    " with the same class names"
                )
            bank = collect_features(model, _feed(request, loaded, Subset(train), world), loaded.transform.statistics)
            part, names = part.numbered_as(train.classes), train.classes
            scorer: Any = Neighbours(*bank, len(names), loaded.transform.statistics)
        else:
            if not loaded.outputs:
                raise DataError(
                    f"{request.weights} has no head, so it gives no classes; give --knn TRAIN.beton to"
                    " classify by nearest neighbours"
                )
            known = read_class_names(request.classes) if request.classes else loaded.class_names
            outputs = outputs_of(beton.classes, known, loaded.outputs)
            real = real_answers(request.real, beton, outputs) if request.real else None
            scorer = Answers(outputs, real, not request.all_outputs, loaded.transform.statistics)
        metrics = evaluate(model, scorer, _feed(request, loaded, part, world))
        assert metrics is not None
        confusions = scorer.log.confusions(names, world)
    finally:
        world.leave()
    missing = tuple(name for name, output in zip(beton.classes, outputs, strict=True) if output is None)
    return EvaluationResult(
        metrics, str(request.weights), loaded.variant, loaded.weights, loaded.image_size, loaded.crop_pct,
        len(beton.classes), missing, str(Path(request.data)), beton.identity, loaded.network.in_channels, request.knn,
        str(loaded.stage) if loaded.stage else None, confusions, part.classes_with_images,
        _compared_outputs(request, loaded, outputs), "bf16" if request.bf16 else "fp32", request.real,
    )  # fmt: skip


def _compared_outputs(request: EvaluationRequest, loaded: ImageModel, outputs: list[int | None]) -> int | None:
    """How many outputs the classifier has, if some of them were not compared."""
    if request.knn or request.all_outputs or len(set(outputs) - {None}) == loaded.outputs:
        return None
    return loaded.outputs


def _feed(request: EvaluationRequest, loaded: ImageModel, part: Subset, world: World) -> Iterable[Batch]:
    return evaluation_batches(
        part, loaded.transform, request.batch, world,
        workers=max(world.cores() - 1, 1), timeout_seconds=request.timeout_seconds,
    )  # fmt: skip
