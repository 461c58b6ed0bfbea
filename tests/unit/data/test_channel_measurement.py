"""Measured means and deviations are those of the squashed images, whoever measures."""

import io

import numpy as np
import pytest
from PIL import Image

from pipeline.data import channel_measurement
from pipeline.data.beton import open_beton
from pipeline.data.beton_writer import BetonWriter
from pipeline.data.channel_measurement import measure_channels
from pipeline.data.subset import Subset, select_subset
from tests.support import CLASSES, tiny_image


@pytest.fixture(scope="module")
def beton(tmp_path_factory):
    """96 images of odd sizes, a third of them JPEGs."""
    path = tmp_path_factory.mktemp("measured") / "data.beton"
    with BetonWriter(path, CLASSES, 96) as writer:
        for number in range(96):
            pixels, label = tiny_image(number, 70 + number % 5)
            if number % 3 == 0:
                file = io.BytesIO()
                Image.fromarray(pixels).save(file, "JPEG", quality=95)
                writer.add(file.getvalue(), label, size=pixels.shape[:2])
            else:
                writer.add(pixels[:, : 60 + number % 7].copy(), label)
    return open_beton(path)


def test_the_numbers_are_those_of_the_squashed_images(beton):
    from tests.support import squashed_images

    pixels = np.stack(squashed_images(beton, 64)).reshape(-1, 3) / 255
    found = measure_channels(Subset(beton))
    np.testing.assert_allclose(found.mean, pixels.mean(0), atol=6e-5)
    np.testing.assert_allclose(found.std, pixels.std(0), atol=6e-5)
    assert all(value == round(value, 4) for value in (*found.mean, *found.std))


def test_they_depend_neither_on_threads_nor_on_batches(beton, monkeypatch):
    expected = measure_channels(Subset(beton))
    monkeypatch.setattr(channel_measurement, "_BATCH", 7)
    assert measure_channels(Subset(beton), workers=3) == expected


def test_grey_numbers_are_those_of_pillows_levels(beton):
    from tests.support import squashed_images

    levels = np.stack([np.asarray(Image.fromarray(image).convert("L")) for image in squashed_images(beton, 64)]) / 255
    found = measure_channels(Subset(beton), channels=1)
    assert len(found.mean) == 1
    np.testing.assert_allclose([*found.mean, *found.std], [levels.mean(), levels.std()], atol=6e-5)


def test_only_images_that_take_part_are_measured_and_of_many_a_part(beton, monkeypatch):
    part = select_subset(beton, classes=CLASSES[:1])
    assert measure_channels(part) != measure_channels(Subset(beton))
    monkeypatch.setattr(channel_measurement, "MOST_IMAGES", 12)
    some = measure_channels(Subset(beton))
    assert some == measure_channels(Subset(beton))
    assert some != measure_channels(part)
