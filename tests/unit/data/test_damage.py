"""Damage inside images, which FFCV does not notice: training fails with a sentence that names the sample."""

import numpy as np
import pytest

from pipeline.data import beton as module
from pipeline.data.beton import JPEG, open_beton, samples_of
from pipeline.data.beton_writer import BetonWriter
from pipeline.data.feed import TrainFeed
from pipeline.data.subset import Subset
from pipeline.distributed.world import World
from pipeline.errors import DataError
from pipeline.recipe.sections import BatchSettings, DataSettings
from tests.archives import encoded, photograph
from tests.support import squashed_images

COUNT = 32


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "a.beton"
    with BetonWriter(path, ["x"], COUNT) as writer:
        for number in range(COUNT):
            image = photograph(number, 64)
            if number % 2:
                writer.add(np.array(image), 0)
            else:
                writer.add(encoded(image), 0, size=(image.height, image.width))
    return path


@pytest.fixture
def path(whole, tmp_path):
    for name in ("a.beton", "a.beton.json"):
        (tmp_path / name).write_bytes((whole.parent / name).read_bytes())
    return tmp_path / "a.beton"


def train(path):
    """Read an epoch of training images as a stage does."""
    settings = DataSettings(train=str(path), image_size=32, crop_scale=(0.5, 1), timeout_seconds=300)
    batch = BatchSettings(global_batch=16, slot=8, micro_slots=2)
    feed = TrainFeed(Subset(open_beton(path)), settings, batch, World.alone(), seed=0, workers=1)
    try:
        for step in range(feed.steps_per_epoch):
            list(feed.slots(step))
    finally:
        feed.close()


def overwrite(path, place, content):
    with path.open("r+b") as file:
        file.seek(place)
        file.write(content)


def place_of(path, sample):
    return int(samples_of(open_beton(path))["f0"]["data_ptr"][sample])


def flip(path, sample, offset):
    place = place_of(path, sample) + offset
    overwrite(path, place, bytes([path.read_bytes()[place] ^ 1]))


NAMES_THE_SAMPLE = {
    "JPEG: a bit that the decoder tolerates": (6, lambda p: flip(p, 6, 700)),
    "JPEG: zeros within": (6, lambda p: overwrite(p, place_of(p, 6) + 800, bytes(200))),
    "JPEG: its header": (6, lambda p: overwrite(p, place_of(p, 6), b"xx")),
    "pixels: a bit": (7, lambda p: flip(p, 7, 0)),
    "pixels: zeros": (7, lambda p: overwrite(p, place_of(p, 7), bytes(500))),
}


@pytest.mark.parametrize("damage", NAMES_THE_SAMPLE)
def test_names_the_sample(path, damage):
    sample, harm = NAMES_THE_SAMPLE[damage]
    harm(path)
    open_beton(path)
    with pytest.raises(DataError, match=rf"sample {sample} of .*a\.beton is"):
        train(path)


def test_zeroed_page_names_a_sample(path):
    overwrite(path, module.PAGE_BYTES, bytes(samples_of(open_beton(path))["f0"]["data_ptr"].max() - module.PAGE_BYTES))
    with pytest.raises(DataError, match=r"sample \d+ of .*a\.beton is"):
        train(path)


def test_no_damage_no_error(whole):
    train(whole)


def test_every_bit_counts(path):
    """One flipped bit in each JPEG: some of them pass the decoder, all are found by the checksum."""
    from pipeline.data.decode import jpeg_status
    from tools.verify.beton_file import verify_beton

    numbers, forgiven = np.random.default_rng(0), 0
    beton = open_beton(path)
    samples = samples_of(beton)
    for sample in np.flatnonzero(samples["f0"]["mode"] == JPEG):
        content = bytearray(encoded(photograph(int(sample), 64)))
        offset = int(numbers.integers(650, len(content) - 2))
        content[offset] ^= 1
        forgiven += jpeg_status(bytes(content), *samples["f0"][["height", "width"]][sample].tolist()) == 0
        flip(path, sample, offset)
    assert forgiven > 0, "libjpeg finds every flipped bit by itself"
    _, damage = verify_beton(path, full=True, workers=2)
    assert len(damage) == 1 + COUNT // 2


@pytest.mark.slow
def test_beyond_4_gib(tmp_path):
    """A sparse file: five of nine images lie beyond what 32 bits address; our loader and FFCV's own read them."""
    images = [np.array(photograph(number, 64).resize((32, 32))) for number in range(9)]
    with BetonWriter(tmp_path / "a.beton", ["x"], 9) as writer:
        for number, image in enumerate(images):
            if number == 4:
                writer._end += (4 << 30) - 100  # leave a hole, as if 4 GiB of images lay before
            writer.add(image, 0)
    beton = open_beton(tmp_path / "a.beton")
    assert beton.size_bytes > 1 << 32
    np.testing.assert_array_equal(squashed_images(beton, 32), images)

    from ffcv.fields.decoders import IntDecoder, SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.pipeline import Compiler

    Compiler.set_enabled(False)
    try:
        pipelines = {"image": [SimpleRGBImageDecoder()], "label": [IntDecoder()]}
        ((theirs, _),) = Loader(str(beton.path), 9, 1, order=OrderOption.SEQUENTIAL, pipelines=pipelines)
    finally:
        Compiler.set_enabled(True)
    np.testing.assert_array_equal(theirs, images)
