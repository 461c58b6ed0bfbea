"""The kinds of trained models, and which methods and options are whose."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NoReturn

from pipeline.errors import CheckpointError, UserError, first_line

if TYPE_CHECKING:
    import torch

    from tools.weights.model import OpenedWeights

Kind = Literal["classifier", "segmenter", "detector"]
KINDS: Mapping[str, Kind] = {"segmentation": "segmenter", "detection": "detector"}  # by objective; others: classifier
ANSWERS: Mapping[Kind, str] = {"classifier": "predict", "segmenter": "segment", "detector": "detect"}  # its method
_OTHERS = ("embed", "transform", "logits", "predict_pixels", "logits_of_pixels", "features_of_pixels", "maps_of_pixels")


class TrainedModel:
    """What models of all kinds share: their device, and a sentence where another kind's method is called."""

    kind: ClassVar[Kind]
    source: str
    network: "torch.nn.Module"

    @property
    def device(self) -> "torch.device":
        """The device that computes."""
        return next(self.network.parameters()).device

    def predict(self, *_: Any, **__: Any) -> Any:
        """Name classes of images; a classifier's."""
        self._refuse("predict")

    def segment(self, *_: Any, **__: Any) -> Any:
        """Name the class of each pixel; a segmenter's."""
        self._refuse("segment")

    def detect(self, *_: Any, **__: Any) -> Any:
        """Find objects; a detector's."""
        self._refuse("detect")

    def features(self, *_: Any, **__: Any) -> Any:
        """Compute pooled features; those of a classifier or an encoder."""
        self._refuse("features")

    def maps(self, *_: Any, **__: Any) -> Any:
        """Compute the maps of the stages; those of a classifier or an encoder."""
        self._refuse("maps")

    def __getattr__(self, name: str) -> Any:
        if name in _OTHERS:
            self._refuse(name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}", name=name, obj=self)

    def _refuse(self, method: str) -> NoReturn:
        other = next((kind for kind, own in ANSWERS.items() if own == method), "classifier")
        if other == self.kind:  # an embedding has no method of this name
            raise UserError(f"{self.source}: a {self.kind} has no {method}(); call features()")
        raise UserError(f"{self.source} is a {self.kind} and {method}() is for a {other}; call {ANSWERS[self.kind]}()")


def kind_of(source: str | PathLike[str]) -> Kind:
    """What weights are: those of a run, a stage, or a file that says so. A pre-trained encoder counts as classifier.

    Raises:
        CheckpointError: if they are a checkpoint's directory.
    """
    from pipeline.stage.directory import Stage  # not above, because these take longer to import than the rest
    from tools.weights.convert import known_facts
    from tools.weights.model import refuse_checkpoint, stage_of

    refuse_checkpoint(str(source))
    if os.path.isdir(source):
        return KINDS.get(Stage(stage_of(Path(source))).recipe.objective.kind, "classifier")
    facts = known_facts(str(source))
    return next((kind for name, kind in KINDS.items() if name in facts), "classifier")


@contextmanager
def opened_as(objective: str, path: str | PathLike[str], ema: bool | None) -> "Iterator[OpenedWeights]":
    """Open weights of a stage with this objective, a key of KINDS; the block reads the facts that describe their model.

    Raises:
        CheckpointError: as `open_weights`, or if there are no such facts, or the block cannot use them.
    """
    from tools.weights.model import open_weights

    opened, remedy = open_weights(str(path), ema=ema), f"give a run of a {objective} stage"
    if opened.facts.get(objective) is None:
        raise CheckpointError(f"{opened.source} holds no {KINDS[objective]}; {remedy}")
    try:
        yield opened
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError) as error:
        # The facts of a file may be anything.
        raise CheckpointError(
            f"{opened.source} describes no {KINDS[objective]} ({first_line(error)}); {remedy}"
        ) from None


def refuse_options(
    source: str | PathLike[str], kind: Kind, options: Mapping[tuple[Kind, ...], Mapping[str, Any]]
) -> None:
    """Refuse options that are for other kinds of models.

    Args:
        options: values by option, by the kinds that have them.

    Raises:
        UserError: if one of another kind is given.
    """
    for kinds, given in options.items():
        for name, value in given.items() if kind not in kinds else ():
            if value is not None and value is not False:
                others = " and ".join(f"{other}s" for other in kinds)
                raise UserError(f"{source} is a {kind}, and {name} is for {others}; leave it out")
