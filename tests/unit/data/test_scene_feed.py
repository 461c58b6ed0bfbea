"""Feeds of scenes over real files: the same images and label maps for any ranks, workers and resumes."""

import hashlib
import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.data.batch import example_batch, example_evaluation_batch
from pipeline.data.beton import ALLOCATION, open_beton, sidecar_path
from pipeline.data.beton_writer import BetonWriter
from pipeline.data.feed import TrainFeed
from pipeline.data.maps_file import maps_path
from pipeline.data.open import evaluation_feed, train_feed
from pipeline.data.scene_feed import SceneEvaluationFeed
from pipeline.data.stage_data import check_stage_data
from pipeline.data.subset import Subset, select_subset
from pipeline.data.windows import resized_to_fit, window_places
from pipeline.distributed.world import World
from pipeline.errors import DataError
from pipeline.recipe import StageRecipe
from pipeline.recipe.sections import BatchSettings, DataSettings

SAMPLES, SLOTS, SLOT = 26, 4, 2
STEPS = SAMPLES // (SLOTS * SLOT)


def scene(i, classes):
    """An image, stored as JPEG if its number is odd, and its map: sizes and classes differ."""
    numbers = np.random.default_rng(i)
    height, width = numbers.integers(20, 60, 2).tolist()
    coarse = numbers.integers(0, classes, (4, 4))
    label_map = coarse[np.arange(height) * 4 // height][:, np.arange(width) * 4 // width]
    return numbers.integers(0, 256, (5, 5, 3), np.uint8).repeat(12, 0).repeat(12, 1)[:height, :width], label_map


def write_scenes(path, classes=5):
    dtype = np.uint8 if classes <= 255 else np.uint16
    with BetonWriter(path, [f"class {n}" for n in range(classes)], SAMPLES) as writer:
        for i in range(SAMPLES):
            pixels, label_map = scene(i, classes)
            if i % 2:
                file = io.BytesIO()
                Image.fromarray(pixels).save(file, "JPEG")
                writer.add(file.getvalue(), 0, size=pixels.shape[:2], label_map=label_map.astype(dtype))
            else:
                writer.add(pixels, 0, label_map=label_map.astype(dtype))
    return open_beton(path)


@pytest.fixture(scope="module")
def beton(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp("scenes") / "a.beton")


def data_settings(test="window", **changes):
    scenes = {"base_size": (64, 32), "test": test, "window_step": 16, "crop_tries": 5}
    return DataSettings.model_validate(
        {"train": "-", "image_size": 24, "timeout_seconds": 60.0, "scenes": scenes, **changes}
    )


def world(rank, size):
    return replace(World.alone(), rank=rank, size=size)


def training(beton, rank=0, ranks=1, *, workers=1, subset=None, **changes):
    batch = BatchSettings(global_batch=SLOTS * SLOT, slot=SLOT)
    data = subset or Subset(beton)
    return TrainFeed(data, data_settings(**changes), batch, world(rank, ranks), seed=3, workers=workers)


def scenes_tested(beton, rank=0, ranks=1, *, workers=1, subset=None, **changes):
    return SceneEvaluationFeed(subset or Subset(beton), data_settings(**changes), world(rank, ranks), workers=workers)


def slots_of(feed, step):
    """Hash the images, label maps and ids of each slot of a step, by the slot's number."""
    found = {}
    for batch in feed.slots(step):
        for slot, *content in zip(
            batch.slots, *(t.split(SLOT) for t in (batch.images, batch.label_maps, batch.ids)), strict=True
        ):
            found[slot] = hashlib.sha256(b"".join(t.contiguous().numpy().tobytes() for t in content)).hexdigest()
    return found


@pytest.fixture(scope="module")
def expected(beton):
    """Hashes of the slots of two epochs, read by one rank."""
    feed = training(beton)
    steps = [slots_of(feed, step) for step in range(2 * STEPS)]
    feed.close()
    assert len({h for step in steps for h in step.values()}) == 2 * STEPS * SLOTS
    return steps


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_any_ranks_and_workers_see_the_same_scenes_after_a_resume_at_every_step(beton, expected, ranks, workers):
    for step in range(2 * STEPS):
        for rank in range(ranks) if step == 0 else [step % ranks]:
            feed = training(beton, rank, ranks, workers=workers)
            for later in range(step, 2 * STEPS):
                own = {slot: h for slot, h in expected[later].items() if slot % ranks == rank}
                assert slots_of(feed, later) == own
            feed.close()


def test_a_batch_has_label_maps_of_its_images_size(beton):
    feed = training(beton)
    (batch, *_) = feed.slots(0)
    feed.close()
    assert batch.images.shape == (SLOT, 3, 24, 24)
    assert batch.label_maps.shape == (SLOT, 24, 24)
    assert batch.label_maps.dtype == torch.uint8
    assert set(batch.label_maps.unique().tolist()) <= {0, 1, 2, 3, 4, 255}
    part = batch.part(slice(1, 2), (0,))
    assert (part.label_maps == batch.label_maps[1:]).all()
    moved = batch.to(torch.device("meta"))
    assert moved.images.is_meta
    assert moved.label_maps.is_meta


def test_more_than_255_classes_have_int32_maps(tmp_path):
    wide = write_scenes(tmp_path / "wide.beton", classes=300)
    feed = training(wide)
    (batch, *_) = feed.slots(0)
    feed.close()
    assert batch.label_maps.dtype == torch.int32
    labels = {label for tested in scenes_tested(wide) for label in tested.label_maps.unique().tolist()}
    assert labels == {label for i in range(SAMPLES) for label in np.unique(scene(i, 300)[1])}
    assert max(labels) > 255


@pytest.mark.parametrize("ranks", [1, 3, 4])
@pytest.mark.parametrize("test", ["window", "whole"])
def test_tests_see_each_whole_scene_once_and_agree_on_windows(beton, ranks, test):
    feeds = [list(scenes_tested(beton, rank, ranks, test=test)) for rank in range(ranks)]
    assert len({len(batches) for batches in feeds}) == 1
    seen = []
    for batches in zip(*feeds, strict=True):
        windows = [0]
        for batch in batches:
            (i,) = batch.ids.tolist()
            pixels, label_map = scene(i, 5)
            size = resized_to_fit(*label_map.shape, (64, 32))
            assert batch.images.shape == (1, 3, *size)
            assert (batch.label_maps[0].numpy() == label_map).all()
            if i % 2 == 0:
                expected = Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BICUBIC)
                np.testing.assert_array_equal(batch.images[0].permute(1, 2, 0).numpy(), np.asarray(expected))
            windows.append(len(window_places(size, (24, 24), 16)))
            seen += [i] * bool(batch.valid)
        assert {batch.windows_at_most for batch in batches} == {1 if test == "whole" else max(windows)}
    assert sorted(seen) == list(range(SAMPLES))


