"""The forms of large depthwise convolutions, forward and backward, in one run: `python -m tools.bench.large_kernel`.

Squares, as RepLKNet has them, and stripes, as SLaK has them, of 31, 51 and 61 on maps of 56x56, SLaK-T's first stage;
with --all the kernels of its other stages too. On a CPU in fp32 and CPU time, on a GPU in bf16. Each time is the least
of its rounds. Ratios are to torch's own convolution; errors are the largest of fp32 against float64, relative to the
largest number, of output and both gradients, on one image.
"""

import argparse
import time

import torch

from pipeline.kernels.large_kernel import available, depthwise, seconds

FIRST = [(56, (k, k)) for k in (31, 51, 61)] + [(56, kernel) for k in (31, 51, 61) for kernel in ((k, 5), (5, k))]
OTHERS = [(28, (49, 5)), (28, (5, 49)), (14, (47, 5)), (14, (5, 47)), (7, (13, 5)), (7, (5, 13)), (56, (5, 5))]


def largest_error(channels: int, size: int, kernel: tuple[int, int], form: str, device: torch.device) -> float:
    """Of fp32 against float64, relative; over output and gradients."""
    generator, results = torch.Generator().manual_seed(0), []
    x, gradient = torch.randn(2, 1, channels, size, size, generator=generator).to(device)
    weight = torch.randn(channels, 1, *kernel, generator=generator).to(device)
    for dtype, name in ((torch.float64, "fft"), (torch.float32, form)):  # spectra: torch's own takes minutes on a CPU
        leaves = [tensor.to(dtype).requires_grad_() for tensor in (x, weight)]
        y = depthwise(*leaves, None, name)
        results.append([y, *torch.autograd.grad(y, leaves, gradient.to(dtype))])
    return max(
        ((found.double() - exact).abs().max() / exact.abs().max()).item() for exact, found in zip(*results, strict=True)
    )


def table(
    cases: list[tuple[int, tuple[int, int]]], images: int, channels: int, rounds: int, device: torch.device
) -> None:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} thread"
    print(f"{where}, {str(dtype).removeprefix('torch.')}, {images} x {channels} channels, least of {rounds}")
    print("| map | kernel | form | forward ms | backward ms | forward, x native | backward, x native | error |")
    print("|---|---|---|---|---|---|---|---|")
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    for size, kernel in cases:
        shape = (images, channels, size, size)
        native = seconds(shape, kernel, dtype, device, "native", rounds, clock)
        for form in available(device):
            taken = native if form == "native" else seconds(shape, kernel, dtype, device, form, rounds, clock)
            error = largest_error(min(channels, 8), size, kernel, form, device)
            print(
                f"| {size} | {kernel[0]}x{kernel[1]} | {form} | {taken[0] * 1e3:.1f} | {taken[1] * 1e3:.1f} |"
                f" {taken[0] / native[0]:.3f} | {taken[1] / native[1]:.3f} | {error:.1e} |",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--channels", type=int, default=124, help="SLaK-T's first stage has 124")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--all", action="store_true", help="the kernels of SLaK-T's other stages too")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    cases = FIRST + OTHERS if given.all else FIRST
    for device in [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]:
        table(cases, given.images, given.channels, given.rounds, device)


if __name__ == "__main__":
    main()
