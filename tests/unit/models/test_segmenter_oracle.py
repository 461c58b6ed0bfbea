"""UperNet gives the logits of transformers' UperNet with the same weights."""

import pytest
import torch
from torch import nn

from pipeline.models.map_sizes import enlarge
from pipeline.models.segmenter import HeadOptions, Segmenter, create_segmenter
from pipeline.weights.tensor_names import external_name
from tests.oracles import different_images, oracle, randomise

SHAPE = {"depths": (1, 1, 2, 1), "dims": (16, 24, 32, 48)}


def theirs_of(transformers, shape: dict, head: HeadOptions) -> nn.Module:
    config = transformers.ConvNextV2Config(
        depths=list(shape["depths"]),
        hidden_sizes=list(shape["dims"]),
        layer_norm_eps=1e-6,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    return transformers.UperNetForSemanticSegmentation(
        transformers.UperNetConfig(
            backbone_config=config,
            num_labels=head.classes,
            hidden_size=head.channels,
            auxiliary_channels=head.auxiliary_channels,
            auxiliary_in_channels=shape["dims"][2],
        )
    )


def their_name(name: str) -> str:
    """The name in transformers of a tensor of ours."""
    if name.startswith("backbone.norm"):
        stage, last = name.removeprefix("backbone.norm").split(".")
        return f"backbone.hidden_states_norms.stage{int(stage) + 1}.{last}"
    if name.startswith("backbone."):
        return "backbone." + external_name(name.removeprefix("backbone."), "transformers", False).split(".", 1)[1]
    return name.replace(".bn.", ".batch_norm.").replace("conv_seg", "classifier")


@torch.no_grad()
def largest_difference(ours: Segmenter, theirs: nn.Module, images: torch.Tensor) -> tuple[float, float]:
    """Between the logits at the size of the images, and the deviation of theirs over the images."""
    theirs.load_state_dict({their_name(name): tensor for name, tensor in ours.state_dict().items()})
    expected = theirs.to(images.dtype).eval()(images).logits
    found = enlarge(ours.to(images.dtype).eval()(images)[0], tuple(images.shape[2:]))
    return (found - expected).abs().max().item(), expected.std().item()


@pytest.mark.slow
def test_logits_and_counts_are_those_of_transformers():
    transformers = oracle("transformers", always_in_ci=False)
    head = HeadOptions(7, channels=32, auxiliary_channels=16)
    images = different_images(2, 96)
    ours = create_segmenter("convnextv2", head, **SHAPE)
    apart, _ = largest_difference(ours, theirs_of(transformers, SHAPE, head), images.float())
    assert apart <= 1e-6
    weights = randomise(ours.state_dict())
    variances = {name: tensor.abs() + 0.5 for name, tensor in weights.items() if name.endswith("running_var")}
    ours.double().load_state_dict({**weights, **variances})
    apart, deviation = largest_difference(ours, theirs_of(transformers, SHAPE, head).double(), images)
    assert apart <= 1e-10 * deviation
    with torch.device("meta"):
        tiny = {"depths": (3, 3, 9, 3), "dims": (96, 192, 384, 768)}
        model = theirs_of(transformers, tiny, HeadOptions(150))
    assert sum(parameter.numel() for parameter in model.parameters()) == 60_289_004
