"""CPU time of a detector's operators and of other forms of them: `python -m tools.bench.region_operators`.

RoIAlign of two images of 1024 px: maps of 256 channels, strides 4 to 32, regions of 16 to 1024 px, 7 x 7 bins of four
samples, fp32. torchvision's Python form is the one for devices without a kernel of its own.
NMS of the boxes of two images, and assignment of one image's anchors. One thread; the forms of an operator take turns.
"""

import argparse
import importlib
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.kernels.region_align import region_align
from pipeline.kernels.suppression import _suppress_plainly, suppress
from pipeline.models import assignment
from pipeline.models.boxes import make_anchors, scattered_boxes
from pipeline.models.region_heads import RATIOS
from pipeline.models.region_proposals import SCALE
from pipeline.objectives.region_loops import compile_regions
from tools.analyze.timm_import import import_torchvision
from tools.bench.timing import medians, print_header, print_row, quiet_clock

IMAGES, SIDE, CHANNELS, STRIDES, BINS, FINEST = 2, 1024, 256, (4, 8, 16, 32), 7, 56


def by_level(regions: Tensor, align: Callable[[int, Tensor, Tensor], Tensor]) -> Tensor:
    """Pool the regions (IMAGES, R, 4) of each level by themselves, and put them in order again.

    align: pools n regions (n, 4) in a level's map; also given the images (n,) that they are of, in rising order.
    """
    side = (regions[..., 2:] - regions[..., :2]).prod(-1).sqrt()
    level = (side / FINEST + 1e-6).log2().floor().clamp(0, len(STRIDES) - 1)
    pooled = regions.new_zeros(*regions.shape[:2], CHANNELS, BINS, BINS)
    for number in range(len(STRIDES)):
        image, place = (level == number).nonzero(as_tuple=True)
        pooled = pooled.index_put((image, place), align(number, image, regions[image, place]))
    return pooled


def sample_grid(x: Tensor, regions: Tensor) -> Tensor:
    """The features of one image's regions (n, 4) in a map (1, C, H, W), four samples a bin."""
    share = (torch.arange(2 * BINS) + 0.5) / (2 * BINS)
    x1, y1, x2, y2 = (2 * regions / SIDE - 1).T[..., None]
    shape = (len(regions), 2 * BINS, 2 * BINS)
    columns, rows = (x1 + share * (x2 - x1))[:, None].expand(shape), (y1 + share * (y2 - y1))[..., None].expand(shape)
    grid = torch.stack([columns, rows], -1).view(1, -1, 2 * BINS, 2)
    samples = F.grid_sample(x, grid, padding_mode="border", align_corners=False)
    return F.avg_pool2d(samples.view(CHANNELS, *shape), 2).transpose(0, 1)


def pooling_forms(maps: Sequence[Tensor], regions: Tensor) -> dict[str, Callable[[], Tensor]]:
    """The forms of RoIAlign; torchvision's only where it is installed."""

    def sampled(level: int, image: Tensor, own: Tensor) -> Tensor:
        return torch.cat([sample_grid(maps[level][n : n + 1], own[image == n]) for n in range(IMAGES)])

    works = {
        "compiled loops": lambda: region_align(maps, STRIDES, regions, BINS, sampling_ratio=2),
        "F.grid_sample": lambda: by_level(regions, sampled),
    }
    try:
        import_torchvision()
        theirs = importlib.import_module("torchvision.ops.roi_align")._roi_align.__wrapped__
    except ImportError:
        return works

    def interpolated(level: int, image: Tensor, own: Tensor) -> Tensor:
        rows = torch.cat([image[:, None].to(own.dtype), own], 1)
        return theirs(maps[level], rows, 1 / STRIDES[level], BINS, BINS, 2, True)

    return {**works, "torchvision, Python form": lambda: by_level(regions, interpolated)}


