"""Feeds of images with objects over real files: the same views for any ranks, workers and resumes."""

import hashlib
import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_masks

from pipeline.data.batch import example_batch, example_evaluation_batch
from pipeline.data.beton import open_beton, sidecar_path
from pipeline.data.beton_writer import BetonWriter
from pipeline.data.feed import TrainFeed
from pipeline.data.object_feed import ObjectEvaluationFeed
from pipeline.data.objects import Objects
from pipeline.data.objects_file import objects_of_image, objects_path
from pipeline.data.open import evaluation_feed, train_feed
from pipeline.data.stage_data import check_stage_data, fetch_stage_data
from pipeline.data.subset import Subset, count_per_class, select_subset
from pipeline.data.windows import resized_to_fit
from pipeline.distributed.world import World
from pipeline.errors import DataError
from pipeline.recipe import StageRecipe
from pipeline.recipe.sections import BatchSettings, DataSettings

SAMPLES, SLOTS, SLOT = 23, 4, 2
EMPTY = {0, 5, 22}
ANNOTATED = SAMPLES - len(EMPTY)
STEPS = ANNOTATED // (SLOTS * SLOT)
CLASSES = ["a", "b", "c"]
VIEWS = {"short_sides": (24, 32), "longest": 60, "crop_short_sides": (20, 28), "crop": (12, 30), "test_size": (64, 32)}


