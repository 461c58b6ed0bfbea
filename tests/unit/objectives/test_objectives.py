"""Both objectives: what a mask, a loss and drop path depend on."""

import json
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.batch import Batch
from pipeline.distributed.world import World
from pipeline.errors import DataError
from pipeline.objectives import _KINDS, create_objective
from pipeline.objectives.dropping import draw_keep
from pipeline.objectives.masked_autoencoding import draw_mask
from pipeline.objectives.mixing import draw_mix
from pipeline.objectives.objective import Objective
from pipeline.objectives.pixels import normalise
from pipeline.recipe import StageRecipe, load_recipe
from pipeline.recipe.image_size import height_and_width
from tests.support import write_tiny_recipe


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    return load_recipe(write_tiny_recipe(tmp_path_factory.mktemp("recipe"))).stages


def batch(slots=(0, 1), size=8, pixels=16, epoch=0):
    n = len(slots) * size
    generator = torch.Generator().manual_seed(1)
    ids = torch.cat([torch.arange(s * size, (s + 1) * size) for s in slots])
    images = torch.randint(0, 256, (4 * size, 3, *height_and_width(pixels)), generator=generator, dtype=torch.uint8)[
        ids
    ]
    return Batch(images, ids % 4, ids, epoch, tuple(slots), torch.ones(n, dtype=torch.bool))


@given(
    seed=st.integers(0, 2**62), epoch=st.integers(0, 2000), cells=st.integers(2, 144),
    ratio=st.floats(0.05, 0.95), ids=st.lists(st.integers(0, 10**7), min_size=1, max_size=9, unique=True),
)  # fmt: skip
@settings(max_examples=50)
def test_masks_hide_the_same_number_and_depend_on_the_sample_alone(seed, epoch, cells, ratio, ids):
    mask = draw_mask(seed, epoch, np.array(ids), cells, ratio)
    assert ((~mask).sum(1) == max(int(cells * (1 - ratio)), 1)).all()
    for row, sample in zip(mask, ids, strict=True):
        assert torch.equal(draw_mask(seed, epoch, np.array([sample]), cells, ratio)[0], row)


def test_masks_change_with_the_epoch_and_cover_all_cells():
    masks = torch.stack([draw_mask(0, epoch, np.arange(500), 49, 0.6) for epoch in range(4)])
    assert not torch.equal(masks[0], masks[1])
    share = masks.float().mean((0, 1))
    assert (share - 30 / 49).abs().max() < 0.05


@pytest.mark.parametrize("kind", _KINDS.values())
def test_every_objective_is_whole(kind):
    assert issubclass(kind, Objective)
    assert not kind.__abstractmethods__
    assert dict(kind.parts) == {}, "before the first loss"


BACKENDS = ("packed", "masked", *(["spconv"] if find_spec("spconv") else []))  # spconv is an extra


def test_all_backends_pre_train_on_rectangles_alike(stages):
    """Equal losses and gradients in float64, whichever cells are computed; the mask hides the share of all cells."""
    results = {}
    for backend in BACKENDS:
        stage = changed(stages["pretrain"], data={"image_size": (16, 24)}, objective={"encoder_backend": backend})
        objective = create_objective(stage, seed=5)
        model = objective.build_model().double()
        images = batch(pixels=(16, 24))
        assert objective.mask(images).shape == (16, 4 * 6)
        assert int((~objective.mask(images)).sum()) == 16 * 9
        objective.loss(model, images, 1).backward()
        results[backend] = {name: parameter.grad for name, parameter in model.named_parameters()}
        _, mask, painted = objective.paint(model, images)
        hidden = (
            torch.from_numpy(mask)
            .view(-1, 1, 4, 6)
            .repeat_interleave(4, 2)
            .repeat_interleave(4, 3)
            .expand_as(images.images)
        )
        for drawn in painted.values():
            assert torch.equal(torch.from_numpy(drawn)[~hidden], images.images[~hidden])
    for backend in BACKENDS[1:]:
        for name, gradient in results["packed"].items():
            assert (results[backend][name] - gradient).abs().max() <= 1e-12 * gradient.abs().max(), (backend, name)


@pytest.mark.parametrize("backend", ["packed", "masked"])
@pytest.mark.parametrize("decoder", ["convnext", "unet"])
def test_tables_made_ahead_are_all_that_a_step_needs_and_keep_its_bits(stages, backend, decoder):
    stage = changed(stages["pretrain"], objective={"encoder_backend": backend, "decoder": decoder, "decoder_dim": 8})
    objective, results = create_objective(stage, seed=5), []
    for ahead in (False, True):
        model, images = objective.build_model(), batch(epoch=3)
        if ahead:
            visible = objective.prepare(images.ids, images.epoch, torch.device("cpu"))
            images, tables = replace(images, prepared=visible), {id(tensor) for tensor in visible.tensors()}
        loss = objective.loss(model, images, 1)
        loss.backward()
        if ahead:
            assert {id(tensor) for tensor in visible.tensors()} == tables
            assert images.part(slice(1)).prepared is None
        sums = objective.evaluate(model.eval(), images)
        results.append([loss, sums["loss"], *(parameter.grad for parameter in model.parameters())])
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


