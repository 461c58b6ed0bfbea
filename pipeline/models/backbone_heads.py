"""The base of models for segmentation and detection: a backbone of any family, and heads that read its maps."""

from torch import nn

from pipeline.models.backbone import Backbone
from pipeline.models.batchnorm import counts_batches
from pipeline.models.initialise import STD, initialise
from pipeline.models.response_norm import ResponseBatchNorm


class BackboneWithHeads(nn.Module):
    """A backbone; a subclass makes its heads between `super().__init__` and `finish`.

    Args:
        backbone: an encoder without head, of at least two stages.
        task: what the model is for, in errors.
    """

    def __init__(self, backbone: Backbone, task: str):
        super().__init__()
        if len(backbone.map_channels) < 2:
            raise ValueError(f"depths {backbone.depths} name one stage; a model for {task} needs two or more")
        if any(isinstance(module, ResponseBatchNorm) for module in backbone.modules()):
            raise ValueError("response is bn, whose statistics no norm group can share; choose another, such as grn")
        self.backbone, self.depths = backbone, backbone.depths

    def finish(self, deviations: dict[str, float], seed: int) -> None:
        """Set the initial weights.

        deviations: the standard deviation of the named tensors; all others are as `initialise` has them.
        """
        self.counts_batches = counts_batches(self)
        self.init_scales = {name: deviation / STD for name, deviation in deviations.items()}
        initialise(self, seed)

    def drop_path_rates(self, rate: float) -> list[float]:
        """The drop-path rate of each row of `keep`, see `Backbone`."""
        return self.backbone.drop_path_rates(rate)


def kaiming_deviation(layer: nn.Module) -> float:
    """The standard deviation of Kaiming's initialisation before a ReLU, with the fan of the outputs."""
    return (2 / _fans(layer)[1]) ** 0.5


def xavier_deviation(layer: nn.Module) -> float:
    """The standard deviation of Xavier's initialisation."""
    return (2 / sum(_fans(layer))) ** 0.5


def _fans(layer: nn.Module) -> tuple[int, int]:
    """The fans of a layer: how many inputs an output sums, and to how many outputs an input goes."""
    outputs, inputs, *kernel = layer.weight.shape
    area = kernel[0] ** 2 if kernel else 1
    return inputs * area, outputs * area