def photograph(i):
    """The pixels of an image, whose number of objects and whose size differ, and what is annotated."""
    numbers = np.random.default_rng(i)
    height, width = numbers.integers(20, 60, 2).tolist()
    pixels, objects = numbers.integers(0, 256, (5, 5, 3), np.uint8).repeat(12, 0).repeat(12, 1)[:height, :width], []
    for _ in range(0 if i in EMPTY else 1 + i % 3):
        (y, h), (x, w) = ((int(numbers.integers(0, n - 4)), int(numbers.integers(3, n // 2))) for n in (height, width))
        mask = np.zeros((height, width), np.uint8, order="F")
        mask[y : y + h, x : x + w] = 1
        objects.append({"box": (x, y, min(w, width - x), min(h, height - y)), "class": int(numbers.integers(3)),
                        "rle": coco_masks.encode(mask)["counts"], "crowd": numbers.random() < 0.2})  # fmt: skip
    return pixels, objects


def write_objects(path):
    with BetonWriter(path, CLASSES, SAMPLES) as writer:
        for i in range(SAMPLES):
            pixels, annotated = photograph(i)
            objects = objects_of_image(100 + i, pixels.shape[:2], annotated, (1, 7, 9))
            if i % 2:
                file = io.BytesIO()
                Image.fromarray(pixels).save(file, "JPEG")
                writer.add(file.getvalue(), 0, size=pixels.shape[:2], objects=objects)
            else:
                writer.add(pixels, 0, objects=objects)
    return open_beton(path)


@pytest.fixture(scope="module")
def beton(tmp_path_factory):
    return write_objects(tmp_path_factory.mktemp("objects") / "a.beton")


def data_settings(kind="multi_scale", **changes):
    views = {**VIEWS, "kind": kind, **changes.pop("views", {})}
    return DataSettings.model_validate(
        {"train": "-", "image_size": (32, 64), "timeout_seconds": 60.0, "views": views, **changes}
    )


def world(rank, size):
    return replace(World.alone(), rank=rank, size=size)


def training(beton, rank=0, ranks=1, *, workers=1, subset=None, masks=True, **changes):
    batch = BatchSettings(global_batch=SLOTS * SLOT, slot=SLOT)
    data = subset or select_subset(beton, annotated_only=True)
    settings = data_settings(**changes)
    return TrainFeed(data, settings, batch, world(rank, ranks), seed=3, workers=workers, masks=masks)


def slots_of(feed, step):
    """Hash the views, objects and ids of each slot of a step, by the slot's number."""
    found = {}
    for batch in feed.slots(step):
        for place, slot in enumerate(batch.slots):
            part = batch.part(slice(place * SLOT, (place + 1) * SLOT))
            content = [part.images, part.ids, part.view_sizes, part.image_sizes, *part.objects.tensors()]
            found[slot] = hashlib.sha256(b"".join(t.contiguous().numpy().tobytes() for t in content)).hexdigest()
    return found


@pytest.mark.parametrize("kind", ["large_scale_jitter", "multi_scale"])
def test_any_ranks_and_workers_see_the_same_views_after_a_resume_at_every_step(beton, kind):
    feed = training(beton, kind=kind)
    expected = [slots_of(feed, step) for step in range(2 * STEPS)]
    feed.close()
    assert len({h for step in expected for h in step.values()}) == 2 * STEPS * SLOTS
    for ranks, workers in ((1, 2), (2, 1), (4, 2)):
        for step in range(2 * STEPS):
            for rank in range(ranks) if step == 0 else [step % ranks]:
                feed = training(beton, rank, ranks, workers=workers, kind=kind)
                for later in range(step, 2 * STEPS):
                    own = {slot: h for slot, h in expected[later].items() if slot % ranks == rank}
                    assert slots_of(feed, later) == own
                feed.close()


def test_a_batch_has_the_objects_of_its_images(beton):
    feed, seen = training(beton, kind="resize", flip=0.0), 0
    for step in range(STEPS):
        for batch in feed.slots(step):
            objects, stored = batch.objects, Objects.open(beton)
            assert batch.images.shape == (SLOT, 3, 32, 64)
            assert objects.boxes.dtype == torch.float32
            assert objects.masks.shape == (sum(objects.counts), 32, 8)
            for place, i in enumerate(batch.ids.tolist()):
                height, width = photograph(i)[0].shape[:2]
                assert batch.image_sizes[place].tolist() == [height, width]
                size = batch.view_sizes[place].tolist()
                rows, own = stored.rows(i), objects.part(slice(place, place + 1))
                assert own.counts == (len(rows),) > (0,)
                assert own.classes.tolist() == rows["class"].tolist()
                assert own.crowd.tolist() == rows["crowd"].tolist()
                corners = np.concatenate([rows["box"][:, :2], rows["box"][:, :2] + rows["box"][:, 2:]], 1)
                scaled = corners * ([size[1] / width, size[0] / height] * 2)
                np.testing.assert_allclose(own.boxes.numpy(), scaled, rtol=1e-6)
                seen += len(rows)
    feed.close()
    assert seen > 20
    feed = training(beton, masks=False)
    assert next(feed.slots(0)).objects.masks is None
    feed.close()


def test_images_without_objects_are_left_out_of_training_or_kept(beton):
    part = select_subset(beton, annotated_only=True)
    assert set(range(SAMPLES)) - set(part.ids.tolist()) == EMPTY
    assert sum(count_per_class(beton, None, 1.0, annotated_only=True).values()) == part.samples == ANNOTATED
    half = select_subset(beton, fraction=0.5, seed=1, annotated_only=True)
    assert sum(count_per_class(beton, None, 0.5, annotated_only=True).values()) == half.samples == ANNOTATED // 2
    assert set(half.ids.tolist()) < set(part.ids.tolist())
    recipe = detection_recipe(beton)
    subsets = fetch_stage_data(recipe, None)
    assert {name: data.samples for name, data in subsets.items()} == {"train": ANNOTATED, "validation": SAMPLES}
    kept = recipe.model_copy(update={"data": recipe.data.model_copy(update={"views": recipe.data.views.model_copy(
        update={"keep_empty": True})})})  # fmt: skip
    assert fetch_stage_data(kept, None)["train"].ids is None
    feed = training(beton, subset=Subset(beton))
    counts = {i: batch.objects.counts[place] for batch, place, i in views_of(feed)}
    assert {i for i in EMPTY if i in counts} != set()
    assert all(counts.get(i, 0) == 0 for i in EMPTY)


@pytest.mark.parametrize("ranks", [1, 3])
def test_tests_see_each_whole_image_once_in_equally_many_batches(beton, ranks):
    feeds = [
        list(ObjectEvaluationFeed(Subset(beton), data_settings(), world(rank, ranks), workers=1, stride=8))
        for rank in range(ranks)
    ]
    assert len({len(batches) for batches in feeds}) == 1
    seen = []
    for batch in (batch for batches in feeds for batch in batches):
        (i,) = batch.ids.tolist()
        pixels, _ = photograph(i)
        size = resized_to_fit(*pixels.shape[:2], (64, 32))
        assert batch.view_sizes.tolist() == [list(size)]
        assert batch.image_sizes.tolist() == [list(pixels.shape[:2])]
        assert batch.images.shape == (1, 3, *(-(-side // 8) * 8 for side in size))
        assert batch.objects is None
        if i % 2 == 0:
            expected = np.asarray(Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BICUBIC))
            view = batch.images[0].permute(1, 2, 0).numpy()
            assert (view[: size[0], : size[1]] == expected).all()
            assert (view[size[0] :] == (124, 116, 104)).all()
        seen += [i] * bool(batch.valid)
    assert sorted(seen) == list(range(SAMPLES))


def damaged(beton, folder, sample):
    """A copy in which a byte of the first mask of an image is another one."""
    content = bytearray(objects_path(beton.path).read_bytes())
    content[int(Objects.open(beton).rows(sample)[0]["rle_at"])] ^= 1
    path = folder / "bad.beton"
    path.write_bytes(beton.path.read_bytes())
    objects_path(path).write_bytes(content)
    sidecar_path(path).write_bytes(sidecar_path(beton.path).read_bytes())
    return open_beton(path)


def test_damaged_objects_are_named_or_replaced_with_their_image(beton, tmp_path):
    sample = next(i for i in range(7, SAMPLES) if photograph(i)[1] and not photograph(i)[1][0]["crowd"])
    bad, following = damaged(beton, tmp_path, sample), sample + 1
    feed = training(bad, workers=2, kind="resize")
    with pytest.raises(DataError, match=rf"sample {sample} of .*bad\.beton has damaged objects"):
        [list(feed.slots(step)) for step in range(2 * STEPS)]
    feed.close()
    of_next = {(b.epoch, i): (b.images[n], b.objects.part(slice(n, n + 1))) for b, n, i in
               views_of(training(beton, kind="resize")) if i == following}  # fmt: skip
    for ranks in (1, 2):
        feeds = [training(bad, rank, ranks, workers=2, on_damaged="skip", kind="resize") for rank in range(ranks)]
        found = [(b.epoch, i, b.images[n], b.objects.part(slice(n, n + 1))) for f in feeds for b, n, i in views_of(f)]
        assert not [i for _, i, _, _ in found if i == sample]
        twice = [view for view in found if view[1] == following and (view[0], following) in of_next]
        assert len(twice) > len(of_next)
        for epoch, i, image, objects in twice:
            assert (image == of_next[epoch, i][0]).all()
            for own, other in zip(objects.tensors(), of_next[epoch, i][1].tensors(), strict=True):
                assert (own == other).all()
        assert sum(feed.replaced for feed in feeds) > 0


def views_of(feed, epochs=4):
    """Yield (batch, place, sample id) of each image of some epochs."""
    for step in range(epochs * STEPS):
        for batch in feed.slots(step):
            for place, i in enumerate(batch.ids.tolist()):
                yield batch, place, i
    feed.close()


def detection_recipe(beton, classes=3, **objective):
    return StageRecipe.model_validate(
        {
            "name": "objects",
            "model": {"name": "convnextv2_atto"},
            "objective": {"kind": "detection", "classes": classes, **objective},
            "data": data_settings(train=str(beton.path), validation=str(beton.path), image_size=64).model_dump(),
            "batch": {"global_batch": 8, "slot": 4},
            "optimizer": {"lr": 1e-4},
            "schedule": {"steps": 5},
            "init": {"start": "scratch"},
        }
    )


def test_the_feeds_of_a_recipe(beton):
    recipe = detection_recipe(beton)
    feed = train_feed(recipe, Subset(beton), 0, World.alone(), 1)
    batch = next(feed.slots(0))
    feed.close()
    example = example_batch(recipe)
    for name in ("images", "labels", "ids", "view_sizes", "image_sizes"):
        made, read = getattr(example, name), getattr(batch, name)
        assert (made.shape, made.dtype) == (read.shape, read.dtype)
    for made, read in zip(example.objects.tensors(), batch.objects.tensors(), strict=True):
        assert (made.shape[1:], made.dtype) == (read.shape[1:], read.dtype)
    assert example.objects.counts == (2,) * 4
    boxes_alone = example_batch(detection_recipe(beton, head="faster_rcnn"))
    assert boxes_alone.objects.masks is None
    tested = evaluation_feed(recipe, Subset(beton), World.alone(), 1)
    assert isinstance(tested, ObjectEvaluationFeed)
    assert len(tested) == SAMPLES
    assert {side % 32 for batch in tested for side in batch.images.shape[2:]} == {0}
    example = example_evaluation_batch(recipe)
    assert example.images.shape == (1, 3, 32, 64)
    assert example.view_sizes.tolist() == [[32, 43]]


def test_data_that_does_not_suit_detection_is_refused_with_the_remedy(beton, tmp_path):
    check_stage_data(detection_recipe(beton))
    with BetonWriter(tmp_path / "plain.beton", CLASSES, 9) as writer:
        for _ in range(9):
            writer.add(np.zeros((8, 8, 3), np.uint8), 0)
    plain = open_beton(tmp_path / "plain.beton")
    with pytest.raises(
        DataError, match=r"has no objects, which detection needs; make a file that has them: `fcmae prep"
    ):
        training(plain)
    with pytest.raises(DataError, match=r"data\.train .*plain\.beton has no objects, which the objective detection"):
        check_stage_data(detection_recipe(plain))
    with pytest.raises(DataError, match=r"objective.classes is 4, but the objects of data\.train .* have 3"):
        check_stage_data(detection_recipe(beton, classes=4))
    boxes = objects_of_image(1, (8, 8), [{"box": (1, 1, 4, 4), "class": 0}], (1, 2, 3))
    for name, objects in (("boxes", boxes), ("empty", objects_of_image(1, (8, 8), [], (1, 2, 3)))):
        with BetonWriter(tmp_path / f"{name}.beton", CLASSES, 9) as writer:
            for _ in range(9):
                writer.add(np.zeros((8, 8, 3), np.uint8), 0, objects=objects)
    with pytest.raises(DataError, match=r"have no masks, which objective\.head mask_rcnn needs; set it to faster_rcnn"):
        check_stage_data(detection_recipe(open_beton(tmp_path / "boxes.beton")))
    check_stage_data(detection_recipe(open_beton(tmp_path / "boxes.beton"), head="faster_rcnn"))
    with pytest.raises(DataError, match=r"no image of data\.train .*empty\.beton has an object"):
        check_stage_data(detection_recipe(open_beton(tmp_path / "empty.beton")))
    with BetonWriter(tmp_path / "other.beton", ["a", "b", "d"], 1) as writer:
        writer.add(np.zeros((8, 8, 3), np.uint8), 0, objects=boxes)
    recipe = detection_recipe(beton, head="faster_rcnn")
    data = recipe.data.model_copy(update={"validation": str(tmp_path / "other.beton")})
    with pytest.raises(DataError, match=r"have other classes than those of data\.train, or in another order"):
        check_stage_data(recipe.model_copy(update={"data": data}))
