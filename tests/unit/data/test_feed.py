"""Feeds over real files: the same batches for any ranks and workers; no hangs, no leaks, no silent errors."""

import gc
import hashlib
import io
import subprocess
import sys
import threading
from dataclasses import replace

import numba
import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.data import beton as module
from pipeline.data.beton import open_beton
from pipeline.data.beton_writer import BetonWriter
from pipeline.data.crops import EvaluationPlan
from pipeline.data.feed import EvaluationFeed, TrainFeed
from pipeline.data.ffcv_loader import ImageLoader, Producer, _Images
from pipeline.data.subset import Subset
from pipeline.distributed.world import World
from pipeline.errors import DataError, RecipeError
from pipeline.recipe.sections import BatchSettings, DataSettings

SAMPLES, SLOTS, SLOT_SIZE = 70, 4, 4
STEPS = SAMPLES // (SLOTS * SLOT_SIZE)
WHOLE_EPOCH = {"global_batch": SAMPLES, "slot": SAMPLES}


def photo(i):
    return np.random.default_rng(i).integers(0, 256, (6, 5, 3), np.uint8).repeat(6, 0).repeat(8, 1)


@pytest.fixture(scope="module")
def beton(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "a.beton"
    with BetonWriter(path, [str(n) for n in range(7)], SAMPLES) as writer:
        for i in range(SAMPLES):
            pixels = photo(i)
            if i % 2:
                file = io.BytesIO()
                Image.fromarray(pixels).save(file, "JPEG")
                writer.add(file.getvalue(), i % 7, size=pixels.shape[:2])
            else:
                writer.add(pixels, i % 7)
    return open_beton(path)


def data_settings(**changes):
    return DataSettings(train="-", **{"image_size": 24, "crop_scale": (0.2, 1.0), "timeout_seconds": 60, **changes})


def world(rank, size):
    return replace(World.alone(), rank=rank, size=size)


def train_feed(beton, rank=0, world_size=1, *, workers=1, batch=None, **changes):
    batch = BatchSettings(**{"global_batch": SLOTS * SLOT_SIZE, "slot": SLOT_SIZE, **(batch or {})})
    return TrainFeed(Subset(beton), data_settings(**changes), batch, world(rank, world_size), seed=3, workers=workers)


def evaluation_feed(beton, rank=0, world_size=1, *, workers=1, **changes):
    return EvaluationFeed(Subset(beton), data_settings(**changes), 8, world(rank, world_size), workers=workers)


class Noted:
    """What a feed has prepared: the arguments, and the thread."""

    def __init__(self, ids, epoch, device):
        self.ids, self.epoch, self.device, self.thread = ids.tolist(), epoch, device, threading.current_thread()


def test_what_an_objective_prepares_is_made_in_the_loaders_thread_and_comes_with_its_batch(beton):
    batch = BatchSettings(global_batch=SLOTS * SLOT_SIZE, slot=SLOT_SIZE)
    feed = TrainFeed(Subset(beton), data_settings(), batch, World.alone(), seed=3, workers=1, prepare=Noted)
    evaluation = EvaluationFeed(Subset(beton), data_settings(), 8, World.alone(), workers=1, prepare=Noted)
    found = [*(batch for step in (0, STEPS) for batch in feed.slots(step)), *evaluation]
    feed.close()
    assert {batch.epoch for batch in found} == {0, 1}
    for batch in found:
        assert batch.prepared.ids == batch.ids.tolist()
        assert (batch.prepared.epoch, batch.prepared.device) == (batch.epoch, torch.device("cpu"))
        assert batch.prepared.thread is not threading.current_thread()


def producer_of(beton, work, timeout_seconds=60, kind=Producer, pinned=False):
    loader = ImageLoader(Subset(beton), EvaluationPlan(24, 1.0), batch_size=8, workers=1)
    return kind(loader, work, lambda *batch: batch, timeout_seconds, pinned)


def slots_of(feed, step):
    """Hash the contents of each slot of a step, by the slot's number."""
    found = {}
    for batch in feed.slots(step):
        size = len(batch.ids) // len(batch.slots)
        for place, slot in enumerate(batch.slots):
            part = slice(place * size, (place + 1) * size)
            content = [batch.images[part], batch.labels[part], batch.ids[part]]
            digest = hashlib.sha256(b"".join(t.numpy().tobytes() for t in content))
            found[slot] = digest.hexdigest()
    return found


@pytest.fixture(scope="module")
def expected(beton):
    """Hashes of the slots of three epochs, read by one rank."""
    feed = train_feed(beton)
    steps = [slots_of(feed, step) for step in range(3 * STEPS)]
    feed.close()
    return steps


def test_batches(beton):
    feed = train_feed(beton, batch={"micro_slots": 3})
    assert feed.steps_per_epoch == STEPS
    batches = list(feed.slots(STEPS + 1))
    feed.close()
    assert [b.slots for b in batches] == [(0, 1, 2), (3,)]
    assert [b.epoch for b in batches] == [1, 1]
    for batch in batches:
        n = len(batch.slots) * SLOT_SIZE
        assert batch.images.shape == (n, 3, 24, 24)
        assert batch.images.dtype == torch.uint8
        assert batch.ids.dtype == batch.labels.dtype == torch.int64
        assert batch.valid.all()
        assert batch.labels.tolist() == [i % 7 for i in batch.ids.tolist()]


def test_epochs_differ_in_order_and_crops(beton, expected):
    assert len({h for step in expected for h in step.values()}) == 3 * STEPS * SLOTS
    feed = train_feed(beton, batch=WHOLE_EPOCH)
    (first,), (second,) = feed.slots(0), feed.slots(1)
    feed.close()
    a, b = (batch.images[batch.ids.argsort()] for batch in (first, second))
    assert sorted(first.ids.tolist()) == list(range(SAMPLES))
    assert all((x != y).any() for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("changes", [{"workers": 2}, {"batch": {"micro_slots": 2}}, {"batch": {"micro_slots": 9}}])
def test_workers_and_micro_batches_change_nothing(beton, expected, changes):
    feed = train_feed(beton, **changes)
    assert [slots_of(feed, step) for step in range(3 * STEPS)] == expected
    feed.close()


def test_augmented_images_are_the_same_for_any_workers_and_ranks(beton, expected):
    """With RandAugment, 1 and 2 workers, 1 and 4 ranks, and jumps to other steps give the same slots."""
    notation = "rand-m9-mstd0.5-inc1"
    feed = train_feed(beton, rand_augment=notation)
    whole = [slots_of(feed, step) for step in range(2 * STEPS)]
    feed.close()
    assert sum(whole[s][n] != expected[s][n] for s in range(2 * STEPS) for n in range(SLOTS)) > STEPS * SLOTS
    feed = train_feed(beton, workers=2, rand_augment=notation)
    assert [slots_of(feed, step) for step in range(2 * STEPS)] == whole
    feed.close()
    for rank in range(4):
        feed = train_feed(beton, rank, 4, workers=2, rand_augment=notation)
        for step in (5, 1, 2):
            assert slots_of(feed, step) == {rank: whole[step][rank]}
        feed.close()


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_the_same_global_batch(beton, expected, world_size):
    feeds = [train_feed(beton, rank, world_size) for rank in range(world_size)]
    for step, whole in enumerate(expected):
        parts = [slots_of(feed, step) for feed in feeds]
        for rank, part in enumerate(parts):
            assert sorted(part) == list(range(rank, SLOTS, world_size))
        assert {slot: h for part in parts for slot, h in part.items()} == whole
    for feed in feeds:
        feed.close()


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("workers", [1, 2])
def test_resume_at_every_step(beton, expected, world_size, workers):
    for step in range(2 * STEPS):
        rank = step % world_size
        feed = train_feed(beton, rank, world_size, workers=workers)
        for later in range(step, 2 * STEPS):
            own = {s: h for s, h in expected[later].items() if s % world_size == rank}
            assert slots_of(feed, later) == own
        feed.close()


def test_seek_close_and_abandoned_steps(beton, expected):
    feed = train_feed(beton)
    for step in (7, 2, 3, 0):
        assert slots_of(feed, step) == expected[step]
    next(feed.slots(1))  # stopped within a step
    assert slots_of(feed, 1) == expected[1]
    feed.close()
    feed.close()
    assert slots_of(feed, 2) == expected[2]
    feed.close()


def test_same_in_another_process(beton, expected):
    code = (
        "import sys; sys.path.insert(0, sys.argv[2]); import test_feed as t\n"
        "from pipeline.data.beton import open_beton\n"
        "feeds = [t.train_feed(open_beton(sys.argv[1]), rank, 4, workers=2) for rank in range(4)]\n"
        "print([sorted(p for f in feeds for p in t.slots_of(f, s).items()) for s in range(2, 6)])"
    )  # and the interpreter exits with a live feed
    command = [sys.executable, "-c", code, str(beton.path), str(__import__("pathlib").Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str([sorted(step.items()) for step in expected[2:6]])
    assert done.stderr == ""


def test_batches_are_not_views_of_the_ring(beton):
    feed = train_feed(beton)
    kept = [(b, b.images.clone(), b.labels.clone()) for step in range(6) for b in feed.slots(step)]
    feed.close()
    assert all((b.images == images).all() and (b.labels == labels).all() for b, images, labels in kept)


@pytest.mark.parametrize("world_size", [1, 3])
def test_evaluation_sees_each_image_once(beton, world_size):
    feeds = [evaluation_feed(beton, rank, world_size) for rank in range(world_size)]
    assert len({len(feed) for feed in feeds}) == 1
    images = {}
    for feed in feeds:
        batches = list(feed)
        assert [len(b.ids) for b in batches] == [8] * len(feed)
        for batch in batches:
            for i, label, image, valid in zip(batch.ids.tolist(), batch.labels, batch.images, batch.valid, strict=True):
                assert label == i % 7
                if valid:
                    assert i not in images
                    images[i] = image
    assert sorted(images) == list(range(SAMPLES))
    expected = Image.fromarray(photo(6)).resize((30, 27), Image.Resampling.BICUBIC).crop((3, 2, 27, 26))
    np.testing.assert_array_equal(images[6].permute(1, 2, 0).numpy(), np.asarray(expected))


def test_two_loaders_at_once_and_torchs_threads(beton, expected):
    threads = torch.get_num_threads()
    feed, evaluation = train_feed(beton, workers=2), evaluation_feed(beton, workers=2)
    whole = [b.images for b in evaluation]
    for step, again in enumerate(evaluation):
        assert slots_of(feed, step) == expected[step]
        assert (again.images == whole[step]).all()
    assert torch.get_num_threads() == threads
    assert numba.config.THREADING_LAYER == "default"  # nothing of ours runs in numba's pool
    feed.close()


def tensor_bytes() -> int:
    """Bytes of all tensors that are alive, the rings' among them; what the allocator keeps differs."""
    gc.collect()
    return sum(thing.nbytes for thing in gc.get_objects() if type(thing) is torch.Tensor)


def test_early_exits_leave_no_threads_or_memory(beton):
    def leave_early():
        for _ in evaluation_feed_:
            break
        next(feed.slots(0))
        feed.close()

    feed, evaluation_feed_ = train_feed(beton, image_size=512), evaluation_feed(beton, image_size=512)
    for _ in range(3):
        leave_early()
    threads, before = set(threading.enumerate()), tensor_bytes()
    for _ in range(3):
        leave_early()
    assert set(threading.enumerate()) <= threads  # those of an earlier test may end meanwhile
    assert tensor_bytes() <= before


def damaged(beton, tmp_path, sample):
    """A copy with zeros in place of one image."""
    content = bytearray(beton.path.read_bytes())
    table = np.frombuffer(content[-24 * SAMPLES :], module.ALLOCATION)[sample]
    content[int(table["ptr"]) : int(table["ptr"] + table["size"])] = bytes(int(table["size"]))
    path = tmp_path / "bad.beton"
    path.write_bytes(content)
    module.sidecar_path(path).write_bytes(module.sidecar_path(beton.path).read_bytes())
    return open_beton(path)


@pytest.mark.parametrize("workers", [1, 2])
def test_damaged_sample_is_named(beton, tmp_path, workers):
    bad = damaged(beton, tmp_path, 33)
    with pytest.raises(DataError, match=r"sample 33 of .*bad\.beton is a damaged JPEG"):
        list(evaluation_feed(bad, workers=workers))
    feed = train_feed(bad, workers=workers)
    with pytest.raises(DataError, match="sample 33"):
        [list(feed.slots(step)) for step in range(2 * STEPS)]
    feed.close()


@pytest.mark.parametrize("workers", [1, 2])
def test_damaged_samples_are_replaced_by_the_next_ones_on_request(beton, tmp_path, workers, caplog):
    """Image 34 replaces the damaged JPEG 33 for any world size; in evaluation image 33 is not valid."""
    bad = damaged(beton, tmp_path, 33)
    whole = {i: (b, n) for b in evaluation_feed(beton) for n, i in enumerate(b.ids.tolist()) if b.valid[n]}
    seen = {}
    for batch in evaluation_feed(bad, workers=workers, on_damaged="skip"):
        for n, i in enumerate(batch.ids.tolist()):
            if batch.valid[n]:
                assert i not in seen
                seen[i] = (batch.images[n] == whole[i][0].images[whole[i][1]]).all()
    assert sorted(seen) == [i for i in range(SAMPLES) if i != 33]
    assert all(seen.values())

    def steps(world_size):
        feeds = [train_feed(bad, rank, world_size, workers=workers, on_damaged="skip") for rank in range(world_size)]
        found = [{slot: h for feed in feeds for slot, h in slots_of(feed, step).items()} for step in range(2 * STEPS)]
        for feed in feeds:
            feed.close()
        return found, sum(feed.replaced for feed in feeds)

    (alone, replaced), (shared, replaced_by_two) = steps(1), steps(2)
    assert alone == shared
    assert replaced == replaced_by_two > 0
    feed = train_feed(bad, batch=WHOLE_EPOCH, on_damaged="skip")
    (batch,) = feed.slots(0)
    feed.close()
    assert sorted(batch.ids.tolist()) == sorted([34 if i == 33 else i for i in range(SAMPLES)])
    assert batch.labels.tolist() == [i % 7 for i in batch.ids.tolist()]
    first, second = (batch.ids == 34).nonzero()[:, 0]
    assert (batch.images[first] == batch.images[second]).all()
    assert f"sample 33 of {bad.path} is a damaged JPEG; sample 34 takes its place" in caplog.text


def test_a_file_without_a_whole_image_is_an_error(tmp_path):
    path = tmp_path / "a.beton"
    with BetonWriter(path, ["a"], 4) as writer:
        for _ in range(4):
            writer.add(b"no JPEG", 0, size=(8, 8))
    with pytest.raises(DataError, match=r"every image of .* is damaged"):
        list(evaluation_feed(open_beton(path), on_damaged="skip"))


def test_errors_of_the_thread_reach_the_consumer(beton):
    def work():
        yield 0, np.arange(8), None
        raise ZeroDivisionError("in the thread")

    producer = producer_of(beton, work())
    next(producer)
    with pytest.raises(ZeroDivisionError, match="in the thread"):
        next(producer)
    producer.close()


def test_slow_disk_is_an_error_in_time(beton):
    release, answered = threading.Event(), threading.Event()

    def work():
        release.wait(60)
        answered.set()
        yield 0, np.arange(8), None

    producer = producer_of(beton, work(), timeout_seconds=0.3)
    with pytest.raises(DataError, match=r"no batch came from .*a\.beton within 0\.3 s"):
        next(producer)
    assert not answered.is_set()
    release.set()
    producer.close()


def test_silently_ended_thread_is_an_error(beton):
    class Dying(Producer):
        def run(self):
            pass

    producer = producer_of(beton, iter([]), kind=Dying)
    with pytest.raises(DataError, match="ended without an error"):
        next(producer)


def test_numbers_that_do_not_fit(beton):
    with pytest.raises(RecipeError, match="global batch of 280 images cannot be drawn from 70"):
        train_feed(beton, batch={"global_batch": 280, "slot": 70})
    with pytest.raises(RecipeError, match="world size 3 does not divide slots=4"):
        train_feed(beton, 0, 3)


def test_a_thread_that_pins_memory_is_on_the_gpu_of_its_rank(beton, monkeypatch):
    told, empty_views = [], _Images.empty_views
    monkeypatch.setattr(_Images, "empty_views", lambda self, ids, pinned: empty_views(self, ids, False))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", lambda gpu: told.append((gpu, threading.current_thread())))
    producer = producer_of(beton, iter([(0, np.arange(8), None)]), pinned=True)
    next(producer)
    producer.close()
    assert told == [(3, producer)]


def test_reading_ahead_touches_no_gpu(beton):
    """If torch reports GPUs, FFCV's own thread enters a CUDA stream and leaves a context on GPU 0; ours must not."""
    script = """
import sys
import torch
torch.cuda.is_available = lambda: True  # there is none, so any use of a GPU raises
from pipeline.data.beton import open_beton
from pipeline.data.feed import EvaluationFeed
from pipeline.data.subset import Subset
from pipeline.distributed.world import World
from pipeline.recipe.sections import DataSettings
settings = DataSettings(train="-", image_size=24)
feed = EvaluationFeed(Subset(open_beton(sys.argv[1])), settings, 8, World.alone(), workers=1)
assert sum(int(batch.valid.sum()) for batch in feed) == 70
assert not torch.cuda.is_initialized()
"""
    done = subprocess.run([sys.executable, "-c", script, beton.path], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
