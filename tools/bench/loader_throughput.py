"""Throughput of our feed, of Pillow in torch's DataLoader and of webdataset: `python -m tools.bench.loader_throughput`.

    python -m tools.bench.loader_throughput [ROUNDS]
    python -m tools.bench.loader_throughput scenes [ROUNDS]
    python -m tools.bench.loader_throughput objects [ROUNDS]

All read the same JPEGs of quality 90 and apply the pre-training transforms (crop of 0.2-1, flip) and the fine-tuning
ones (crop of 0.08-1, flip, RandAugment), at 224 and 384 pixels. Figures are images per second of CPU time of all
threads and worker processes. Two workers each. `scenes` measures our feed's views for segmentation: crops of 512 pixels
of JPEGs of 683 x 512, with label maps of 150 classes. `objects` measures those for detection: JPEGs of 640 x 480 with
seven ellipses each, whose areas are log-uniform between 200 and 90,000 pixels.
"""

import importlib.util
import io
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco_masks
from torch.utils.data import DataLoader, Dataset

from pipeline.data.beton import Beton, open_beton
from pipeline.data.beton_writer import BetonWriter
from pipeline.data.crops import TrainingPlan
from pipeline.data.feed import TrainFeed
from pipeline.data.objects_file import objects_of_image
from pipeline.data.subset import Subset
from pipeline.distributed.world import World
from pipeline.errors import DataError
from pipeline.recipe.channel_statistics import IMAGENET
from pipeline.recipe.detection_settings import ObjectViewSettings
from pipeline.recipe.sections import BatchSettings, DataSettings
from pipeline.recipe.segmentation_settings import SceneSettings
from tools.bench.photographs import HEIGHT, WIDTH, photographs
from tools.bench.timing import cpu_seconds

IMAGES, BATCH, WORKERS = 192, 32, 2
RATIO, OPERATIONS = (3 / 4, 4 / 3), "rand-m9-mstd0.5-inc1"
TRANSFORMS = {"pre-training": ((0.2, 1.0), None), "fine-tuning": ((0.08, 1.0), OPERATIONS)}
SIZES = (224, 384)
SCENE_SIZE, SCENE_CLASSES = (512, 683), 150  # height and width: the usual photograph of ADE20K
OBJECTS_SIZE, OBJECTS, OBJECT_AREAS = (480, 640), 7, (200, 90_000)  # height and width: the usual photograph of COCO


def write_data(images: list[Image.Image], directory: Path) -> list[Beton]:
    """Write the images as files, in a tar for each worker, and as .beton files of JPEGs and of raw pixels."""
    with (
        BetonWriter(directory / "jpg", ["any"], len(images)) as jpeg,
        BetonWriter(directory / "raw", ["any"], len(images)) as raw,
    ):
        for i, image in enumerate(images):
            file = directory / f"{i:05d}.jpg"
            image.save(file, "JPEG", quality=90)
            jpeg.add(file.read_bytes(), 0, size=(image.height, image.width))
            raw.add(np.array(image), 0)
            with tarfile.open(directory / f"{i % WORKERS}.tar", "a") as tar:
                tar.add(file, file.name)
    return [open_beton(directory / name) for name in ("jpg", "raw")]


def planned_crops(image_size: int, scale: tuple[float, float]) -> np.ndarray:
    """The rows of a training plan, one for each image."""
    sides = (np.full(IMAGES, side) for side in (HEIGHT, WIDTH))
    return TrainingPlan(7, image_size, scale, RATIO, 0.5)(0, np.arange(IMAGES), *sides)


def pillow_crop(image: Image.Image, row: np.void) -> Image.Image:
    """Crop, resize and flip with Pillow as a row of a plan says."""
    left, top = int(row["left"]), int(row["top"])
    image = image.crop((left, top, left + int(row["width"]), top + int(row["height"])))
    image = image.resize((int(row["full_width"]), int(row["full_height"])), Image.Resampling.BICUBIC)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if row["flip"] else image


