"""FCMAE's decoders: they learn, never see hidden pixels, and put each patch in its place."""

import pytest
import torch

from pipeline.models import create_model
from pipeline.models.decoder import sine_positions
from pipeline.models.fcmae import FCMAE, group_patches, patchify
from tests.unit.models.tiny_models import scatter_weights, tiny_fcmae, visible_cells

KINDS = ("convnext", "transformer", "unet", "unet_no_skips")


@pytest.mark.parametrize("kind", KINDS)
def test_loss_falls_on_one_batch(kind):
    torch.manual_seed(0)
    model, mask = tiny_fcmae(decoder=kind, decoder_dim=32), visible_cells().mask
    # A smooth picture, so that hidden cells can be predicted from visible ones.
    y, x = torch.meshgrid(torch.linspace(0, 3, 24), torch.linspace(0, 5, 40), indexing="ij")
    images = torch.stack([torch.sin(y + n) * torch.cos(x - n) for n in range(9)]).view(3, 3, 24, 40)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        loss = model(images, mask).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[0] == pytest.approx(1, abs=0.2)  # a prediction of zeros against targets of variance 1
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("kind", KINDS)
def test_packed_equals_masked(kind):
    images, mask = torch.randn(3, 3, 24, 40, dtype=torch.float64), visible_cells().mask
    results = []
    for backend in ("packed", "masked"):
        model = scatter_weights(tiny_fcmae(backend, decoder=kind, decoder_dim=32))
        output = model(images, mask)
        output.loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        results.append({"prediction": output.prediction.detach(), **gradients})
    for name, value in results[1].items():
        assert value.abs().max() > 0, name
        assert (results[0][name] - value).abs().max() <= 1e-12 * value.abs().max().clamp_min(1e-3), name


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_pixels_never_reach_the_prediction(kind):
    model, mask = scatter_weights(tiny_fcmae(decoder=kind, decoder_dim=32)), visible_cells().mask
    pixels = torch.randn(3, 3, 24, 40, dtype=torch.float64, requires_grad=True)
    model(pixels, mask).prediction.square().sum().backward()
    hidden = mask.view(3, 1, 3, 5).repeat_interleave(8, 2).repeat_interleave(8, 3).expand_as(pixels)
    assert pixels.grad[hidden].abs().max() == 0
    assert pixels.grad[~hidden].abs().min() > 0


@pytest.mark.parametrize("skips", [True, False])
def test_a_skip_carries_detail_that_the_last_map_has_lost(skips):
    """Without the last map, a U-Net's prediction depends on the image if and only if it has skips."""
    model = scatter_weights(tiny_fcmae(decoder="unet" if skips else "unet_no_skips", decoder_dim=32))
    with torch.no_grad():
        model.proj.weight.zero_()
    mask = visible_cells().mask
    a, b = (model(torch.randn(3, 3, 24, 40, dtype=torch.float64), mask).prediction for _ in range(2))
    assert torch.equal(a, b) != skips


def test_a_transformer_tells_cells_apart_by_position_alone():
    """In constant images cells differ by position alone, and every hidden cell is predicted differently."""
    model = scatter_weights(tiny_fcmae(decoder="transformer", decoder_dim=32))
    output = model(torch.ones(3, 3, 24, 40, dtype=torch.float64), visible_cells().mask)
    cells = output.prediction.flatten(2).transpose(1, 2)
    distance = torch.cdist(cells, cells) + 9 * torch.eye(15)
    assert distance.min() > 1e-3


def test_positions_are_sines_and_cosines_of_row_and_column():
    table = sine_positions((3, 5), 8, torch.device("cpu"))
    assert table.shape == (3, 5, 8)
    rate = torch.tensor([1.0, 0.01])
    for row, column in ((0, 0), (2, 1), (1, 4)):
        expected = [(row * rate).sin(), (row * rate).cos(), (column * rate).sin(), (column * rate).cos()]
        torch.testing.assert_close(table[row, column], torch.cat(expected))


def test_regrouped_patches_are_the_cells_they_make_up():
    images = torch.randn(2, 3, 16, 24)
    patches = patchify(images, 2).transpose(1, 2).unflatten(2, (8, 12))
    cells = patchify(images, 8).transpose(1, 2).unflatten(2, (2, 3))
    assert torch.equal(group_patches(patches, 8, 4), cells)


def test_names_of_the_published_decoder_are_official():
    names = list(tiny_fcmae().state_dict())
    assert [name for name in names if name.startswith("decoder.")] == [
        f"decoder.0.{name}"
        for name in ("dwconv.weight", "dwconv.bias", "norm.weight", "norm.bias", "pwconv1.weight", "pwconv1.bias",
                     "grn.gamma", "grn.beta", "pwconv2.weight", "pwconv2.bias")
    ]  # fmt: skip
    parts = dict.fromkeys(name.split(".")[0] for name in names)
    assert list(parts) == ["mask_token", "encoder", "proj", "decoder", "pred"]


@pytest.mark.parametrize("normalize", [True, False])
def test_a_perfect_prediction_paints_the_image_and_has_no_loss(normalize):
    model, mask = tiny_fcmae(), visible_cells().mask
    model.normalize_target = normalize
    images = torch.randn(3, 3, 24, 40, dtype=torch.float64)
    target = patchify(images, 8)
    if normalize:
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    prediction = target.transpose(1, 2).unflatten(2, (3, 5))
    assert model.loss(images, prediction, mask).item() < 1e-25
    torch.testing.assert_close(model.paint(images, mask, prediction), images)
    visible_alone = torch.where(mask[:, None].unflatten(2, (3, 5)), prediction, 7.0)
    assert model.loss(images, visible_alone, mask).item() < 1e-25


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"decoder": "vit"}, "decoder is 'vit'; choose one of convnext"),
        ({"decoder": "transformer", "decoder_dim": 48}, "decoder_dim is 48; a transformer decoder needs a multiple"),
        ({"decoder": "unet", "decoder_dim": 50}, "decoder_dim is 50; a U-Net over 3 strides needs a multiple of 4"),
        ({"response": "ln", "grn_statistics": "batch"}, "grn_statistics is batch but the blocks' response is ln"),
    ],
)  # fmt: skip
def test_wrong_choices_are_one_sentence(options, sentence):
    options = {"response": "grn", **options}
    response = options.pop("response")
    encoder = create_model("convnextv2", 0, depths=(1, 1, 1), dims=(4, 6, 8), stem_stride=2, response=response)
    with pytest.raises(ValueError, match=sentence):
        FCMAE(encoder, **options)
