"""Match a classifier's outputs to the classes of the images, and count correct answers."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.data.batch import Batch
from pipeline.data.beton import Beton, samples_of
from pipeline.errors import DataError
from pipeline.objectives.classification import accuracies, count_correct
from pipeline.objectives.objective import Scorer, SummedScores
from pipeline.objectives.pixels import normalise
from pipeline.recipe.channel_statistics import IMAGENET, ChannelStatistics
from pipeline.storage.bounded_files import read_json
from tools.evaluate.confusions import AnswerLog

LEAST_AGREEMENT = 0.5  # of real.json with the images' own labels; it is about 0.9 where the images' order is right


def outputs_of(data: Sequence[str], head: Sequence[str] | None, outputs: int) -> list[int | None]:
    """Find the output of the classifier for each class of the data; None where the classifier lacks the class.

    Classes are matched by name if the head's names are known. Otherwise numeric class names are output numbers (the
    folders of ImageNet-V2), and as many classes as outputs are in the order of the outputs (sorted names, as the
    published classifiers have them).

    Args:
        data: class names of the data, in their order.
        head: class names of the outputs, if known.
        outputs: number of outputs.

    Raises:
        DataError: if the classes cannot be matched.
    """
    if head is not None:
        if len(head) != outputs:
            raise DataError(
                f"--classes names {len(head)} classes and the head has {outputs} outputs; give the head's own names"
            )
        output_of = {name: output for output, name in enumerate(head)}
        matched = [output_of.get(name) for name in data]
        if any(output is not None for output in matched):
            return matched
    if all(name.isdecimal() and int(name) < outputs for name in data):
        return [int(name) for name in data]
    if head is None and len(data) == outputs:
        return list(range(outputs))
    names = f"named {head[0]!r}, ..." if head else "whose names are not known"
    raise DataError(
        f"the data has {len(data)} classes ({data[0]!r}, ...) and the classifier {outputs}, {names}; give --classes"
        " with the names of the classifier's outputs, spelled as in the data"
    )


def real_answers(path: str | Path, beton: Beton, outputs: Sequence[int | None]) -> Tensor:
    """Read ImageNet-ReaL's correct classes as bool (samples, classes of the data). A row may be empty.

    The file lists the correct outputs of each validation image in the order of the images' names. So the data must hold
    all images in that order, as `fcmae prepare` writes them from the validation archive.

    Args:
        path: real.json.
        outputs: see `outputs_of`.

    Raises:
        DataError: if this is another file, or it contradicts the labels of the data.
    """
    try:
        listed = read_json(path)
        lengths = [len(answers) for answers in listed]
        flat = np.array([int(answer) for answers in listed for answer in answers], np.int64)
    except (OSError, ValueError, TypeError, OverflowError):
        raise DataError(f"{path} is no list of lists of class numbers; give ImageNet-ReaL's real.json") from None
    if len(listed) != beton.samples:
        raise DataError(
            f"{path} has answers for {len(listed)} images and {beton.path} holds {beton.samples}; prepare exactly the"
            " validation images, in the order of their names"
        )
    class_of = {output: number for number, output in enumerate(outputs) if output is not None}
    if unknown := sorted(set(flat.tolist()) - set(class_of)):
        raise DataError(f"{path} names class {unknown[0]}, which {beton.path} does not have; prepare all its classes")
    right = torch.zeros(beton.samples, len(outputs), dtype=torch.bool)
    rows = np.repeat(np.arange(len(listed)), lengths)
    right[torch.from_numpy(rows), torch.tensor([class_of[answer] for answer in flat.tolist()], dtype=torch.int64)] = (
        True
    )
    labels = torch.from_numpy(samples_of(beton)["f1"].astype(np.int64))
    counted = right.any(1)
    agree = right[counted].gather(1, labels[counted, None]).float().mean().item() if counted.any() else 0.0
    if agree < LEAST_AGREEMENT:
        raise DataError(
            f"{path} agrees with {agree:.0%} of the labels of {beton.path}, so its images are in another order; prepare"
            " them from ILSVRC2012_img_val.tar, not from class folders"
        )
    return right


class Answers(Scorer):
    """Scorer: counts correct answers, and keeps each answer in `log` where an image has one correct class.

    Args:
        outputs: see `outputs_of`.
        real: see `real_answers`; images without a correct class are not counted.
        restricted: compare only the outputs of the data's classes, as the evaluation of ImageNet-A and -R does;
            otherwise compare all outputs.
        statistics: by which the images are normalised.

    Raises:
        DataError: if not restricted, and with `real` or with classes that the classifier lacks.
    """

    def __init__(
        self,
        outputs: Sequence[int | None],
        real: Tensor | None = None,
        restricted: bool = True,
        statistics: ChannelStatistics = IMAGENET,
    ):
        self._outputs, self._real, self._restricted = list(outputs), real, restricted
        self._statistics = statistics
        self.log = AnswerLog()
        if not restricted and (real is not None or None in self._outputs):
            raise DataError(
                "--all-outputs needs one correct output for each image, but --real allows several, or the classifier"
                " lacks some classes; leave --all-outputs out"
            )

    def evaluate(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        logits = model(normalise(batch.images, next(model.parameters()).dtype, self._statistics)).float()
        valid, right = batch.valid.to(logits.device), batch.labels
        if not self._restricted:
            right = torch.tensor(self._outputs, device=logits.device)[right]
        elif self._outputs != list(range(logits.shape[1])):
            logits = self._of_the_data(logits)
        if self._real is not None:
            right = self._real[batch.ids].to(logits.device)
            valid = valid & right.any(1)
        else:  # of several correct classes none is the one that was confused
            self.log.add(batch.labels, self._class_of(logits.argmax(1)), batch.valid)
        return count_correct(logits, right, valid)

    def _class_of(self, answers: Tensor) -> Tensor:
        """Turn places in the compared logits (N,) into classes of the data, -1 for any other."""
        if self._restricted:
            return answers
        place = {output: number for number, output in enumerate(self._outputs)}
        return torch.tensor([place.get(answer, -1) for answer in answers.tolist()])

    def _of_the_data(self, logits: Tensor) -> Tensor:
        """(N, outputs) -> (N, classes of the data). Classes that the classifier lacks get -inf, so they never win."""
        logits = F.pad(logits, (0, 1), value=-torch.inf)
        chosen = [logits.shape[1] - 1 if output is None else output for output in self._outputs]
        return logits.index_select(1, torch.tensor(chosen, device=logits.device))

    def tally(self) -> SummedScores:
        return SummedScores(self.metrics)

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        if not sums["count"]:
            raise DataError("no image has a correct class, or all are damaged; check --data and --real")
        return {**accuracies(sums), "images": int(sums["count"])}
