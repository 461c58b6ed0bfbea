"""Models for semantic segmentation: names, counts of parameters, sizes of outputs, gradients."""

import pytest
import torch
import torch.nn.functional as F

from pipeline.models.map_sizes import enlarge, pool
from pipeline.models.segmenter import HeadOptions, create_segmenter
from tests.unit.models.tiny_models import scatter_norms, scatter_weights

V1 = {"response": "none", "layer_scale": 1e-6}
SMALL = {
    "convnextv2": {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)},
    "slak": {"depths": (1, 1), "dims": (8, 16), "kernel_sizes": (7, 5), "small_kernel": 3},
    "nextvit": {"depths": (1, 2), "dims": (24, 24), "pattern": "CH", "head_dim": 4, "stem_dim": 8},
}


def dims(width: int) -> tuple[int, ...]:
    return width, 2 * width, 4 * width, 8 * width


def count(name: str, kind: str = "upernet", channels: int = 512, **options) -> int:
    with torch.device("meta"):
        model = create_segmenter(name, HeadOptions(150, kind, channels), **options)
    return sum(parameter.numel() for parameter in model.parameters())


def test_upernet_on_convnextv2_tiny_has_the_count_of_transformers():
    assert count("convnextv2_tiny") == 60_289_004


@pytest.mark.parametrize(
    ("depth", "width", "millions"), [(9, 96, 60), (27, 96, 82), (27, 128, 122), (27, 192, 235), (27, 256, 391)]
)
def test_upernet_on_convnext_v1_has_the_published_counts(depth, width, millions):
    found = count("convnextv2", depths=(3, 3, depth, 3), dims=dims(width), **V1)
    assert round(found / 1e6) == millions


@pytest.mark.parametrize(
    ("size", "pyramid", "upernet"), [("small", 36.3, 66.3), ("base", 49.3, 79.3), ("large", 62.4, 92.4)]
)
def test_heads_on_nextvit_have_the_published_counts(size, pyramid, upernet):
    classifier = 1024 * 1000 + 1000  # the published counts keep the head of ImageNet
    assert round((count(f"nextvit_{size}", "semantic_fpn", 256) + classifier) / 1e6, 1) == pyramid
    assert round((count(f"nextvit_{size}") + classifier) / 1e6, 1) == upernet


@pytest.mark.parametrize(("size", "millions"), [("tiny", 65), ("small", 91), ("base", 135)])
def test_upernet_on_slak_has_the_published_counts(size, millions):
    """They leave out the 40 % of masked weights. Which layers are masked is not printed; with the linear and the
    downsampling ones all three counts agree, cut to whole millions."""
    with torch.device("meta"):
        model = create_segmenter(f"slak_{size}", HeadOptions(150))
    masked = [p for name, p in model.named_parameters() if "pwconv" in name or "downsample_layers" in name]
    dense = sum(parameter.numel() for parameter in model.parameters())
    assert int((dense - 0.4 * sum(p.numel() for p in masked if p.ndim > 1)) / 1e6) == millions


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("kind", ["upernet", "semantic_fpn"])
@pytest.mark.parametrize("family", SMALL)
def test_logits_have_the_size_of_the_first_map_and_every_parameter_a_gradient(family, kind, norm):
    model = create_segmenter(family, HeadOptions(5, kind, 64, norm, 32), **SMALL[family])
    images = torch.randn(2, 3, 70, 65)
    logits, auxiliary = model(images, dropout_keep=torch.ones(2, sum(model.dropout_channels)))
    first = model.backbone.forward_features(images)[0]
    assert logits.shape == (2, 5, *first.shape[2:])
    assert (auxiliary is not None) == (kind == "upernet")
    (logits.sum() if auxiliary is None else logits.sum() + auxiliary.sum()).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    model.eval()
    assert model(images)[1] is None


@pytest.mark.parametrize("family", SMALL)
def test_an_image_has_the_same_logits_alone_and_batched(family):
    model = scatter_norms(create_segmenter(family, HeadOptions(5, channels=32), **SMALL[family])).double().eval()
    images = torch.randn(3, 3, 64, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    batched = model(images)[0]
    alone = torch.cat([model(image[None])[0] for image in images])
    torch.testing.assert_close(batched, alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("response", ["grn", "none"])
def test_grn_sees_padding_far_away_and_convnext_v1_does_not(response):
    """So an image must have one canvas, or go alone at its own size."""
    options = {"depths": (1, 1), "dims": (6, 8), "response": response, "layer_scale": 1.0}
    backbone = scatter_weights(create_segmenter("convnextv2", HeadOptions(3, channels=32), **options)).backbone
    image = torch.randn(1, 3, 32, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    apart = backbone.forward_features(F.pad(image, (0, 64)))[0] - F.pad(backbone.forward_features(image)[0], (0, 16))
    assert (apart[..., :12].abs().max() > 1e-3) == (response == "grn")
    if response == "none":
        assert apart[..., :12].abs().max() <= 1e-12


def test_running_statistics_move_once_under_checkpointing():
    buffers = []
    for checkpointing in (False, True):
        model = create_segmenter("slak", HeadOptions(3, channels=32), **SMALL["slak"], checkpointing=checkpointing)
        model(torch.ones(2, 3, 32, 32).cumsum(3))[0].sum().backward()
        buffers.append({name: buffer for name, buffer in model.named_buffers() if buffer.is_floating_point()})
    assert any(name.startswith("backbone.") for name in buffers[0])
    for name, buffer in buffers[0].items():
        torch.testing.assert_close(buffers[1][name], buffer, rtol=0, atol=0)


def test_what_does_not_fit_is_refused():
    for options, backbone, problem in (
        (HeadOptions(3, "fpn"), {}, "head is 'fpn'"),
        (HeadOptions(3, norm="layer"), {}, "norm is 'layer'"),
        (HeadOptions(3, channels=48, norm="group"), {}, "48 channels"),
        (HeadOptions(3, channels=32, norm="group"), {}, "channels is 32, .* take 64"),
        (HeadOptions(3), {"depths": (1,), "dims": (8,)}, "one stage"),
        (HeadOptions(3), {"response": "bn"}, "response is bn"),
    ):
        with pytest.raises(ValueError, match=problem):
            create_segmenter("convnextv2", options, **{**SMALL["convnextv2"], **backbone})


@pytest.mark.parametrize("size", [(14, 18), (21, 5), (3, 40), (7, 9)])
def test_enlarging_equals_interpolation(size):
    x = torch.randn(2, 5, 7, 9, dtype=torch.float64)
    expected = F.interpolate(x, size, mode="bilinear", align_corners=False)
    torch.testing.assert_close(enlarge(x, size), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("side", [1, 2, 3, 6, 8])
def test_pooling_equals_adaptive_averages(side):
    x = torch.randn(2, 5, 7, 9, dtype=torch.float64)
    torch.testing.assert_close(pool(x, side), F.adaptive_avg_pool2d(x, side), rtol=0, atol=1e-13)
