"""Instructions, barriers, spills and registers of Triton kernels of ConvNeXt V2 on a GPU that need not be there.

`python -m tools.bench.kernel_code [--target 80]` compiles the kernels as a training step of ConvNeXt V2 Huge in bf16
would launch them. Of a depthwise convolution it counts the instructions of one tap of 32 sites x 64 channels, which 128
threads share; of other kernels, those of one value.
"""

import argparse
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from tools.bench.gpu_code import CompiledKernel, Loop, compile_launches
from tools.tables import markdown_table

WIDTHS = {8: 352, 4: 704, 2: 1408, 1: 2816}  # channels of Huge by the side of a cell
HEADER = ("kernels", "kernel", "instructions", "barriers", "spills", "registers")


def instructions_per_tap(loop: Loop) -> float:
    """Instructions of a depthwise loop for a tap of 32 x 64: the multiplications of a tap are 16 for each thread."""
    return 16 * loop.instructions / loop.multiplications


def instructions_per_value(code: CompiledKernel) -> float:
    """Instructions of a thread for each value of the features, of the loop or of a kernel without one."""
    per_thread = code.constants["SITES"] * code.constants["CHANNELS"] / (32 * code.constants["num_warps"])
    return (code.loops[0].instructions if code.loops else code.instructions) / per_thread


def features(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A tensor that has a shape and no memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def packed_depthwise(side: int, images: int = 64) -> None:
    """Launch the kernels of packed tokens with cells of side x side, 20 of them visible in each image."""
    from pipeline.kernels.triton_depthwise import convolve_rows, correlate_rows, packed_sites

    channels, cells = WIDTHS.get(side, 64), 20 * images
    x = features(cells * side * side, channels)
    sites = packed_sites(features(cells, side + 6, side + 6, dtype=torch.int32), 7)
    convolve_rows(x, features(channels, 1, 7, 7), features(channels), sites)
    correlate_rows(x, x, 7, sites)


def dense_depthwise(size: int = 56, images: int = 64, channels: int = 352) -> None:
    """Launch the kernels of dense maps (N, size, size, C)."""
    from pipeline.kernels.triton_depthwise import Sites, convolve_rows, correlate_rows

    x, sites = features(images, size, size, channels), Sites(None, size, size)
    convolve_rows(x, features(channels, 1, 7, 7), features(channels), sites)
    correlate_rows(x, x, 7, sites)


def gelu_grn(sites: int, channels: int, images: int = 64) -> None:
    """Launch the kernels of GELU and GRN on (N, sites, C)."""
    from pipeline.kernels.triton_gelu_grn import backward_gelu_grn, forward_gelu_grn

    x, gamma = features(images, sites, channels), features(channels, dtype=torch.float32)
    _, norm = forward_gelu_grn(x, gamma, gamma, False, 1e-6)
    backward_gelu_grn(x, x, norm, gamma, False, 1e-6)


def layer_norm(sites: int, channels: int) -> None:
    """Launch the kernels of LayerNorm on (sites, C)."""
    from pipeline.kernels.triton_layer_norm import backward_layer_norm, forward_layer_norm

    x, weight = features(sites, channels), features(channels, dtype=torch.float32)
    _, mean, deviation = forward_layer_norm(x, weight, weight, 1e-6)
    backward_layer_norm(x, x, weight, mean, deviation)


def region_align(dtype: torch.dtype = torch.bfloat16) -> None:
    """Launch the kernels of RoIAlign on the finest maps of four images of 1024 px."""
    from pipeline.kernels.triton_region_align import pool_levels, spread_levels

    x, grids = features(4, 256, 256, 256, dtype=dtype), features(4, 512, 7, dtype=torch.float32)
    pool_levels([x], grids, 7)
    spread_levels(features(4, 512, 7, 7, 256, dtype=dtype), grids, [x.shape])


def suppression(boxes: int) -> None:
    """Launch the kernel of non-maximum suppression for five maps of four images."""
    from pipeline.kernels.triton_suppression import keep_in_order

    keep_in_order(
        features(20, 4, boxes, dtype=torch.float32), torch.empty(20, boxes, dtype=torch.bool, device="meta"), 0.7
    )


def launches() -> Iterator[tuple[str, Callable[[], None]]]:
    """The name and the launch of all kernels, with the shapes of Huge at 64 images of 224 px."""
    for side in WIDTHS:
        yield f"depthwise, packed, side {side}", partial(packed_depthwise, side)
    yield "depthwise, maps 56x56", dense_depthwise
    yield "GELU and GRN", partial(gelu_grn, 80, 4 * WIDTHS[2])
    for side in (8, 1):
        yield f"LayerNorm, {WIDTHS[side]} channels", partial(layer_norm, 64 * 20 * side**2, WIDTHS[side])


def describe(code: CompiledKernel) -> list[str]:
    """The columns of a kernel: instructions of a tap or a value, barriers in its loops, spills, registers."""
    count = instructions_per_tap(code.loops[0]) if "WINDOW" in code.constants else instructions_per_value(code)
    barriers = sum(loop.barriers for loop in code.loops)
    return [f"{count:.0f}", *map(str, (barriers, code.spills, code.registers))]


def rows(capability: int) -> Iterator[list[str]]:
    """The rows of the table."""
    for subject, launch in launches():
        for name, code in compile_launches(launch, capability).items():
            yield [subject, name.removesuffix("_kernel"), *describe(code)]


def main() -> None:
    import triton

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--target", type=int, default=90, help="80 for A100, 90 for H100 and H200")
    options = parser.parse_args()
    print(f"sm_{options.target}, Triton {triton.__version__}\n")
    print(markdown_table(HEADER, list(rows(options.target)), right=HEADER[2:]))


if __name__ == "__main__":
    main()
