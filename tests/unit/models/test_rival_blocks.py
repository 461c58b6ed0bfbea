"""The blocks of other networks are those of timm's networks, and counted in Next-ViT-S as by formula."""

from functools import partial

import pytest
import torch
from torch import nn

from pipeline.models import create_model
from pipeline.models.rival_blocks import RIVALS
from tests.oracles import assert_equal_outputs, different_images, oracle, randomise
from tests.unit.models.tiny_models import multiply_adds

DIM = 64


def timm_block(name: str) -> nn.Module:
    oracle("timm", always_in_ci=True)
    from timm.layers import GroupNorm1
    from timm.models.convnext import ConvNeXtBlock
    from timm.models.metaformer import MetaFormerBlock
    from timm.models.resnet import Bottleneck
    from timm.models.twins import Block

    if name == "bottleneck":
        return Bottleneck(DIM, DIM // 4)
    if name == "convnext":
        return ConvNeXtBlock(DIM)
    if name == "local_attention":  # Twins sets this eps
        return Block(DIM, num_heads=2, ws=7, norm_layer=partial(nn.LayerNorm, eps=1e-6))
    options = {"mlp_act": nn.GELU, "mlp_bias": True, "norm_layer": GroupNorm1, "layer_scale_init_value": 1e-5}
    return MetaFormerBlock(DIM, **options)


@torch.no_grad()
@pytest.mark.parametrize("size", [(14, 14), (9, 5)])  # whole windows of attention, and padded ones
@pytest.mark.parametrize("name", RIVALS)
def test_a_block_is_timms(name, size):
    theirs, ours = timm_block(name).double(), RIVALS[name](nn.Identity(), DIM, 32).double()
    tensors = {**theirs.state_dict(), **randomise(dict(theirs.named_parameters()))}
    for key in tensors:
        if key.endswith("running_var"):
            tensors[key] = torch.linspace(0.5, 2, len(tensors[key]), dtype=torch.float64)
    theirs.load_state_dict(tensors)
    # The names differ, the order is the same.
    pairs = zip(ours.state_dict(), theirs.state_dict().values(), strict=True)
    ours.load_state_dict({key: tensor for key, tensor in pairs})
    x = torch.nn.functional.interpolate(different_images(2, 16), size).repeat(1, 22, 1, 1)[:, :DIM]
    if name == "local_attention":
        expected = theirs.eval()(x.flatten(2).transpose(1, 2), size).transpose(1, 2).unflatten(2, size)
    else:
        expected = theirs.eval()(x)
    assert_equal_outputs(ours.eval()(x), expected, 1e-12)
    ours.fold()
    assert_equal_outputs(ours(x), expected, 1e-12)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in ours.modules())


# Parameters and GMACs of Next-ViT-S with the block in the place of all 16 NCBs; NCB's are the released model's.
COUNTS = {
    "ncb": (31_763_368, 5.794),
    "bottleneck": (15_330_952, 2.464),
    "convnext": (32_958_568, 5.771),
    "local_attention": (42_702_472, 7.720),
    "pooling": (32_701_384, 5.672),
}
CHANNELS = [96] * 3 + [192] * 3 + [384] * 8 + [768] * 2  # of the blocks that are replaced
SITES = [56 * 56] * 3 + [28 * 28] * 3 + [14 * 14] * 8 + [7 * 7] * 2


def formula(name: str, c: int) -> tuple[int, int]:
    """Parameters, and multiply-adds of a site, of one block of C channels."""
    if name == "ncb":  # 3x3 in groups of 32, 1x1, an MLP of 3C with biases; norms
        return 9 * 32 * c + c * c + 6 * c * c + 4 * c + 4 * c, 9 * 32 * c + 7 * c * c
    if name == "bottleneck":
        weights = c * (c // 4) * 2 + 9 * (c // 4) ** 2
        return weights + 4 * (c // 4) + 2 * c, weights
    if name == "convnext":
        return 49 * c + 8 * c * c + 5 * c + c + 2 * c + c, 49 * c + 8 * c * c
    if name == "local_attention":  # scores and their products with the values: 49 tokens each
        return 12 * c * c + 9 * c + 4 * c, 12 * c * c + 2 * 49 * c
    return 8 * c * c + 5 * c + 4 * c + 2 * c, 8 * c * c


@pytest.mark.parametrize("name", COUNTS)
def test_parameters_and_multiply_adds_in_the_place_of_ncb(name):
    with torch.device("meta"):
        model = create_model("nextvit_small", block=name)
    parameters, macs = sum(p.numel() for p in model.parameters()), multiply_adds(model, 224)
    assert (parameters, macs) == (COUNTS[name][0], pytest.approx(COUNTS[name][1], abs=5e-4))
    of_ncb = [formula("ncb", c) for c in CHANNELS]
    own = [formula(name, c) for c in CHANNELS]
    assert parameters - COUNTS["ncb"][0] == sum(a[0] - b[0] for a, b in zip(own, of_ncb, strict=True))
    change = sum(s * (a[1] - b[1]) for s, a, b in zip(SITES, own, of_ncb, strict=True)) / 1e9
    assert macs - COUNTS["ncb"][1] == pytest.approx(change, abs=1e-3)