@pytest.mark.parametrize(
    "model",
    [
        {},
        {"name": "slak", "kernel_sizes": (7, 5), "small_kernel": 3, "width": 1.0},
        {"name": "nextvit", "dims": (24, 48), "pattern": "CH", "stem_dim": 8, "head_dim": 8},
    ],
)
@pytest.mark.parametrize("size", [(16, 40), (40, 16)])
def test_every_family_trains_on_rectangles(stages, model, size):
    stage = changed(stages["finetune"], data={"image_size": size, "erase_probability": 1.0}, model=model)
    objective = create_objective(stage, seed=5)
    network = objective.build_model()
    loss = objective.loss(network, batch((1,), pixels=size), 3)
    loss.backward()
    assert loss.isfinite()
    assert all(parameter.grad is not None for parameter in network.parameters())
    assert objective.evaluate(network.eval(), batch((1,), pixels=size))["count"] == 8


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_an_evaluation_of_damaged_images_alone_says_so(stages, stage):
    objective = create_objective(stages[stage], seed=5)
    tally = objective.tally()
    damaged = batch((1,), pixels=stages[stage].data.image_size)
    damaged = replace(damaged, valid=torch.zeros_like(damaged.valid))
    tally.add(objective.evaluate(objective.build_model().eval(), damaged), damaged)
    with pytest.raises(DataError, match="every image of data"):
        tally.metrics(World.alone(), lambda: False)


def changed(stage, **sections):
    """The stage with other values in its sections."""
    raw = stage.model_dump(mode="json")
    for name, values in sections.items():
        if "name" in values:  # another family
            kept = {"depths": raw[name]["depths"], "dims": raw[name]["dims"], "stem_stride": raw[name]["stem_stride"]}
            raw[name] = kept
        raw[name] |= values
    return StageRecipe.model_validate_json(json.dumps(raw))


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_the_loss_of_two_slots_is_the_mean_of_each_alone(stages, stage):
    """Mixing, masks and drop path depend on the slot alone, not on the micro-batch."""
    objective = create_objective(stages[stage], seed=5)
    model = objective.build_model().double()
    pixels = stages[stage].data.image_size
    for step in range(3):
        together = objective.loss(model, batch((1, 3), pixels=pixels), step)
        alone = [objective.loss(model, batch((slot,), pixels=pixels), step) for slot in (1, 3)]
        assert together.item() == pytest.approx((alone[0] + alone[1]).item() / 2, abs=1e-13)


def test_randomness_changes_with_the_step(stages):
    objective = create_objective(stages["finetune"], seed=5)
    model = objective.build_model()
    losses = {objective.loss(model, batch(pixels=24), step).item() for step in range(6)}
    assert len(losses) == 6


def test_mixed_loss_equals_cross_entropy_with_the_soft_target(stages):
    """timm's soft target: the smoothed one-hot vectors of image and partner, mixed."""
    stage = stages["finetune"]  # here without drop path, so that the test can compute the logits
    stage = stage.model_copy(update={"objective": stage.objective.model_copy(update={"drop_path": 0.0})})
    objective = create_objective(stage, seed=5)
    model = objective.build_model().double()
    model.head.weight.data.mul_(50)
    x = batch((2,), pixels=24)
    for step in range(6):
        mix = draw_mix(5, step, 2, (24, 24), stage.objective.mixup, stage.objective.cutmix)
        logits = model(mix.apply(normalise(x.images, torch.float64)))
        smooth = F.one_hot(x.labels, 4).double() * 0.9 + 0.1 / 4
        target = mix.share * smooth + (1 - mix.share) * smooth.flip(0)
        expected = -(target * logits.log_softmax(1)).sum(1).mean()
        assert objective.loss(model, x, step).item() == pytest.approx(expected.item(), abs=1e-12)


def test_erasing_comes_before_mixing_and_depends_on_the_sample(stages):
    stage = stages["finetune"]
    erasing = stage.model_copy(update={"data": stage.data.model_copy(update={"erase_probability": 1.0})})
    plain, erased = create_objective(stage, seed=5), create_objective(erasing, seed=5)
    model = plain.build_model()
    erased.build_model()
    x = batch(pixels=24)
    whole = erased.loss(model, x, 1)
    assert whole != plain.loss(model, x, 1)
    halves = [erased.loss(model, batch(slots=(slot,), pixels=24), 1) for slot in (0, 1)]
    torch.testing.assert_close(whole, torch.stack(halves).mean())


def test_drop_path_keeps_the_expected_value():
    rates = [0.0, 0.1, 0.2]
    keep = torch.stack([draw_keep(5, step, (0, 1), 64, rates) for step in range(200)])
    assert (keep[:, 0] == 1).all()
    assert keep[:, 2].mean().item() == pytest.approx(1, abs=0.02)
    assert set(keep[:, 2].unique().tolist()) == {0.0, 1 / 0.8}
    assert draw_keep(5, 0, (0, 1), 64, [0.0, 0.0]) is None