def timm_rand_augment() -> Callable[[Image.Image], Image.Image]:
    """timm's RandAugment, loaded from its file alone because the package loads torchvision.

    Raises:
        DataError: if timm is not installed.
    """
    spec = importlib.util.find_spec("timm")
    if spec is None:
        raise DataError("Pillow's side of the benchmark uses timm's RandAugment; run `pip install timm`")
    spec = importlib.util.spec_from_file_location("auto_augment", Path(spec.origin).parent / "data/auto_augment.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    augment = module.rand_augment_transform(
        OPERATIONS, {"img_mean": IMAGENET.fill, "interpolation": Image.Resampling.BICUBIC}
    )

    def guarded(image: Image.Image) -> Image.Image:
        try:
            return augment(image)
        except ValueError:  # Pillow refuses to posterize to 0 bits, which timm draws now and then
            return Image.new("RGB", image.size)

    return guarded


class PillowFolder(Dataset):
    """The usual data set: Pillow opens, decodes, crops, resizes and augments one image at a time."""

    def __init__(self, directory: Path, image_size: int, scale: tuple[float, float], augmented: bool) -> None:
        self.paths, self.rows = sorted(directory.glob("*.jpg")), planned_crops(image_size, scale)
        self.augment = timm_rand_augment() if augmented else lambda image: image

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> torch.Tensor:
        return self.pixels(i, self.paths[i].read_bytes())

    def pixels(self, i: int, content: bytes) -> torch.Tensor:
        with Image.open(io.BytesIO(content)) as image:
            return torch.from_numpy(np.array(self.augment(pillow_crop(image.convert("RGB"), self.rows[i]))))


def web_shards(directory: Path, folder: PillowFolder) -> "torch.utils.data.IterableDataset | None":
    """The same transforms behind webdataset's reader, or None where it is not installed."""
    try:
        import webdataset
    except ImportError:
        return None
    shards = [str(directory / f"{i}.tar") for i in range(WORKERS)]
    reader = webdataset.WebDataset(shards, shardshuffle=WORKERS, empty_check=False)
    return reader.to_tuple("__key__", "jpg").map(lambda sample: folder.pixels(int(sample[0]), sample[1]))


def our_batches(beton: Beton, image_size: int, scale: tuple[float, float], operations: str | None, rounds: int):
    """Batches of the feed. Four times the rounds, because it prefetches three batches that nobody uses at the end."""
    settings = DataSettings(
        train=str(beton.path), image_size=image_size, crop_scale=scale, crop_ratio=RATIO, rand_augment=operations
    )
    batch = BatchSettings(global_batch=BATCH, slot=BATCH)
    feed = TrainFeed(Subset(beton), settings, batch, World.alone(), seed=7, workers=WORKERS)
    for step in range(4 * rounds * feed.steps_per_epoch + 1):
        yield from (batch.images for batch in feed.slots(step))
    feed.close()


def images_per_second(batches: Iterable[torch.Tensor], skip_first: bool = False) -> float:
    """Images per CPU-second; `skip_first` leaves the first batch out, which loads compiled code."""
    batches = iter(batches)
    if skip_first:
        next(batches)
    began, images = cpu_seconds(), sum(len(batch) for batch in batches)
    return images / (cpu_seconds() - began)