def keep_by_pairs(boxes: list[list[float]], threshold: float) -> list[bool]:
    """Greedy NMS of sorted boxes by a plain loop over pairs."""
    kept: list[int] = []
    areas = [(x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in boxes]
    for n, (x1, y1, x2, y2) in enumerate(boxes):
        for other in kept:
            u1, v1, u2, v2 = boxes[other]
            both = max(min(x2, u2) - max(x1, u1), 0.0) * max(min(y2, v2) - max(y1, v1), 0.0)
            if both > threshold * (areas[n] + areas[other] - both):
                break
        else:
            kept.append(n)
    return [n in set(kept) for n in range(len(boxes))]


def assign_by_objects(objects: Tensor, anchors: Tensor) -> Tensor:
    """`assign` without crowds by a plain loop over objects, with the thresholds of the proposal network."""
    best = torch.full((len(anchors),), -1.0)
    index, own = torch.zeros(len(anchors), dtype=torch.int64), []
    for number, one in enumerate(objects):
        overlap = assignment.overlap_objects(one[None], torch.zeros(1, dtype=torch.bool), anchors)[0]
        index = torch.where(overlap > best, number, index)
        best = torch.maximum(best, overlap)
        own.append((overlap == overlap.max()) & (overlap.max() >= 0.3))
    assigned = torch.where(best >= 0.7, index, torch.where(best < 0.3, assignment.NOTHING, assignment.IGNORED))
    for number, places in enumerate(own):
        assigned[places] = number
    return assigned


def print_works(operator: str, works: dict[str, Callable[[], object]], rounds: int, notes: dict[str, str]) -> None:
    """Print a row for each form; ratios are to the first, which is the program's own."""
    times = medians(works, rounds, quiet_clock(torch.device("cpu")))
    first = next(iter(times.values()))
    for name, seconds in times.items():
        print_row([operator, name, f"{1000 * seconds:.1f}", f"{seconds / first:.1f}", notes.get(name, "equal")])


def measure_pooling(regions: Tensor, rounds: int) -> None:
    """Print the forms of RoIAlign: forward, and backward to the maps."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(IMAGES, CHANNELS, SIDE // stride, SIDE // stride) for stride in STRIDES]
    maps = [torch.randn(size, generator=generator).requires_grad_() for size in sizes]
    works = pooling_forms(maps, regions)
    pooled = {name: work() for name, work in works.items()}
    own = next(iter(pooled.values()))
    notes = {name: f"differs by {(y - own).abs().max():.0e}" for name, y in pooled.items() if y is not own}
    print_works("RoIAlign, forward", works, rounds, notes)

    def backward(y: Tensor) -> Callable[[], object]:
        return lambda: torch.autograd.grad(y, maps, torch.ones_like(y), retain_graph=True)

    print_works(
        "RoIAlign, backward", {name: backward(y) for name, y in pooled.items()}, rounds, dict.fromkeys(works, "")
    )


def measure_suppression(number: int, rounds: int) -> None:
    boxes = scattered_boxes(number, (SIDE, SIDE)).float().expand(IMAGES, -1, -1)
    valid = torch.ones(IMAGES, number, dtype=torch.bool)
    pairs = [one.tolist() for one in boxes.double()]
    works = {
        "compiled loop": lambda: suppress(boxes, valid, 0.7),
        "torch operators": lambda: _suppress_plainly(boxes.permute(0, 2, 1), valid, 0.7),
        "plain Python loop": lambda: [keep_by_pairs(one, 0.7) for one in pairs],
    }
    own, *others = (torch.as_tensor(work()) for work in works.values())
    assert all(torch.equal(own, other) for other in others)
    print_works(f"NMS of {number} boxes", works, rounds, {})


def measure_assignment(number: int, rounds: int) -> None:
    strides = (*STRIDES, 64)
    anchors = torch.cat(make_anchors([(SIDE // stride, SIDE // stride) for stride in strides], strides, SCALE, RATIOS))
    objects, crowd = scattered_boxes(number, (SIDE, SIDE)).float(), torch.zeros(number, dtype=torch.bool)

    def matrices() -> Tensor:
        overlap = assignment.overlap_objects(objects, crowd, anchors)
        return assignment.assign(overlap, crowd, 0.7, 0.3, 0.3, True)

    works = {"matrices in chunks": matrices, "loop over objects": lambda: assign_by_objects(objects, anchors)}
    own, other = (work() for work in works.values())
    assert torch.equal(own, other)
    print_works(f"assignment of {len(anchors):,} anchors to {number} objects", works, rounds, {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--regions", type=int, default=128, help="of each image")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    compile_regions()
    print_header(["operator", "form", "ms", "x first", "result"])
    measure_pooling(scattered_boxes(options.regions, (SIDE, SIDE)).float().expand(IMAGES, -1, -1), options.rounds)
    measure_suppression(1000, options.rounds)
    for objects in (7, 50):
        measure_assignment(objects, options.rounds)


if __name__ == "__main__":
    main()
