"""The decoder against Pillow on the same files, in one run: `python -m tools.bench.decoder`.

Exactness: 200 crops of photographs, stored as JPEG and raw, scaled up and down; the largest difference in levels.
Speed: images per second of processor time (all threads and worker processes) against Pillow bicubic in torch's
DataLoader. The photographs are those that scikit-image ships.
"""

import io
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from pipeline.data.beton import Beton, BetonWriter, check
from pipeline.data.decode import TrainingPlan
from pipeline.data.feed import TrainFeed
from pipeline.errors import DataError

CROPS = 200
HEIGHT, WIDTH = 375, 500  # ImageNet's usual size
NAMES = ["astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "motorcycle_right.png", "rocket.jpg"]
SCALE, RATIO = (0.2, 1.0), (3 / 4, 4 / 3)
SIZES = {"down": 96, "near": 224, "up": 448}


def photographs(count: int) -> list[Image.Image]:
    """`count` crops of 500 x 375 pixels at changing places and scales. Errors: DataError without scikit-image."""
    try:
        import skimage
    except ImportError:
        raise DataError("the benchmark's photographs come with scikit-image; run `pip install scikit-image`") from None
    folder = Path(skimage.__file__).parent / "data"
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


def write(images: list[Image.Image], directory: Path, mode: str) -> Beton:
    """A .beton file of the images as JPEG (quality 90, also as files beside it) or raw."""
    path = directory / f"{mode}.beton"
    with BetonWriter(path, ["photograph"], len(images)) as writer:
        for i, image in enumerate(images):
            if mode == "raw":
                writer.add(np.array(image), 0)
                continue
            file = io.BytesIO()
            image.save(file, "JPEG", quality=90)
            (directory / f"{i:05d}.jpg").write_bytes(file.getvalue())
            writer.add(file.getvalue(), 0, size=(image.height, image.width))
    return check(path)


def feed(beton: Beton, image_size: int, workers: int, batch: int) -> TrainFeed:
    return TrainFeed(
        beton,
        image_size=image_size,
        seed=7,
        slots=1,
        slot_size=batch,
        rank=0,
        world_size=1,
        slots_per_micro_batch=1,
        workers=workers,
        crop_scale=SCALE,
        crop_ratio=RATIO,
        flip_probability=0.5,
        timeout_seconds=120,
    )


def pillow_crop(image: Image.Image, row: np.void) -> np.ndarray:
    """The same row of a plan, by Pillow."""
    left, top = int(row["left"]), int(row["top"])
    image = image.crop((left, top, left + int(row["width"]), top + int(row["height"])))
    image = image.resize((int(row["full_width"]), int(row["full_height"])), Image.Resampling.BICUBIC)
    return np.asarray(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if row["flip"] else image)


def largest_difference(beton: Beton, images: list[Image.Image], image_size: int) -> int:
    """In levels, over one crop of every image."""
    plan = TrainingPlan(7, image_size, SCALE, RATIO, 0.5)
    worst, ours = 0, feed(beton, image_size, 1, 20)
    for step in range(ours.steps_per_epoch):
        for batch in ours.slots(step):
            ids = batch.ids.numpy()
            rows = plan(0, ids, np.full(len(ids), HEIGHT), np.full(len(ids), WIDTH))
            for i, row, pixels in zip(ids, rows, batch.images.permute(0, 2, 3, 1).numpy(), strict=True):
                worst = max(worst, int(np.abs(pillow_crop(images[i], row).astype(int) - pixels).max()))
    ours.close()
    return worst


class PillowFolder(Dataset):
    """The usual way: a file opened, decoded, cropped and resized by Pillow, one image at a time."""

    def __init__(self, directory: Path, image_size: int) -> None:
        self.paths = sorted(directory.glob("*.jpg"))
        self.plan = TrainingPlan(7, image_size, SCALE, RATIO, 0.5)(
            0, np.arange(len(self.paths)), np.full(len(self.paths), HEIGHT), np.full(len(self.paths), WIDTH)
        )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> torch.Tensor:
        with Image.open(self.paths[i]) as image:
            return torch.from_numpy(pillow_crop(image.convert("RGB"), self.plan[i]).copy())


def _cpu_seconds() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def speed_of_feed(beton: Beton, workers: int, batch: int, rounds: int) -> float:
    """Images per CPU-second, after one step that starts threads and loads compiled code."""
    ours = feed(beton, 224, workers, batch)
    list(ours.slots(0))
    started, images = _cpu_seconds(), 0
    for step in range(1, rounds * ours.steps_per_epoch + 1):
        images += sum(len(b.ids) for b in ours.slots(step))
    seconds = _cpu_seconds() - started
    ours.close()
    return images / seconds


def speed_of_pillow(directory: Path, workers: int, batch: int, rounds: int) -> float:
    """Images per CPU-second of torch's DataLoader, its processes' included."""
    loader = DataLoader(PillowFolder(directory, 224), batch, shuffle=True, num_workers=workers)
    started = _cpu_seconds()
    images = sum(len(b) for _ in range(rounds) for b in loader)
    return images / (_cpu_seconds() - started)


def main(rounds: int = 5) -> None:
    torch.set_num_threads(1)
    images = photographs(CROPS)
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place)
        betons = {mode: write(images, directory, mode) for mode in ("jpg", "raw")}
        decoded = {"raw": images, "jpg": [Image.open(p).convert("RGB") for p in sorted(directory.glob("*.jpg"))]}
        for mode, beton in betons.items():
            worst = {name: largest_difference(beton, decoded[mode], size) for name, size in SIZES.items()}
            print(f"{mode}: largest difference from Pillow over {CROPS} crops, levels: {worst}")
        base = speed_of_pillow(directory, 0, 32, rounds)
        print(f"Pillow + DataLoader, 0 workers: {base:.0f} images per CPU-second")
        print(f"Pillow + DataLoader, 2 workers: {speed_of_pillow(directory, 2, 32, rounds):.0f} images per CPU-second")
        for mode, beton in betons.items():
            for workers in (1, 2):
                speed = speed_of_feed(beton, workers, 32, rounds)
                print(f"{mode}, {workers} workers: {speed:.0f} images per CPU-second, {speed / base:.2f} x Pillow")


if __name__ == "__main__":
    try:
        main()
    except DataError as error:
        sys.exit(str(error))
