"""Cores that the loader needs, from images as large as ImageNet's: `python -m tools.bench.loader_cores`.

    python -m tools.bench.loader_cores             every table
    python -m tools.bench.loader_cores producer    the serial part of a rank's producer alone

The images are photographs of 500 x 375 pixels as JPEGs of 108 kB, ImageNet-1K's mean. The first table has the stored
forms of a file beside each other, the second the images per second of CPU time by size and augmentation, from which
`fcmae estimate` takes the cores per GPU. The third has what a rank's producer does one image after another: it feeds
batches whose decoding is left out.
"""

import io
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pipeline.data.beton import Beton, allocations_of, open_beton
from pipeline.data.beton_writer import BetonWriter
from pipeline.data.crops import TrainingPlan
from pipeline.data.feed import TrainFeed
from pipeline.data.subset import Subset
from pipeline.distributed.world import World
from pipeline.recipe.sections import BatchSettings, DataSettings
from tools.bench.photographs import HEIGHT, WIDTH, photographs
from tools.bench.timing import cpu_seconds, print_header, print_row

IMAGES, MEAN_BYTES = 128, 108_000
RATIO = (3 / 4, 4 / 3)
PRE_TRAINING, FINE_TUNING = ((0.2, 1.0), None), ((0.08, 1.0), "rand-m9-mstd0.5-inc1")
CASES = [(224, PRE_TRAINING), (224, FINE_TUNING), (384, FINE_TUNING), (512, FINE_TUNING)]
FORMS = {  # longer side, raw pixels
    "JPEG as it came": (None, False),
    "JPEG, max-side 341": (341, False),
    "JPEG, max-side 256": (256, False),
    "raw": (None, True),
    "raw, max-side 341": (341, True),
    "raw, max-side 256": (256, True),
}


def jpeg(image: Image.Image, quality: int) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()


def usual_quality(images: list[Image.Image]) -> int:
    """The quality at which the images' JPEGs have ImageNet's mean size."""
    return min(range(85, 100), key=lambda q: abs(np.mean([len(jpeg(image, q)) for image in images[:24]]) - MEAN_BYTES))


def write_form(path: Path, images: list[Image.Image], quality: int, side: int | None, raw: bool) -> Beton:
    """Write the images in one of the FORMS; shrunk ones as `fcmae prepare --max-side` does, with its quality of 90."""
    with BetonWriter(path, ["any"], len(images)) as writer:
        for image in images:
            if side:
                share = side / max(image.size)
                image = image.resize(
                    (round(image.width * share), round(image.height * share)), Image.Resampling.LANCZOS
                )
            if raw:
                writer.add(np.array(image), 0)
            else:
                writer.add(jpeg(image, 90 if side else quality), 0, size=(image.height, image.width))
    return open_beton(path)


def open_feed(beton: Beton, size: int, transform: tuple, workers: int, batch: int = 64) -> TrainFeed:
    scale, operations = transform
    settings = DataSettings(
        train=str(beton.path), image_size=size, crop_scale=scale, crop_ratio=RATIO, rand_augment=operations
    )
    return TrainFeed(
        Subset(beton), settings, BatchSettings(global_batch=batch, slot=batch), World.alone(), seed=7, workers=workers
    )


def images_per_cpu_second(beton: Beton, size: int, transform: tuple, steps: int) -> float:
    """Of all threads of the loader, without the batches that it has read ahead."""
    feed = open_feed(beton, size, transform, workers=1)
    began = 0.0
    for step in range(steps + 4):
        if step == 4:  # the first ones load compiled code and fill the queue
            began = cpu_seconds()
        for _ in feed.slots(step):
            pass
    rate = steps * 64 / (cpu_seconds() - began)
    feed.close()
    return rate


def serial_images_per_second(beton: Beton, size: int, transform: tuple, seconds: float = 4.0) -> tuple[float, float]:
    """What one producer feeds if decoding takes no time: images per second of its wall time, and of all CPU time."""
    feed = open_feed(beton, size, transform, workers=2)
    feed._loader.images.decoder.start = lambda *batch: lambda: np.zeros(len(batch[7]), np.int32)
    images, began, cpu = 0, 0.0, 0.0
    for step in range(10**9):
        if step == 4:
            began, cpu = time.perf_counter(), cpu_seconds()
        for batch in feed.slots(step):
            images += len(batch.ids) * (step >= 4)
        if step >= 4 and time.perf_counter() - began > seconds:
            break
    rates = images / (time.perf_counter() - began), images / (cpu_seconds() - cpu)
    feed.close()
    return rates


def upscaled(beton_size: tuple[int, int], size: int, scale: tuple[float, float]) -> float:
    """The fraction of random crops with fewer pixels than the network sees."""
    height, width = (np.full(20_000, side) for side in beton_size)
    plan = TrainingPlan(7, size, scale, RATIO, 0.5)(0, np.arange(20_000), height, width)
    return float(np.mean(plan["height"] * plan["width"] < size * size))


def main(only: str = "") -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        images = photographs(IMAGES)
        quality = usual_quality(images)
        forms = FORMS if not only else {"JPEG as it came": (None, False)}
        betons = {
            name: write_form(Path(folder) / f"{n}.beton", images, quality, *form)
            for n, (name, form) in enumerate(forms.items())
        }
        if not only:
            print_forms(betons)
            print_header(["size, augmentation", "JPEG of 108 kB, images per CPU second", "raw"])
            for size, transform in CASES:
                rates = [images_per_cpu_second(betons[name], size, transform, 8) for name in ("JPEG as it came", "raw")]
                print_row([f"{size} px, {transform[1] or 'crop and flip'}", *(f"{rate:.0f}" for rate in rates)])
        print_header(["producer without decoding", "images/s", "images per CPU second"])
        for size, transform in CASES:
            rates = serial_images_per_second(betons["JPEG as it came"], size, transform)
            print_row([f"{size} px, {transform[1] or 'crop and flip'}", *(f"{rate:,.0f}" for rate in rates)])


def print_forms(betons: dict[str, Beton]) -> None:
    print_header(
        [
            "stored as",
            "pixels",
            "kB an image",
            "224 px, pre-training",
            "224 px, fine-tuning",
            "crops of 0.08-1 enlarged",
        ]
    )
    for name, beton in betons.items():
        side = FORMS[name][0] or WIDTH
        size = round(HEIGHT * side / WIDTH), side
        rates = [images_per_cpu_second(beton, 224, transform, 8) for transform in (PRE_TRAINING, FINE_TUNING)]
        shares = upscaled(size, 224, FINE_TUNING[0])
        print_row([name, f"{size[1]} x {size[0]}", f"{allocations_of(beton)['size'].mean() / 1000:.0f}",
                   *(f"{rate:.0f}" for rate in rates), f"{shares:.0%}"])  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