def write_scene_file(images: list[Image.Image], path: Path) -> Beton:
    """Write the images as JPEGs with label maps of 12 x 16 fields, whose classes neighbours often share."""
    numbers, (height, width) = np.random.default_rng(1), SCENE_SIZE
    with BetonWriter(path, [str(number) for number in range(SCENE_CLASSES)], len(images)) as writer:
        for image in images:
            file = io.BytesIO()
            image.resize((width, height), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
            fields = numbers.choice(numbers.integers(0, SCENE_CLASSES, 8), (12, 16)).astype(np.uint8)
            label_map = fields[np.arange(height) * 12 // height][:, np.arange(width) * 16 // width]
            writer.add(file.getvalue(), 0, size=SCENE_SIZE, label_map=label_map)
    return open_beton(path)


def write_object_file(images: list[Image.Image], path: Path) -> Beton:
    """Write the images as JPEGs with ellipses anywhere in them as their objects."""
    numbers, (height, width) = np.random.default_rng(1), OBJECTS_SIZE
    y, x = np.mgrid[:height, :width]
    with BetonWriter(path, ["any"], len(images)) as writer:
        for number, image in enumerate(images):
            file, drawn = io.BytesIO(), []
            image.resize((width, height), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
            for area in np.exp(numbers.uniform(*np.log(OBJECT_AREAS), OBJECTS)).tolist():
                high, centre = (area / np.pi) ** 0.5 * numbers.uniform(0.7, 1.4), numbers.uniform(0, 1, 2)
                wide = area / np.pi / high
                mask = ((y - centre[0] * height) / high) ** 2 + ((x - centre[1] * width) / wide) ** 2 < 1
                rle = coco_masks.encode(np.asfortranarray(mask, np.uint8))
                drawn.append({"box": coco_masks.toBbox(rle), "class": 0, "rle": rle["counts"]})
            objects = objects_of_image(number, OBJECTS_SIZE, drawn, (1,))
            writer.add(file.getvalue(), 0, size=OBJECTS_SIZE, objects=objects)
    return open_beton(path)


def view_batches(settings: DataSettings, beton: Beton, rounds: int, **options: bool) -> Iterator[torch.Tensor]:
    """Batches of views for segmentation or detection; as many rounds as `our_batches`."""
    batch = BatchSettings(global_batch=BATCH, slot=BATCH)
    feed = TrainFeed(Subset(beton), settings, batch, World.alone(), seed=7, workers=WORKERS, **options)
    for step in range(4 * rounds * feed.steps_per_epoch + 1):
        yield from (batch.images for batch in feed.slots(step))
    feed.close()


def measure_scenes(rounds: int = 1) -> None:
    torch.set_num_threads(1)
    variants: dict[str, dict[str, bool | float]] = {
        "resize, crop and flip": {"photometric": False, "class_limit": 1.0},
        "with the class limit": {"photometric": False},
        "with photometric distortion": {"class_limit": 1.0},
        "all": {},
    }
    print("images per CPU-second")
    with tempfile.TemporaryDirectory() as folder:
        beton = write_scene_file(photographs(IMAGES), Path(folder) / "scenes.beton")
        for name, changes in variants.items():
            settings = DataSettings(train=str(beton.path), image_size=512, scenes=SceneSettings(**changes))
            rate = images_per_second(view_batches(settings, beton, rounds), skip_first=True)
            print(f"{name:30}{rate:8.0f}", flush=True)


def measure_objects(rounds: int = 1) -> None:
    torch.set_num_threads(1)
    print("images per CPU-second")
    with tempfile.TemporaryDirectory() as folder:
        beton = write_object_file(photographs(IMAGES), Path(folder) / "objects.beton")
        for kind, canvas in (("large_scale_jitter", 1024), ("multi_scale", 1344), ("resize", 1344)):
            settings = DataSettings(train=str(beton.path), image_size=canvas, views=ObjectViewSettings(kind=kind))
            for masks in (False, True):
                rate = images_per_second(view_batches(settings, beton, rounds, masks=masks), skip_first=True)
                print(f"{kind}, {canvas} px, {'masks' if masks else 'boxes alone':12}{rate:8.1f}", flush=True)


def main(rounds: int = 2) -> None:
    torch.set_num_threads(1)
    print(f"{'images per CPU-second':26}{'Pillow':>8}{'webdataset':>18}{'ours, JPEG':>18}{'ours, raw':>18}")
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        betons = write_data(photographs(IMAGES), directory)
        for name, (scale, operations) in TRANSFORMS.items():
            for size in SIZES:
                files = PillowFolder(directory, size, scale, bool(operations))
                loader = DataLoader(files, BATCH, shuffle=True, num_workers=WORKERS)
                base = images_per_second(batch for _ in range(rounds) for batch in loader)
                rates: list[float | None] = [None]
                if (shards := web_shards(directory, files)) is not None:
                    web = DataLoader(shards, BATCH, num_workers=WORKERS)
                    rates = [images_per_second(batch for _ in range(rounds) for batch in web)]
                for beton in betons:
                    ours = our_batches(beton, size, scale, operations, rounds)
                    rates.append(images_per_second(ours, skip_first=True))
                cells = (f"{rate:9.0f} ({rate / base:.2f} x)" if rate else f"{'not installed':>18}" for rate in rates)
                print(f"{f'{name}, {size} px':26}{base:8.0f}{''.join(cells)}", flush=True)


if __name__ == "__main__":
    try:
        measures = {"scenes": measure_scenes, "objects": measure_objects}
        named = measures.get(next(iter(sys.argv[1:]), ""))
        (named or main)(*map(int, sys.argv[2 if named else 1 :]))
    except DataError as error:
        sys.exit(str(error))