def test_a_share_of_the_scenes(beton):
    part = select_subset(beton, fraction=0.5, seed=1)
    assert part.samples == SAMPLES // 2
    tested = list(scenes_tested(beton, subset=part))
    assert [int(batch.ids) for batch in tested] == part.ids.tolist()
    for batch in tested:
        windows = window_places(tuple(batch.images.shape[2:]), (24, 24), 16)
        assert batch.windows_at_most == len(windows)
    feed = training(beton, subset=part)
    assert {int(i) for batch in feed.slots(0) for i in batch.ids} <= set(part.ids.tolist())
    feed.close()


def damaged(beton, folder, image=None, label_map=None):
    """A copy with zeros in place of one image or one label map."""
    content, maps = bytearray(beton.path.read_bytes()), bytearray(maps_path(beton.path).read_bytes())
    if image is not None:
        table = np.frombuffer(content[-24 * SAMPLES :], ALLOCATION)[image]
        content[int(table["ptr"]) : int(table["ptr"] + table["size"])] = bytes(int(table["size"]))
    if label_map is not None:
        start, end = np.frombuffer(maps[-8 * (SAMPLES + 1) :], np.uint64)[label_map : label_map + 2].tolist()
        maps[start:end] = bytes(end - start)
    path = folder / "bad.beton"
    path.write_bytes(content)
    maps_path(path).write_bytes(maps)
    sidecar_path(path).write_bytes(sidecar_path(beton.path).read_bytes())
    return open_beton(path)


