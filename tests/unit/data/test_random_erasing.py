"""Random erasing: boxes distributed as timm's, normal noise inside, nothing changed outside, all by hash."""

import random

import numpy as np
import pytest
import torch

from pipeline.data.random_erasing import RandomErasing, normal
from tests.oracles import oracle

IDS = np.arange(40_000)


def erased(ids, epoch=0, probability=1.0, size=32, dtype=torch.float32):
    return RandomErasing(3, probability)(torch.full((len(ids), 3, size, size), 9.0, dtype=dtype), ids, epoch)


def test_boxes_are_distributed_as_timms():
    oracle("timm", always_in_ci=True)
    from scipy.stats import ks_2samp
    from timm.data.random_erasing import RandomErasing as Theirs

    theirs, random_state = Theirs(1.0, mode="const", device="cpu"), random.getstate()
    random.seed(0)
    found = []
    for _ in range(1500):
        image = torch.ones(1, 64, 64)
        theirs(image)
        rows, columns = (image[0] == 0).nonzero().T
        found.append([rows.min(), columns.min(), rows.max() - rows.min() + 1, columns.max() - columns.min() + 1])
    random.setstate(random_state)
    boxes = RandomErasing(3, 1.0).boxes(IDS, 0, (64, 64))
    for ours, expected in zip(boxes.T, np.array(found).T, strict=True):
        assert ks_2samp(ours, expected).statistic < 0.05


def test_only_the_box_changes_and_as_often_as_asked():
    erase, ids = RandomErasing(3, 0.25), IDS[:4000]
    boxes, images = erase.boxes(ids, 2, (32, 32)), erased(ids, 2, 0.25)
    assert abs((boxes[:, 2] > 0).mean() - 0.25) < 0.03
    for image, (top, left, height, width) in zip(images, boxes, strict=True):
        inside = torch.zeros(32, 32, dtype=torch.bool)
        inside[top : top + height, left : left + width] = True
        assert ((image != 9) == inside).all()
    assert erased(ids, 0, 0.0).eq(9).all()


def test_boxes_of_a_rectangle_fit_and_cover_the_same_shares():
    erase, size = RandomErasing(3, 1.0), (16, 64)
    top, left, height, width = erase.boxes(IDS, 0, size).T
    assert (top + height <= size[0]).all()
    assert (left + width <= size[1]).all()
    assert (top + height).max() == size[0]
    assert (left + width).max() == size[1]
    share = (height * width / (size[0] * size[1]))[height > 0]
    assert 0.01 < share.min() < 0.03
    assert 0.3 < share.max() < 0.36  # a third, and rounding
    images = erase(torch.full((9, 1, *size), 9.0), IDS[:9], 0)
    assert [int((image != 9).sum()) for image in images] == (height * width)[:9].tolist()


def test_noise_is_standard_normal_and_independent():
    noise = normal(torch.arange(400)[:, None] * 7919, torch.arange(999)).double()
    assert abs(noise.mean()) < 0.01
    assert abs(noise.std() - 1) < 0.01
    assert abs((noise**4).mean() - 3) < 0.05
    assert noise.isfinite().all()
    assert abs((noise[:, 1:] * noise[:, :-1]).mean()) < 0.01
    assert abs((noise[1:] * noise[:-1]).mean()) < 0.01


def test_noise_depends_on_seed_epoch_and_sample_alone():
    whole = erased(IDS[:50])
    np.testing.assert_array_equal(erased(IDS[49::-3]), whole.flip(0)[::3])
    assert (erased(IDS[:50], epoch=1) != whole).flatten(1).any(1).all()
    assert (erased(IDS[:50], dtype=torch.float64).float() == whole).all()
    channels_last = torch.full((50, 3, 32, 32), 9.0).to(memory_format=torch.channels_last)
    assert (RandomErasing(3, 1.0)(channels_last, IDS[:50], 0) == whole).all()


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_tiny_images(size):
    assert erased(IDS[:200], size=size).isfinite().all()
