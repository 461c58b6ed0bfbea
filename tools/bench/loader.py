"""Our feed against Pillow in torch's DataLoader and in webdataset: `python -m tools.bench.loader [ROUNDS]`.

The same photographs of 500 x 375 pixels (crops of those that scikit-image ships; JPEG, quality 90) go through the
pre-training transforms (crop of 0.2-1, flip) and the fine-tuning ones (crop of 0.08-1, flip, RandAugment), at 224 and
384 pixels. What counts is images per second of processor time, of all threads and worker processes. Two workers each.
"""

import importlib.util
import io
import resource
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from pipeline.data.beton import Beton, BetonWriter, check
from pipeline.data.crops import TrainingPlan
from pipeline.data.feed import TrainFeed
from pipeline.data.randaugment import RandAugment
from pipeline.data.randaugment_operations import FILL
from pipeline.errors import DataError

IMAGES, BATCH, WORKERS = 192, 32, 2
HEIGHT, WIDTH = 375, 500  # ImageNet's usual size
NAMES = ["astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "motorcycle_right.png", "rocket.jpg"]
RATIO, OPERATIONS = (3 / 4, 4 / 3), "rand-m9-mstd0.5-inc1"
TRANSFORMS = {"pre-training": ((0.2, 1.0), None), "fine-tuning": ((0.08, 1.0), OPERATIONS)}
SIZES = (224, 384)


def photographs(count: int) -> list[Image.Image]:
    """`count` crops of 500 x 375 pixels at changing places and scales. Errors: DataError without scikit-image."""
    spec = importlib.util.find_spec("skimage")
    if spec is None:
        raise DataError("the benchmark's photographs come with scikit-image; run `pip install scikit-image`")
    folder = Path(spec.origin).parent / "data"
    sources = [Image.open(folder / name).convert("RGB") for name in NAMES]
    numbers = np.random.default_rng(0)
    crops = []
    for i in range(count):
        source = sources[i % len(sources)]
        share = numbers.uniform(0.6, 1.0) * min(source.width / WIDTH, source.height / HEIGHT)
        width, height = int(WIDTH * share), int(HEIGHT * share)
        left, top = numbers.integers(source.width - width + 1), numbers.integers(source.height - height + 1)
        box = (left, top, left + width, top + height)
        crops.append(source.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS, box))
    return crops


def write(images: list[Image.Image], directory: Path) -> dict[str, Beton]:
    """A .beton file of JPEGs and one of raw pixels; the JPEGs also as files, and in a tar for each worker."""
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
    return {name: check(directory / name) for name in ("jpg", "raw")}


def crops(image_size: int, scale: tuple[float, float]) -> np.ndarray:
    """Rows of a plan, one for each image."""
    sides = (np.full(IMAGES, side) for side in (HEIGHT, WIDTH))
    return TrainingPlan(7, image_size, scale, RATIO, 0.5)(0, np.arange(IMAGES), *sides)


def pillow_crop(image: Image.Image, row: np.void) -> Image.Image:
    """What a plan's row says, by Pillow: crop, resize, flip."""
    left, top = int(row["left"]), int(row["top"])
    image = image.crop((left, top, left + int(row["width"]), top + int(row["height"])))
    image = image.resize((int(row["full_width"]), int(row["full_height"])), Image.Resampling.BICUBIC)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if row["flip"] else image


def timms_rand_augment() -> Callable[[Image.Image], Image.Image]:
    """timm's, from its file alone: the package loads torchvision. Errors: DataError without timm."""
    spec = importlib.util.find_spec("timm")
    if spec is None:
        raise DataError("the rival's RandAugment is timm's; run `pip install timm`")
    spec = importlib.util.spec_from_file_location("auto_augment", Path(spec.origin).parent / "data/auto_augment.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    augment = module.rand_augment_transform(OPERATIONS, {"img_mean": FILL, "interpolation": Image.Resampling.BICUBIC})

    def guarded(image: Image.Image) -> Image.Image:
        try:
            return augment(image)
        except ValueError:  # Pillow refuses to posterize to 0 bits, which timm draws now and then
            return Image.new("RGB", image.size)

    return guarded


class PillowFolder(Dataset):
    """The usual way: a file opened, decoded, cropped, resized and augmented by Pillow, one image at a time."""

    def __init__(self, directory: Path, image_size: int, scale: tuple[float, float], augmented: bool) -> None:
        self.paths, self.rows = sorted(directory.glob("*.jpg")), crops(image_size, scale)
        self.augment = timms_rand_augment() if augmented else lambda image: image

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
    """Batches of the feed, more than of the others: at the end it has read up to three ahead for nothing."""
    feed = TrainFeed(
        beton,
        image_size=image_size,
        seed=7,
        slots=1,
        slot_size=BATCH,
        rank=0,
        world_size=1,
        slots_per_micro_batch=1,
        workers=WORKERS,
        crop_scale=scale,
        crop_ratio=RATIO,
        flip_probability=0.5,
        timeout_seconds=120,
        rand_augment=operations and RandAugment.parse(operations),
    )
    for step in range(4 * rounds * feed.steps_per_epoch + 1):
        yield from (batch.images for batch in feed.slots(step))
    feed.close()


def cpu_seconds() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def speed(batches: Iterable[torch.Tensor], first_counts: bool = True) -> float:
    """Images per CPU-second. Our first batch loads compiled code, and does not count."""
    batches = iter(batches)
    if not first_counts:
        next(batches)
    started, images = cpu_seconds(), sum(len(batch) for batch in batches)
    return images / (cpu_seconds() - started)


def main(rounds: int = 2) -> None:
    torch.set_num_threads(1)
    print(f"{'images per CPU-second':26}{'Pillow':>8}{'webdataset':>18}{'ours, JPEG':>18}{'ours, raw':>18}")
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place)
        betons = write(photographs(IMAGES), directory)
        for name, (scale, operations) in TRANSFORMS.items():
            for size in SIZES:
                folder = PillowFolder(directory, size, scale, bool(operations))
                loader = DataLoader(folder, BATCH, shuffle=True, num_workers=WORKERS)
                base = speed(batch for _ in range(rounds) for batch in loader)
                line = f"{f'{name}, {size} px':26}{base:8.0f}"
                shards = web_shards(directory, folder)
                if shards is None:
                    line += f"{'not installed':>18}"
                else:
                    web = DataLoader(shards, BATCH, num_workers=WORKERS)
                    rate = speed(batch for _ in range(rounds) for batch in web)
                    line += f"{rate:9.0f} ({rate / base:.2f} x)"
                for beton in betons.values():
                    rate = speed(our_batches(beton, size, scale, operations, rounds), first_counts=False)
                    line += f"{rate:9.0f} ({rate / base:.2f} x)"
                print(line, flush=True)


if __name__ == "__main__":
    try:
        main(*map(int, sys.argv[1:]))
    except DataError as error:
        sys.exit(str(error))
