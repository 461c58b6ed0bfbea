"""SLaK's published sizes, every form of its kernels, and folding."""

import pytest
import torch

from pipeline.models import create_model
from pipeline.models.batchnorm import BatchNorm
from tests.oracles import as_if_trained, assert_equal_outputs, different_images
from tests.unit.models.tiny_models import multiply_adds, scatter_norms, scatter_weights

# parameters, tensors, GMACs at 224 of the dense models as fvcore counts them
SIZES = {
    "slak_tiny": (50_703_838, 470, 8.735),
    "slak_small": (91_131_820, 920, 16.654),
    "slak_base": (157_950_792, 920, 28.576),
}
FORMS = {
    "slak": {},
    "sequential": {"order": "sequential"},
    "replknet": {"form": "square"},
    "plain": {"form": "square", "small_kernel": None},
}
MICRO = {"depths": (1, 2), "dims": (6, 8), "stem_stride": 2, "kernel_sizes": (9, 7), "small_kernel": 3}


def meta(name, **options):
    with torch.device("meta"):
        return create_model(name, **options)


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def norms_of_blocks(model):
    """GMACs that fvcore counts for norms: 2 for each value of a BatchNorm, 5 for each value of a LayerNorm."""
    total = 0
    for stage, (depth, dim) in enumerate(zip(model.depths, model.dims, strict=True)):
        total += depth * dim * (224 // 4 // 2**stage) ** 2 * (3 * 2 + 5)
    return total / 1e9


@pytest.mark.parametrize("size", SIZES)
def test_published_sizes(size):
    numbers, tensors, gmacs = SIZES[size]
    model = meta(size)
    assert parameters(model) == numbers
    assert len(model.state_dict()) == tensors
    assert round(multiply_adds(model, 224) + norms_of_blocks(model), 3) == gmacs


@pytest.mark.parametrize(
    ("options", "numbers", "gmacs"),
    [
        ({}, 30_816_232, 5.443),
        ({"kernel_sizes": (31, 29, 27, 13)}, 29_952_232, 5.036),
        ({"kernel_sizes": (61, 59, 57, 13)}, 31_248_232, 5.646),
        ({"kernel_sizes": (31, 29, 27, 13), "form": "square"}, 32_120_008, 6.184),
        ({"form": "square"}, 38_605_768, 9.372),
        ({"kernel_sizes": (61, 59, 57, 13), "form": "square"}, 43_144_648, 11.576),
        ({"kernel_sizes": (7,) * 4, "form": "square", "small_kernel": None}, 28_595_752, None),
    ],
)
def test_sizes_of_the_comparison_at_width_1(options, numbers, gmacs):
    model = meta("slak_tiny", width=1.0, **options)
    assert parameters(model) == numbers
    if gmacs:
        assert multiply_adds(model, 224) == pytest.approx(gmacs, rel=0.005)


def test_names_of_a_block_are_the_official_ones_in_their_order():
    names = [name for name in meta("slak_tiny").state_dict() if name.startswith("stages.0.0.")]
    norm = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    branches = ("LoRA1", "LoRA2", "small_conv")
    kernels = [f"large_kernel.{b}.{t}" for b in branches for t in ("conv.weight", *(f"bn.{n}" for n in norm))]
    layers = [f"{layer}.{kind}" for layer in ("norm", "pwconv1", "pwconv2") for kind in ("weight", "bias")]
    assert names == [f"stages.0.0.{name}" for name in ("gamma", *kernels, *layers)]
    shapes = {name: tuple(tensor.shape) for name, tensor in meta("slak_tiny").state_dict().items()}
    assert shapes["stages.0.0.large_kernel.LoRA1.conv.weight"] == (124, 1, 51, 5)
    assert shapes["stages.3.0.large_kernel.LoRA2.conv.weight"] == (998, 1, 5, 13)


def trained(**options):
    return scatter_norms(scatter_weights(create_model("slak", 5, **{**MICRO, **options})))


@pytest.mark.parametrize("form", FORMS)
def test_merging_is_exact(form):
    model = trained(**FORMS[form]).eval()
    images = torch.randn(2, 3, 22, 18, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    with torch.no_grad():
        before = model(images)
        assert model.fold_batchnorm() is model
        after = model(images)
    assert_equal_outputs(after, before, 1e-12)
    assert not any(isinstance(module, BatchNorm) for module in model.modules())
    kernels = {"slak": 2, "sequential": 3, "replknet": 1, "plain": 1}[form]
    convolutions = [m for m in model.stages[0][0].modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(convolutions) == kernels
    if form == "replknet":
        assert "stages.0.0.large_kernel.lkb_reparam.bias" in model.state_dict()


@pytest.mark.slow
@torch.no_grad()
def test_merging_the_published_model_is_exact():
    """At 64 pixels, where the kernels are larger than the maps: 224 pixels would take minutes."""
    images = different_images(2, 64)
    model = as_if_trained(create_model("slak_tiny", 13).double(), images)
    before = model(images)
    after = model.fold_batchnorm()(images)
    assert_equal_outputs(after, before, 1e-12)
    assert not any(isinstance(module, BatchNorm) for module in model.modules())


def test_stripes_are_as_they_are_named():
    """A single pixel shows it: LoRA1 reaches up and down, LoRA2 sideways, both in sequence over the whole square."""
    image = torch.zeros(1, 1, 15, 15, dtype=torch.float64)
    image[..., 7, 7] = 1
    for order, reach in (("parallel", 9 * 3 + 3 * 9 - 3 * 3), ("sequential", 11 * 11)):
        model = create_model("slak", 2, **{**MICRO, "dims": (1, 1), "width": 1.0, "order": order})
        kernel = model.stages[0][0].large_kernel.double().eval()
        with torch.no_grad():
            for name, parameter in kernel.named_parameters():
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
            out = kernel(image)
        assert int((out != 0).sum()) == reach
        assert torch.equal(out, out.flip(2)) == torch.equal(out, out.flip(3)) is True


@pytest.mark.parametrize("form", FORMS)
def test_checkpointing_changes_neither_gradients_nor_buffers(form):
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    keep = torch.tensor([[1.0, 1.0], [2.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    results = []
    for checkpointing in (False, True):
        model = trained(checkpointing=checkpointing, layer_scale=0.5, **FORMS[form])
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        model(images, keep).square().sum().backward()
        after = {n: b for n, b in model.named_buffers() if b.is_floating_point()}
        assert all((after[name] != before[name]).any() for name in after)
        results.append({**after, **{n: p.grad for n, p in model.named_parameters()}})
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    assert all(gradient.abs().max() > 0 for gradient in results[0].values())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"kernel_sizes": (9,)}, "must name the same number of stages"),
        ({"kernel_sizes": (9, 8)}, "kernel size 8 is even"),
        ({"small_kernel": 7}, "small_kernel 7 is not below kernel_sizes"),
        ({"small_kernel": None}, "small_kernel is null"),
        ({"form": "square", "order": "sequential"}, "order is sequential, but form square"),
        ({"form": "round"}, "form is 'round'; choose one of decomposed, square"),
    ],
)
def test_what_does_not_go_together_is_one_sentence(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        create_model("slak", 5, **{**MICRO, **options})
