"""Next-ViT's published sizes, timm's outputs, its options, and folding."""

import pytest
import torch
import torch.nn.functional as F

from pipeline.models import create_model
from pipeline.models.batchnorm import BatchNorm
from pipeline.models.nextvit import NCB, NTB, Attention, BlockOptions
from pipeline.models.rival_blocks import RIVALS
from tests.oracles import as_if_trained, assert_equal_outputs, different_images, oracle
from tests.unit.models.tiny_models import multiply_adds, scatter_norms, scatter_weights

# parameters, tensors, GMACs at 224 and 384 (the official code, counted by fvcore), indices of the transformer blocks
SIZES = {
    "nextvit_small": (31_763_368, 472, 5.811, 17.263, (6, 11, 16, 19)),
    "nextvit_base": (44_818_856, 692, 8.294, 24.644, (6, 11, 16, 21, 26, 29)),
    "nextvit_large": (57_874_344, 912, 10.777, 32.025, (6, 11, 16, 21, 26, 31, 36, 39)),
}
MICRO = {"depths": (1, 2, 3), "dims": (12, 24, 48), "stem_dim": 8, "stem_stride": 2, "head_dim": 4, "pattern": "CHH"}
IMAGES = different_images(2, 64)


@pytest.mark.parametrize("size", SIZES)
def test_published_sizes(size):
    numbers, tensors, at_224, at_384, transformers = SIZES[size]
    with torch.device("meta"):
        model = create_model(size)
    assert sum(parameter.numel() for parameter in model.parameters()) == numbers
    assert len(model.state_dict()) == tensors
    # fvcore counts norms too: 2 for each value of a BatchNorm
    assert multiply_adds(model, 224) == pytest.approx(at_224, rel=0.004)
    assert multiply_adds(model, 384) == pytest.approx(at_384, rel=0.004)
    assert tuple(i for i, block in enumerate(model.features) if isinstance(block, NTB)) == transformers


def trained(name="nextvit", classes=5, images=IMAGES, **options):
    model = create_model(name, classes, **(MICRO | options if name == "nextvit" else options)).double()
    return as_if_trained(model, images)


# At 80 pixels 1-D pooling leaves tokens out, and maps of odd size are halved.
@torch.no_grad()
@pytest.mark.parametrize(
    ("size", "pixels"),
    [
        pytest.param("nextvit_small", 64, marks=pytest.mark.slow),
        ("nextvit_small", 80),
        pytest.param("nextvit_base", 80, marks=pytest.mark.slow),
        pytest.param("nextvit_large", 80, marks=pytest.mark.slow),
        pytest.param("nextvit_small", 224, marks=pytest.mark.slow),
    ],
)
def test_timm_gives_the_same_logits_before_and_after_merging(size, pixels):
    timm = oracle("timm", always_in_ci=True)
    images = different_images(2, pixels)
    model = trained(size, 13, images)
    with torch.device("meta"):
        theirs = timm.create_model(size, num_classes=13)
    pairs = zip(theirs.state_dict(), model.state_dict().values(), strict=True)  # names differ, the order is the same
    theirs.load_state_dict({name: tensor.clone() for name, tensor in pairs}, assign=True)
    expected = theirs.eval()(images)
    assert_equal_outputs(model(images), expected, 1e-12)
    merged = model.fold_batchnorm()(images)
    assert not any(isinstance(module, BatchNorm) for module in model.modules())
    assert_equal_outputs(merged, expected, 1e-12)
    for module in theirs.modules():
        if hasattr(module, "reparameterize"):
            module.reparameterize()
    assert_equal_outputs(theirs(images), merged, 1e-12)


