"""Time and error of every form of large depthwise convolutions: `python -m tools.bench.large_kernel_forms`.

Squares as in RepLKNet, and stripes as in SLaK, of 31, 51 and 61 on maps of 56x56, SLaK-T's first stage; with --all the
kernels of its other stages too. Forward and backward, on a CPU in fp32 and CPU time, on a GPU in bf16. Each time is the
least of its rounds; ratios are to torch's own convolution. The error is the largest of fp32 against float64, relative
to the largest number, of the output and both gradients on one image.
"""

import argparse

import torch

from pipeline.kernels.large_kernel import available_forms, convolve_depthwise
from pipeline.kernels.large_kernel_timing import Case, time_form
from tools.bench.timing import print_header, print_row, quiet_clock

FIRST = [(56, (k, k)) for k in (31, 51, 61)] + [(56, kernel) for k in (31, 51, 61) for kernel in ((k, 5), (5, k))]
OTHERS = [(28, (49, 5)), (28, (5, 49)), (14, (47, 5)), (14, (5, 47)), (7, (13, 5)), (7, (5, 13)), (56, (5, 5))]


def largest_error(channels: int, size: int, kernel: tuple[int, int], form: str, device: torch.device) -> float:
    """The error of fp32 against float64, relative to the largest number, over output and gradients."""
    generator, results = torch.Generator().manual_seed(0), []
    x, gradient = torch.randn(2, 1, channels, size, size, generator=generator).to(device)
    weight = torch.randn(channels, 1, *kernel, generator=generator).to(device)
    for dtype, name in ((torch.float64, "fft"), (torch.float32, form)):  # spectra: torch's own takes minutes on a CPU
        leaves = [tensor.to(dtype).requires_grad_() for tensor in (x, weight)]
        y = convolve_depthwise(*leaves, None, name)
        results.append([y, *torch.autograd.grad(y, leaves, gradient.to(dtype))])
    return max(
        ((single.double() - exact).abs().max() / exact.abs().max()).item()
        for exact, single in zip(*results, strict=True)
    )


def measure_forms(
    cases: list[tuple[int, tuple[int, int]]], images: int, channels: int, rounds: int, device: torch.device
) -> None:
    """Print a row for each map, kernel and form."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} thread"
    print(f"{where}, {str(dtype).removeprefix('torch.')}, {images} x {channels} channels, least of {rounds}")
    columns = ["forward ms", "backward ms", "forward, x native", "backward, x native", "error"]
    print_header(["map", "kernel", "form", *columns])
    for size, kernel in cases:
        case, native = Case((images, channels, size, size), kernel, dtype, device), None
        for form in sorted(available_forms(device), key=lambda form: form != "native"):
            taken = time_form(case, form, rounds, quiet_clock(device))
            native = native or taken
            error = largest_error(min(channels, 8), size, kernel, form, device)
            times = [f"{1e3 * value:.1f}" for value in taken]
            ratios = [f"{value / base:.3f}" for value, base in zip(taken, native, strict=True)]
            print_row([size, f"{kernel[0]}x{kernel[1]}", form, *times, *ratios, f"{error:.1e}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--channels", type=int, default=124, help="SLaK-T's first stage has 124")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--all", action="store_true", help="the kernels of SLaK-T's other stages too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    cases = FIRST + OTHERS if options.all else FIRST
    for device in [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]:
        measure_forms(cases, options.images, options.channels, options.rounds, device)


if __name__ == "__main__":
    main()
