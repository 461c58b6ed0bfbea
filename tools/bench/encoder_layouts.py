"""Time and memory of FCMAE's encoder in every layout, forward and backward: `python -m tools.bench.encoder_layouts`.

On a CPU: fp32, one thread, 224 pixels, 30 of 49 cells hidden. The layouts take turns, so that other work on the machine
disturbs all of them alike; figures are medians. "masked" computes hidden sites and throws them away: packed is compared
with it. "dense" sees whole images. Saved bytes are those that autograd keeps for the backward pass, parameters left
out. (masked, an oracle, leaves GRN's gradient to autograd.)
On a GPU, if there is one: bf16 autocast, with and without torch.compile of the blocks, images per second and MFU.

`--depthwise` times the variants of the depthwise convolution alone instead, and prints the lines of FASTEST in
pipeline/sparse/depthwise.py for this machine.
"""

import argparse
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from importlib.util import find_spec
from statistics import geometric_mean

import torch
from torch import Tensor, nn

from pipeline.models import create_model
from pipeline.models.convnextv2 import VARIANTS as MODELS
from pipeline.models.convnextv2 import ConvNeXtBlock, ConvNeXtV2
from pipeline.sparse import DENSE, Layout, Masked, Packed, VisibleCells, find_layout
from pipeline.sparse.depthwise import VARIANTS, convolve_tokens, plan_depthwise
from tools.bench.timing import medians, synchronised_clock

