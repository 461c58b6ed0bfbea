"""The peak rates of known GPUs, by which a measured step is judged.

Dense matrix products without sparsity, in TFLOP/s; a multiply-add is two operations. fp32 is the rate outside of the
matrix units, because torch uses TF32 only where it is asked for. Sources: NVIDIA's data sheets of A100 (2022), A40,
L4, L40S, H100 (2024), H200 (2024) and HGX B200 (2025), whose figures "with sparsity" are halved here.
"""

from typing import NamedTuple


class PeakRates(NamedTuple):
    """The peak of a GPU in dense matrix products, 10^12 floating-point operations a second, by the numbers' type."""

    bf16: float
    fp32: float


# By a part of the name that torch.cuda.get_device_name gives. The first that fits counts.
PEAKS = {
    "B200": PeakRates(2250, 75),
    "H200 NVL": PeakRates(835, 60),
    "GH200": PeakRates(989, 67),
    "H200": PeakRates(989, 67),
    "H100 PCIe": PeakRates(756, 51),
    "H100 NVL": PeakRates(835, 60),
    "H100": PeakRates(989, 67),
    "A100": PeakRates(312, 19.5),
    "L40S": PeakRates(362, 91.6),
    "A40": PeakRates(149.7, 37.4),
    "L4": PeakRates(121, 30.3),
}


def peak_rates(gpu: str) -> PeakRates | None:
    """The rates of a GPU by its name; None if it is not known, or a part of a GPU."""
    words = f" {gpu.replace('-', ' ')} "
    if " MIG " in words:
        return None
    return next((rates for name, rates in PEAKS.items() if f" {name} " in words), None)


def peak_flops(gpu: str, precision: str) -> float | None:
    """FLOP/s that a recipe's `engine.precision` reaches at most on a GPU; None if that is not known."""
    rates = peak_rates(gpu)
    tflops = rates and {"bf16": rates.bf16, "bf16_parameters": rates.bf16, "fp32": rates.fp32}.get(precision)
    return tflops * 1e12 if tflops else None