@pytest.mark.parametrize(
    ("damage", "reason"), [({"image": 7}, "is a damaged JPEG"), ({"label_map": 7}, "has a damaged label map")]
)
def test_damaged_images_and_maps_are_named_or_replaced_together(beton, tmp_path, damage, reason):
    bad = damaged(beton, tmp_path, **damage)
    with pytest.raises(DataError, match=rf"sample 7 of .*bad\.beton {reason}"):
        list(scenes_tested(bad, workers=2))
    feed = training(bad, workers=2)
    with pytest.raises(DataError, match=f"sample 7 of .* {reason}"):
        [list(feed.slots(step)) for step in range(2 * STEPS)]
    feed.close()

    invalid = [int(batch.ids) for batch in scenes_tested(bad, on_damaged="skip") if not batch.valid]
    assert invalid == [7]
    whole = training(beton)
    of_8 = {(b.epoch, i): (b.images[n], b.label_maps[n]) for b, n, i in views_of(whole) if i == 8}
    for ranks in (1, 2):
        feeds = [training(bad, rank, ranks, workers=2, on_damaged="skip") for rank in range(ranks)]
        found = [(b.epoch, i, b.images[n], b.label_maps[n]) for feed in feeds for b, n, i in views_of(feed)]
        assert not [i for _, i, _, _ in found if i == 7]
        twice = [view for view in found if view[1] == 8 and (view[0], 8) in of_8]
        assert len(twice) > len(of_8)
        for epoch, _, image, label_map in twice:
            assert (image == of_8[epoch, 8][0]).all()
            assert (label_map == of_8[epoch, 8][1]).all()
        assert sum(feed.replaced for feed in feeds) > 0


def views_of(feed, epochs=4):
    """Yield (batch, place, sample id) of each image of some epochs."""
    for step in range(epochs * STEPS):
        for batch in feed.slots(step):
            for place, i in enumerate(batch.ids.tolist()):
                yield batch, place, i
    feed.close()


def test_data_that_does_not_suit_segmentation_is_refused_with_the_remedy(beton, tmp_path):
    path = tmp_path / "plain.beton"
    with BetonWriter(path, list("abcde"), 9) as writer:
        for _ in range(9):
            writer.add(np.zeros((8, 8, 3), np.uint8), 0)
    plain = open_beton(path)
    with pytest.raises(DataError, match="has no label maps, which segmentation needs; make a file that has them:"):
        scenes_tested(plain)
    check_stage_data(segmentation_recipe(beton))
    with pytest.raises(
        DataError, match=r"data\.train .*plain\.beton has no label maps, which the objective segmentation"
    ):
        check_stage_data(segmentation_recipe(plain))
    with pytest.raises(DataError, match=r"objective.classes is 6, but the label maps of data.train .* have 5"):
        check_stage_data(segmentation_recipe(beton, classes=6))
    recipe = segmentation_recipe(beton)
    with BetonWriter(tmp_path / "other.beton", list("abcde"), 1) as writer:
        writer.add(np.zeros((8, 8, 3), np.uint8), 0, label_map=np.zeros((8, 8), np.uint8))
    data = recipe.data.model_copy(update={"validation": str(tmp_path / "other.beton")})
    with pytest.raises(DataError, match=r"have other classes than those of data\.train, or in another order"):
        check_stage_data(recipe.model_copy(update={"data": data}))


def segmentation_recipe(beton, classes=5):
    return StageRecipe.model_validate(
        {
            "name": "scenes",
            "model": {"name": "convnextv2_atto"},
            "objective": {"kind": "segmentation", "classes": classes, "norm_group": 4},
            "data": data_settings(train=str(beton.path), validation=str(beton.path), image_size=32).model_dump(),
            "batch": {"global_batch": 8, "slot": 4},
            "optimizer": {"lr": 1e-4},
            "schedule": {"steps": 5},
            "init": {"start": "scratch"},
        }
    )


def test_the_feeds_of_a_recipe(beton):
    recipe = segmentation_recipe(beton)
    feed = train_feed(recipe, Subset(beton), 0, World.alone(), 1)
    batch = next(feed.slots(0))
    feed.close()
    example = example_batch(recipe)
    for name in ("images", "label_maps", "labels", "ids"):
        made, read = getattr(example, name), getattr(batch, name)
        assert (made.shape, made.dtype) == (read.shape, read.dtype)
    tested = evaluation_feed(recipe, Subset(beton), World.alone(), 1)
    assert isinstance(tested, SceneEvaluationFeed)
    assert len(tested) == SAMPLES
    example = example_evaluation_batch(recipe)
    assert example.images.shape == (1, 3, 32, 43)
    assert example.label_maps.shape == (1, 32, 43)
    assert example.windows_at_most == len(window_places((32, 43), (32, 32), 16)) == 2
    assert example_batch(segmentation_recipe(beton, classes=300)).label_maps.dtype == torch.int32