SIZE, CELL, HIDDEN = 224, 32, 30
GRID = (SIZE // CELL, SIZE // CELL)
CELLS = GRID[0] * GRID[1]
SHARE = (CELLS - HIDDEN) / CELLS

Works = dict[str, Callable[[], None]]


def mask_of(images: int) -> Tensor:
    """(images, CELLS) bool, True = hidden."""
    order = torch.rand(images, CELLS, generator=torch.Generator().manual_seed(0)).argsort(1)
    return order < HIDDEN


def layouts_on(device: torch.device) -> dict[str, Callable[[VisibleCells], Layout]]:
    """Layouts by name; "packed" uses the depthwise variants in FASTEST."""
    layouts = {"masked": Masked, "dense": lambda visible: DENSE, "packed": Packed}
    # halo and pairs are made for a CPU's cache and few tokens, triton for a GPU.
    foreign = ("halo", "pairs") if device.type == "cuda" else ("triton",)
    for variant in VARIANTS:
        if variant not in foreign:
            layouts[f"packed, {variant}"] = partial(Packed, depthwise=variant)
    if find_spec("spconv"):
        layouts["spconv"] = find_layout("spconv")
    return layouts


def forward_and_backward(
    encoder: ConvNeXtV2, layout: Callable[[VisibleCells], Layout], images: Tensor, mask: Tensor
) -> None:
    """One pass, including the layout's indices."""
    amp = torch.autocast("cuda", torch.bfloat16) if images.is_cuda else nullcontext()
    with amp:
        loss = encoder.features(images, layout(VisibleCells(mask, GRID, images.device))).float().square().mean()
    loss.backward()
    encoder.zero_grad()


def passes(encoder: ConvNeXtV2, batch: int, device: torch.device) -> Works:
    """A forward and backward pass in each layout, on the same images."""
    images, mask = torch.randn(batch, 3, SIZE, SIZE, device=device), mask_of(batch)
    layouts = layouts_on(device).items()
    return {name: partial(forward_and_backward, encoder, layout, images, mask) for name, layout in layouts}


def saved_bytes(encoder: ConvNeXtV2, work: Callable[[], None]) -> int:
    """Bytes of the different storages that autograd keeps, parameters left out."""
    known = {parameter.untyped_storage().data_ptr() for parameter in encoder.parameters()}
    kept: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known and tensor.is_floating_point():
            kept[storage.data_ptr()] = tensor  # kept alive, or its address could be used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        work()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def macs_per_image(depths: Sequence[int], dims: Sequence[int], in_channels: int = 3, stem_stride: int = 4) -> float:
    """Multiply-adds of the convolutions and linear layers of an encoder at the visible sites of one image."""
    total, sites = 0.0, SHARE * (SIZE // stem_stride) ** 2
    for stage, (depth, dim) in enumerate(zip(depths, dims, strict=True)):
        patch = in_channels * stem_stride**2 if stage == 0 else 4 * dims[stage - 1]
        total += sites * (patch * dim + depth * (49 * dim + 8 * dim * dim))
        sites /= 4
    return total


def measure_on_cpu(models: Sequence[str], batches: Sequence[int], rounds: int) -> None:
    device = torch.device("cpu")
    threads = torch.get_num_threads()
    print(f"CPU, {threads} thread, fp32, {SIZE} px, {HIDDEN} of {CELLS} cells hidden; median of {rounds}")
    for model in models:
        for batch in batches:
            encoder = create_model(f"convnextv2_{model}", num_classes=0)
            works = passes(encoder, batch, device)
            seconds = medians(works, rounds, synchronised_clock(device))
            print(f"\n{model}, batch {batch}\n{'':18}{'ms':>9}{'x masked':>10}{'x dense':>10}{'saved MiB':>11}")
            for name, value in seconds.items():
                ratios = "".join(f"{value / seconds[other]:10.3f}" for other in ("masked", "dense"))
                saved = saved_bytes(encoder, works[name]) / 2**20
                print(f"{name:18}{value * 1e3:9.0f}{ratios}{saved:11.0f}", flush=True)


def matrix_peak(device: torch.device, side: int = 8192) -> float:
    """FLOP/s of one large bf16 matrix product, measured."""
    a, b = torch.randn(2, side, side, device=device, dtype=torch.bfloat16)
    return 2 * side**3 / medians({"product": lambda: torch.mm(a, b)}, 20, synchronised_clock(device))["product"]


def measure_on_gpu(models: Sequence[str], batch: int, rounds: int) -> None:
    device = torch.device("cuda")
    peak = matrix_peak(device)
    print(f"\n{torch.cuda.get_device_name()}, bf16 autocast, batch {batch}, {SIZE} px, median of {rounds}")
    print(f"dense matrix peak, measured: {peak / 1e12:.0f} TFLOP/s")
    print("MFU = images/s * 3 (forward, two gradients) * 2 * multiply-adds at visible sites / dense matrix peak")
    for model in models:
        flops = 6 * macs_per_image(*MODELS[f"convnextv2_{model}"])
        for compiled in (False, True):
            encoder = create_model(f"convnextv2_{model}", num_classes=0).to(device)
            works = passes(encoder, batch, device)
            if compiled:
                torch._dynamo.config.recompile_limit = 64  # blocks share code: one entry for each layout and stage
                for module in [module for module in encoder.modules() if isinstance(module, ConvNeXtBlock)]:
                    module.compile()
                works.pop("spconv", None)  # an oracle, which nobody compiles
            seconds = medians(works, rounds, synchronised_clock(device))
            title = f"{model}, compiled blocks" if compiled else model
            print(f"\n{title}\n{'':18}{'images/s':>10}{'x masked':>10}{'MFU':>7}")
            for name, value in seconds.items():
                mfu = batch / value * flops / peak
                print(f"{name:18}{batch / value:10.0f}{value / seconds['masked']:10.3f}{mfu:7.1%}", flush=True)


def measure_depthwise(rounds: int, device: torch.device, width: int) -> None:
    """Print, for each side of a cell, the variants' times and the fastest over the channels of atto, tiny and base.

    width: a model with C channels in its first stage gets `width` // C images.
    """
    variants = [name for name in VARIANTS if name != "triton" or (device.type == "cuda" and find_spec("triton"))]
    print(f"{device.type}, {torch.get_num_threads()} thread, ms forward and backward, median of {rounds}")
    for stage, side in enumerate((8, 4, 2, 1)):
        times: dict[str, list[float]] = {name: [] for name in variants}
        for model in ("atto", "tiny", "base"):
            dims = MODELS[f"convnextv2_{model}"][1]
            channels, images = dims[stage], width // dims[0]
            visible = VisibleCells(mask_of(images), GRID, device)
            conv = nn.Conv2d(channels, channels, 7, padding=3, groups=channels, device=device)
            dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
            x = torch.randn(visible.tokens(side), channels, device=device, dtype=dtype, requires_grad=True)
            conv.to(dtype)

            def work(variant: str, conv: nn.Conv2d = conv, x: Tensor = x, visible: VisibleCells = visible) -> None:
                convolve_tokens(conv, x, plan_depthwise(visible, side, variant)).backward(x.detach())  # noqa: B023 - runs at once

            works = {name: partial(work, name) for name in variants}
            seconds = medians(works, rounds, synchronised_clock(device))
            row = "".join(f"{name:>9} {value * 1e3:7.1f}" for name, value in seconds.items())
            print(f"  side {side}, {channels:4} channels, {images:3} images:{row}", flush=True)
            for name, value in seconds.items():
                times[name].append(value)
        best = min(times, key=lambda name: geometric_mean(times[name]))
        print(f'    ("{device.type}", {side}): "{best}",', flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", default=["atto", "tiny"], help="base takes minutes on a CPU")
    parser.add_argument("--batches", nargs="+", type=int, default=[8, 32])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--gpu-models", nargs="+", default=["base", "huge"])
    parser.add_argument("--gpu-batch", type=int, default=64)
    parser.add_argument("--depthwise", action="store_true", help="time the depthwise variants alone")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    devices = [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]
    if options.depthwise:
        for device in devices:
            measure_depthwise(options.rounds, device, width=1280 if device.type == "cpu" else 20480)
        return
    measure_on_cpu(options.models, options.batches, options.rounds)
    if len(devices) > 1:
        measure_on_gpu(options.gpu_models, options.gpu_batch, options.rounds)


if __name__ == "__main__":
    main()
