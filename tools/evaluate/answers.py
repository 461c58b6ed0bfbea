"""Which output of a classifier is which class of the images, and which answers count as right."""

import json
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
from pipeline.objectives.pixels import normalise

LEAST_AGREEMENT = 0.5  # of real.json with the images' own labels: nine of ten where the order is right


def outputs_of(data: Sequence[str], head: Sequence[str] | None, outputs: int) -> list[int | None]:
    """The output that stands for each class of the data; None for a class that the classifier does not have.

    By name where the head's names are known. Without them, numbers are places in the head (ImageNet-V2's folders), and
    as many classes as outputs are in the head's order (sorted names, as the published classifiers have them).

    Raises:
        DataError: if nothing tells.
    """
    if head is not None:
        if len(head) != outputs:
            raise DataError(f"{len(head)} class names were given for a head of {outputs} outputs; give its own")
        place = {name: output for output, name in enumerate(head)}
        found = [place.get(name) for name in data]
        if any(output is not None for output in found):
            return found
    if all(name.isdecimal() and int(name) < outputs for name in data):
        return [int(name) for name in data]
    if head is None and len(data) == outputs:
        return list(range(outputs))
    known = f"named {head[0]!r}, ..." if head else "whose names are not known"
    raise DataError(
        f"the data has {len(data)} classes ({data[0]!r}, ...) and the classifier {outputs}, {known}; give --classes"
        " with the names of the classifier's classes, of the same kind as the data's"
    )


def real_answers(path: str | Path, beton: Beton, outputs: Sequence[int | None]) -> Tensor:
    """ImageNet-ReaL's right classes: bool (samples, classes of the data), a row without any where none is.

    The file lists for each validation image, by number, the places of its classes in the head of 1000. So the data must
    hold all images in the order of their names, as `fcmae prepare` of the validation archive leaves them.

    Raises:
        DataError: if the file is another one, or the data's own labels say that the order is.
    """
    try:
        listed = json.loads(Path(path).read_bytes())
        lengths = [len(answers) for answers in listed]
        flat = np.array([int(answer) for answers in listed for answer in answers], np.int64)
    except (OSError, ValueError, TypeError):
        raise DataError(f"{path} is no list of lists of classes; give ImageNet-ReaL's real.json") from None
    if len(listed) != beton.samples:
        raise DataError(
            f"{path} has answers for {len(listed)} images and {beton.path} holds {beton.samples}; prepare exactly the"
            " validation images, in the order of their names"
        )
    places = {output: place for place, output in enumerate(outputs) if output is not None}
    if strangers := sorted(set(flat.tolist()) - set(places)):
        raise DataError(f"{path} names class {strangers[0]}, which {beton.path} does not have; prepare all its classes")
    right = torch.zeros(beton.samples, len(outputs), dtype=torch.bool)
    rows = np.repeat(np.arange(len(listed)), lengths)
    right[torch.from_numpy(rows), torch.tensor([places[answer] for answer in flat.tolist()], dtype=torch.int64)] = True
    labels = torch.from_numpy(samples_of(beton)["f1"].astype(np.int64))
    counted = right.any(1)
    agree = right[counted].gather(1, labels[counted, None]).float().mean().item() if counted.any() else 0.0
    if agree < LEAST_AGREEMENT:
        raise DataError(
            f"{path} agrees with {agree:.0%} of the labels of {beton.path}, so its images are in another order; prepare"
            " them from ILSVRC2012_img_val.tar, not from class folders"
        )
    return right


class Answers:
    """Counts right answers.

    Args:
        outputs: see `outputs_of`.
        real: see `real_answers`; images without a right class are not counted.
        restricted: look at the outputs of the data's classes alone, as ImageNet-A and -R are evaluated; else at all.
    """

    def __init__(self, outputs: Sequence[int | None], real: Tensor | None = None, restricted: bool = True):
        self._outputs, self._real, self._restricted = list(outputs), real, restricted
        if not restricted and (real is not None or None in self._outputs):
            raise DataError(
                "all outputs are to be looked at, but some images' classes are not among them or several may be right;"
                " leave --all-outputs out"
            )

    def evaluate(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        logits = model(normalise(batch.images, next(model.parameters()).dtype)).float()
        valid, right = batch.valid.to(logits.device), batch.labels
        if not self._restricted:
            right = torch.tensor(self._outputs, device=logits.device)[right]
        elif self._outputs != list(range(logits.shape[1])):
            logits = self._of_the_data(logits)
        if self._real is not None:
            right = self._real[batch.ids].to(logits.device)
            valid = valid & right.any(1)
        return count_correct(logits, right, valid)

    def _of_the_data(self, logits: Tensor) -> Tensor:
        """(n, outputs) to (n, classes of the data). One that the classifier does not have is never its answer."""
        logits = F.pad(logits, (0, 1), value=-torch.inf)
        chosen = [logits.shape[1] - 1 if output is None else output for output in self._outputs]
        return logits.index_select(1, torch.tensor(chosen, device=logits.device))

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        if not sums["count"]:
            raise DataError("no image counts: each is without a right class, or damaged; look at the files")
        return {**accuracies(sums), "images": int(sums["count"])}