OPTIONS = {
    "released": {},
    "described": {"pattern": "HHH"},
    "transformers": {"pattern": "TTT"},
    "convolutions": {"pattern": "CCC"},
    "groups": {"pattern": "CCH", "depths": (1, 1, 4), "convolutions_per_transformer": 1},
    "no convolution in NTB": {"shrink": 1.0},
    "half": {"shrink": 0.5},
    "2d": {"pooling": "2d"},
    "layer": {"norm": "layer", "activation": "gelu"},
    **{block: {"block": block} for block in RIVALS},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options_learn_and_merging_is_exact(options):
    model = trained(**options).train()
    rows = len(model.drop_path_rates(0.1))
    keep = 2.0 * (torch.rand(rows, 2, generator=torch.Generator().manual_seed(8)) > 0.5).double()
    model(IMAGES, keep).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    with torch.no_grad():
        before = model.eval()(IMAGES)
        after = model.fold_batchnorm()(IMAGES)
    assert_equal_outputs(after, before, 1e-12)
    assert not any(isinstance(module, BatchNorm) for module in model.modules())
    assert [tuple(x.shape[2:]) for x in model.forward_features(IMAGES)] == [(32, 32), (16, 16), (8, 8)]


def test_patterns_say_where_transformer_blocks_are():
    def kinds(pattern, depths, **options):
        model = create_model("nextvit", 2, **{**MICRO, "pattern": pattern, "depths": depths, **options})
        return ["".join("C" if isinstance(block, NCB) else "T" for block in model.features)]

    assert kinds("CHH", (3, 4, 10)) == ["CCC" + "CCCT" + "CCCCTCCCCT"]
    assert kinds("HHH", (3, 4, 10)) == ["CCT" + "CCCT" + "CCCCTCCCCT"]
    assert kinds("CTH", (1, 2, 6), convolutions_per_transformer=2) == ["C" + "TT" + "CCTCCT"]


def test_pooling():
    """1-D pooling runs along the rows and over their ends, and drops the rest of the last row; 2-D pools squares."""
    x = torch.arange(2 * 6 * 5, dtype=torch.float64).view(1, 2, 6, 5)
    for pooling, expected in (
        ("1d", F.avg_pool1d(x.flatten(2), 4)),
        ("2d", F.avg_pool2d(F.pad(x, (0, 1, 0, 0), mode="replicate"), 2).flatten(2)),
    ):
        attention = Attention(2, 2, BlockOptions(pooling=pooling, head_dim=2)).double()
        seen = []
        attention.norm.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0]))
        attention(x)
        assert torch.equal(seen[0], expected)


def test_rates_of_drop_path_are_the_official_ones():
    """A transformer block gives r of its rate to attention, 1 - r to the convolution, and all to the MLP."""
    model = create_model("nextvit", 2, **MICRO)  # C, CT, CCT
    p = [0.5 * i / 5 for i in range(6)]
    ntb = [[0.75 * rate, 0.25 * rate, rate] for rate in p]
    expected = [p[0]] * 2 + [p[1]] * 2 + ntb[2] + [p[3]] * 2 + [p[4]] * 2 + ntb[5]
    assert model.drop_path_rates(0.5) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("block", ["ncb", *RIVALS])
def test_every_row_of_keep_drops_a_branch_of_its_own(block):
    model = trained(block=block)
    rows = len(model.drop_path_rates(0.1))
    full = torch.ones(rows, 2, dtype=torch.float64)
    with torch.no_grad():
        whole = model(IMAGES, full)
        assert torch.equal(whole, model(IMAGES))
        outputs = []
        for row in range(rows):
            keep = full.clone()
            keep[row, 0] = 0
            out = model(IMAGES, keep)
            assert torch.equal(out[1], whole[1])
            outputs.append(out[0])
    everything = torch.stack([whole[0], *outputs])
    assert len({tuple(logits.tolist()) for logits in everything}) == rows + 1


def test_checkpointing_changes_neither_gradients_nor_buffers():
    results = []
    for checkpointing in (False, True):
        model = scatter_norms(trained(checkpointing=checkpointing)).train()
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        model(IMAGES).square().sum().backward()
        after = {n: b for n, b in model.named_buffers() if b.is_floating_point()}
        assert all((after[name] != before[name]).any() for name in after)
        results.append({**after, **{n: p.grad for n, p in model.named_parameters()}})
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_the_encoder_alone_has_neither_norm_nor_head():
    names = create_model("nextvit", 0, **MICRO).state_dict()
    assert {name.partition(".")[0] for name in names} == {"stem", "features"}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"pattern": "CH"}, "must name the same number of stages"),
        ({"pattern": "CXH"}, "letters C, H and T"),
        ({"depths": (1, 2, 7)}, "a hybrid stage of 7 blocks is no whole number of groups of 4"),
        ({"dims": (12, 24, 50)}, "a block has 50 channels, no multiple of head_dim 4"),
        ({"stem_stride": 3}, "stem_stride is 3; choose 1, 2 or 4"),
        ({"block": "mbconv"}, "block is 'mbconv'; choose one of ncb, bottleneck"),
        ({"norm": "group"}, "norm is 'group'; choose one of batch, layer"),
    ],
)
def test_what_does_not_go_together_is_one_sentence(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        create_model("nextvit", 5, **{**MICRO, **options})


def test_weights_scattered_far_still_merge():
    """Exact relative to the outputs, for weights far from any trained ones."""
    model = scatter_norms(scatter_weights(create_model("nextvit", 5, **MICRO))).eval()
    with torch.no_grad():
        before = model(IMAGES)
        assert (model.fold_batchnorm()(IMAGES) - before).abs().max() <= 1e-12 * before.abs().max()
