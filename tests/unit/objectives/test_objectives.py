"""Both objectives: what a mask, a loss and drop path depend on."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.batch import Batch
from pipeline.objectives import create_objective
from pipeline.objectives.classification import draw_keep
from pipeline.objectives.masked_autoencoding import draw_mask
from pipeline.objectives.mixing import draw_mix
from pipeline.objectives.pixels import normalise
from pipeline.recipe import load_recipe
from tests.support import write_tiny_recipe


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    return load_recipe(write_tiny_recipe(tmp_path_factory.mktemp("recipe"))).stages


def batch(slots=(0, 1), size=8, pixels=16, epoch=0):
    n = len(slots) * size
    generator = torch.Generator().manual_seed(1)
    ids = torch.cat([torch.arange(s * size, (s + 1) * size) for s in slots])
    images = torch.randint(0, 256, (4 * size, 3, pixels, pixels), generator=generator, dtype=torch.uint8)[ids]
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
        mix = draw_mix(5, step, 2, 24, stage.objective.mixup, stage.objective.cutmix)
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
