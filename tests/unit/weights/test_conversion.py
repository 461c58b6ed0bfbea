"""Names, shapes and order of elements in every layout, compared with models and formulas."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import CheckpointError
from pipeline.models import create_model
from pipeline.models.fcmae import FCMAE
from pipeline.weights.architecture import ConvNeXtArchitecture
from pipeline.weights.conversion import from_internal, to_internal
from pipeline.weights.inference import infer_architecture
from pipeline.weights.tensor_names import LAYOUTS
from tests.oracles import assert_same, random_weights

SMALL = ConvNeXtArchitecture((1, 1, 2, 1), (8, 16, 24, 32))
CLASSIFIER = ConvNeXtArchitecture(SMALL.depths, SMALL.dims, norm=True, classes=7)
PRETRAINING = ConvNeXtArchitecture(SMALL.depths, SMALL.dims, decoder=(16, 2))


def sparse(tensors):
    """The official sparse layout, element by element as MinkowskiEngine stores them."""
    result = {}
    for name, tensor in tensors.items():
        part, _, last = name.rpartition(".")
        short = part.rpartition(".")[2]
        below = part.startswith("encoder.") and not part.startswith("encoder.downsample_layers.0.")
        if below and last == "weight" and tensor.ndim == 4:
            out, into, height, width = tensor.shape
            kernel = tensor.new_empty(height * width, into, out)
            for h in range(height):
                for w in range(width):
                    kernel[h + height * w] = tensor[:, :, h, w].T
            result[f"{part}.kernel"] = kernel[:, 0] if short == "dwconv" else kernel
        elif below and short == "grn":
            result[name] = tensor.reshape(1, -1)
        elif below and short in ("pwconv1", "pwconv2"):
            result[f"{part}.linear.{last}"] = tensor
        elif below and (short == "norm" or (short == "0" and "downsample" in part)):
            result[f"{part}.ln.{last}"] = tensor
        else:
            result[name] = tensor[None] if below and last == "bias" else tensor
    return result


@pytest.mark.parametrize("stages", [1, 3, 4])
@pytest.mark.parametrize("classes", [0, 7])
def test_the_formula_is_the_model(stages, classes):
    options = {"depths": (1, 2, 3, 1)[:stages], "dims": (8, 16, 24, 32)[:stages], "in_channels": 4, "stem_stride": 2}
    state = create_model("convnextv2", num_classes=classes, **options).state_dict()
    architecture = ConvNeXtArchitecture(**options, norm=classes > 0, classes=classes)
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == architecture.shapes()
    assert list(state) == list(architecture.shapes())
    assert to_internal(state)[1].architecture == architecture


@pytest.mark.parametrize(("dim", "depth"), [(16, 1), (8, 3)])
def test_the_formula_is_fcmae(dim, depth):
    encoder = create_model("convnextv2", depths=(1, 2), dims=(8, 16), stem_stride=2, num_classes=0)
    state = FCMAE(encoder, decoder_dim=dim, decoder_depth=depth).state_dict()
    architecture = ConvNeXtArchitecture((1, 2), (8, 16), stem_stride=2, decoder=(dim, depth))
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == architecture.shapes()
    assert list(state) == list(architecture.shapes())
    assert to_internal(state)[1].architecture == architecture
    assert len(ConvNeXtArchitecture(SMALL.depths, SMALL.dims, decoder=(512, 1)).shapes()) == 81


def test_official_sparse_comes_back_to_the_bit():
    expected = random_weights(PRETRAINING)
    given = sparse(expected)
    assert given["encoder.downsample_layers.1.1.kernel"].shape == (4, 8, 16)
    assert given["encoder.stages.0.0.dwconv.kernel"].shape == (49, 8)
    assert given["encoder.stages.0.0.dwconv.bias"].shape == (1, 8)
    found, report = to_internal(given)
    assert (report.layout, report.architecture) == ("official sparse", PRETRAINING)
    assert_same(found, expected)
    assert_same(to_internal(found)[0], expected)
    assert not report.dropped
    assert not report.missing
    assert sorted(report.names) == sorted(given)
    assert sorted(report.names.values()) == sorted(expected)


def test_a_sparse_encoder_becomes_a_released_one():
    encoder = {name: t for name, t in sparse(random_weights(PRETRAINING)).items() if name.startswith("encoder.")}
    found, report = to_internal(encoder)
    assert report.architecture == SMALL
    assert list(found) == list(SMALL.shapes())
    assert report.missing == ("norm.weight", "norm.bias", "head.weight", "head.bias")
    bare, report = to_internal({name.removeprefix("encoder."): tensor for name, tensor in encoder.items()})
    assert report.layout == "official sparse"
    assert_same(bare, found)


@pytest.mark.parametrize("shape", [(-1,), (1, -1), (1, 1, 1, -1)])
@pytest.mark.parametrize("architecture", [SMALL, CLASSIFIER, PRETRAINING])
def test_grn_of_any_rank(shape, architecture):
    expected = random_weights(architecture)
    given = {name: tensor.reshape(shape) if ".grn." in name else tensor for name, tensor in expected.items()}
    found, report = to_internal(given)
    assert_same(found, expected)
    grn = tuple(name for name in expected if ".grn." in name)
    assert report.reshaped == (() if len(shape) == 4 else grn)


def test_what_the_official_code_makes_of_grn_the_second_time_is_refused_by_name():
    given = {name: t[None, None] if ".grn." in name else t for name, t in random_weights(CLASSIFIER).items()}
    with pytest.raises(CheckpointError, match=r"stages\.0\.0\.grn\.gamma is \(1, 1, 1, 1, 1, 32\) in the file but"):
        to_internal(given)


@pytest.mark.parametrize("layout", ["official", "timm", "transformers"])
@pytest.mark.parametrize("architecture", [SMALL, CLASSIFIER, ConvNeXtArchitecture(SMALL.depths, SMALL.dims, norm=True)])
def test_there_and_back_twice_is_once(layout, architecture):
    expected = random_weights(architecture)
    there, dropped = from_internal(expected, architecture, layout)
    assert dropped == ()
    back, report = to_internal(there)
    assert report.architecture == architecture
    assert_same(back, expected)
    again, _ = from_internal(back, report.architecture, layout)
    assert_same(again, there)
    assert_same(to_internal(expected)[0], expected)


@pytest.mark.parametrize("layout", ["timm", "transformers"])
def test_fcmae_leaves_its_decoder_behind_and_says_so(layout):
    tensors = random_weights(PRETRAINING)
    there, dropped = from_internal(tensors, PRETRAINING, layout)
    assert dropped == tuple(name for name in tensors if not name.startswith("encoder."))
    back, report = to_internal(there)
    assert report.architecture == SMALL
    assert_same(back, {n.removeprefix("encoder."): t for n, t in tensors.items() if n.startswith("encoder.")})
    assert from_internal(tensors, PRETRAINING, "official")[1] == ()


def test_timm_cannot_have_other_stages():
    small = ConvNeXtArchitecture((1, 1), (8, 16))
    with pytest.raises(CheckpointError, match=r"timm builds ConvNeXts of 4 stages .* has 2 behind"):
        from_internal(random_weights(small), small, "timm")


def without(*parts):
    return lambda tensors: {n: t for n, t in tensors.items() if not any(part in n for part in parts)}


def renamed(old, new):
    return lambda tensors: {n.replace(old, new): t for n, t in tensors.items()}


def reshaped(name, *shape):
    return lambda tensors: {n: torch.zeros(shape) if n == name else t for n, t in tensors.items()}


def added(name, *shape):
    return lambda tensors: {**tensors, name: torch.zeros(shape)}


DAMAGES = {
    "a block is gone": (without("stages.2.0."), r"^stages\.2\.0 is absent in the file, though stages\.2\.1 is there"),
    "the last block is gone": (without("stages.3.0."), r"^stages\.3\.0 is absent"),
    "a stage is gone": (without("stages.2.", "downsample_layers.2."), r"^downsample_layers\.2 is absent"),
    "a tensor is gone": (without("stages.1.0.grn.beta"), r"^stages\.1\.0\.grn\.beta is absent .* \(1, 1, 1, 64\)"),
    "the stem is gone": (without("downsample_layers.0.0.weight"), r"^downsample_layers\.0\.0\.weight is absent"),
    "the head's bias is gone": (without("head.bias"), r"^head\.bias is absent in the file but \(7,\)"),
    "the norm before the head is gone": (
        lambda tensors: {n: t for n, t in tensors.items() if not n.startswith("norm.")},
        r"^norm\.weight is absent in the file but \(32,\)",
    ),
    "another width": (reshaped("stages.0.0.norm.weight", 9), r"^stages\.0\.0\.norm\.weight is \(9,\) .* but \(8,\)"),
    "another kernel": (reshaped("stages.0.0.dwconv.weight", 8, 1, 5, 5), r"is \(8, 1, 5, 5\) .* \(8, 1, 7, 7\)"),
    "a wrong rank": (reshaped("downsample_layers.2.1.weight", 24), r"^downsample_layers\.2\.1\.weight is \(24,\)"),
    "nothing in it": (reshaped("head.weight", 0, 32), r"^head\.weight is \(0, 32\)"),
    "half a ConvNeXt V1": (renamed("grn.gamma", "gamma"), r"^stages\.0\.0\.gamma is .* in a ConvNeXt V1 of depths"),
    "a stranger": (added("stages.0.0.attn.qkv.weight", 3), r"^stages\.0\.0\.attn\.qkv\.weight \(3,\) belongs to no"),
    "a fifth stage": (added("stages.4.0.norm.weight", 8), r"^stages\.4\.0\.norm\.weight is \(8,\) .* but absent in a"),
    "a huge number": (added("stages.0.999.norm.weight", 8), r"^stages\.0\.1 is absent .* though stages\.0\.999 is"),
    "a number with zeros": (renamed("stages.0.0", "stages.0.00"), r"^stages\.0\.00\.dwconv\.bias \(8,\) belongs to"),
    "two models": (added("encoder.stages.0.0.norm.weight", 8), r"^downsample_layers.* two models are mixed"),
    "both of one": (added("stem.0.weight", 8, 3, 4, 4), r"^stem\.0\.weight .* official dense, has 70 of its 71"),
    "a ResNet": (lambda _: {"conv1.weight": torch.zeros(64, 3, 7, 7)}, r"^conv1\.weight \(64, 3, 7, 7\) .*no name"),
    "nothing": (lambda _: {}, "there are no tensors"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "sentence"), DAMAGES.values(), ids=DAMAGES)
def test_what_is_unexpected_is_one_sentence(damage, sentence):
    with pytest.raises(CheckpointError, match=sentence) as caught:
        to_internal(damage(random_weights(CLASSIFIER)))
    assert "\n" not in str(caught.value)


def test_two_tensors_of_one_name():
    tensors = sparse(random_weights(PRETRAINING))
    tensors["encoder.stages.0.0.norm.weight"] = tensors["encoder.stages.0.0.norm.ln.weight"]
    with pytest.raises(CheckpointError, match=r"are both encoder\.stages\.0\.0\.norm\.weight in the official sparse"):
        to_internal(tensors)


@pytest.mark.parametrize("shape", [(48, 8), (49, 8, 1, 1), ()])
def test_kernels_must_be_square(shape):
    tensors = sparse(random_weights(PRETRAINING)) | {"encoder.stages.0.0.dwconv.kernel": torch.zeros(shape)}
    with pytest.raises(CheckpointError, match=r"^encoder\.stages\.0\.0\.dwconv\.kernel is \("):
        to_internal(tensors)


FILES = {
    "official dense": random_weights(CLASSIFIER),
    "fcmae": random_weights(PRETRAINING),
    "official sparse": sparse(random_weights(PRETRAINING)),
    "timm": from_internal(random_weights(CLASSIFIER), CLASSIFIER, "timm")[0],
    "transformers": from_internal(random_weights(CLASSIFIER), CLASSIFIER, "transformers")[0],
}


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(LAYOUTS), st.data())
def test_no_tensor_can_change_or_vanish_unseen(layout, data):
    """A file is refused if any tensor of it is removed, renamed or cut."""
    tensors = dict(FILES[layout])
    name = data.draw(st.sampled_from(sorted(tensors)))
    match data.draw(st.sampled_from(["out", "renamed", "cut", "more axes"])):
        case "out":
            del tensors[name]
        case "renamed":
            tensors[name + data.draw(st.sampled_from(["x", ".0", ".weight"]))] = tensors.pop(name)
        case "cut":
            tensors[name] = tensors[name][: tensors[name].shape[0] // 2]
        case "more axes":
            tensors[name] = tensors[name][None, None, None, None]
    with pytest.raises(CheckpointError) as caught:
        to_internal(tensors)
    assert "\n" not in str(caught.value)


def test_a_layout_is_recognised_by_its_names_alone():
    for layout, tensors in FILES.items():
        assert to_internal(dict(reversed(tensors.items())))[1].layout == layout
    assert infer_architecture(PRETRAINING.shapes(), "fcmae") == PRETRAINING
