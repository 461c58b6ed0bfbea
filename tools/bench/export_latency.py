"""Milliseconds of a forward pass of exported models: `python -m tools.bench.export_latency [MODEL...]`.

BatchNorm is folded into the convolutions. Weights are random, of the sizes that training gives; `difference` is the
largest difference of onnxruntime's output from torch's as a share of the largest output, `largest`. The defaults are
those of Next-ViT's published latencies: batch 8 (TensorRT, fp16) and 1 (CoreML), 224 and 384 pixels. onnxruntime and
torch run on this machine's CPU in fp32. TensorRT is measured by its own `trtexec`; CoreML is measured on a Mac, and on
Linux its model is only converted. Each figure is the median of its rounds; with one thread it is CPU time, which other
work on the machine hardly changes.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import onnxruntime
import torch
from torch import Tensor, nn

from pipeline.models import create_model
from tools.bench.timing import Clock, medians, print_header, print_row
from tools.weights.export import ONNX_TOLERANCE, folded, relative_difference, write_onnx

MODELS = [f"convnextv2_{size}" for size in ("atto", "nano", "tiny", "base")]
MODELS += ["slak_tiny", "slak_small", "slak_base", "nextvit_small", "nextvit_base", "nextvit_large"]


def milliseconds(work: Callable[[], object], rounds: int, clock: Clock) -> float:
    return 1e3 * medians({"work": work}, rounds, clock)["work"]


def onnx_session(path: Path, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def on_tensorrt(path: Path, batch: int, size: int) -> str:
    """The milliseconds that trtexec reports for fp16."""
    shape = f"images:{batch}x3x{size}x{size}"
    command = ["trtexec", f"--onnx={path}", "--fp16"]
    command += [f"--{which}Shapes={shape}" for which in ("min", "opt", "max")] + [f"--shapes={shape}"]
    done = subprocess.run(command, capture_output=True, text=True)
    reported = re.search(r"GPU Compute Time:.*?median = ([0-9.]+) ms", done.stdout)
    if not reported:
        return f"failed: {(done.stderr or done.stdout).strip().splitlines()[-1]}"
    return f"{float(reported[1]):.2f}"


def on_coreml(model: nn.Module, images: Tensor, rounds: int) -> str:
    """Milliseconds on a Mac; elsewhere only convert the model."""
    import coremltools

    # coremltools converts layer norms and the like, but not GRN's addcmul.
    table = torch._decomp.get_decompositions([torch.ops.aten.addcmul])
    program = torch.export.export(model, (images,)).run_decompositions(table)
    made = coremltools.convert(program, minimum_deployment_target=coremltools.target.iOS16)
    if sys.platform != "darwin":
        return "made"
    (name,) = made.input_description
    return f"{milliseconds(lambda: made.predict({name: images.numpy()}), rounds, time.perf_counter):.2f}"


@torch.no_grad()
def scattered(name: str, size: int) -> nn.Module:
    """The model in evaluation mode, with weights that make every block count and outputs of order 1.

    With initial weights a comparison shows nothing: Next-ViT's outputs are 1e-6, and SLaK scales its blocks by 1e-6.
    """
    model = create_model(name)
    generator = torch.Generator().manual_seed(0)
    for path, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if path.endswith(("gamma", "beta")):
            parameter.copy_(0.5 * noise)
        elif path.endswith(".weight") and parameter.ndim > 1:
            parameter.copy_(noise / parameter[0].numel() ** 0.5)
        else:
            parameter.copy_(0.1 * noise + path.endswith(".weight"))
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0  # one forward sets the statistics
    if norms:
        model.train()(torch.randn(2, 3, size, size, generator=generator))
    return model.eval()


@torch.no_grad()
def measure_model(name: str, batch: int, size: int, rounds: int, threads: int) -> list[object]:
    """A row of the table."""
    original = scattered(name, size)
    model = folded(original)
    images = torch.randn(batch, 3, size, size)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        write_onnx(model, path, (size, size), external=True)
        session = onnx_session(path, threads)
        inputs, expected = {"images": images.numpy()}, original(images)
        clock = time.process_time if threads == 1 else time.perf_counter
        difference = relative_difference(expected, torch.from_numpy(session.run(None, inputs)[0]))
        assert difference <= ONNX_TOLERANCE, difference
        figures = [
            f"{milliseconds(lambda: session.run(None, inputs), rounds, clock):.0f}",
            f"{milliseconds(lambda: model(images), rounds, clock):.0f}",
            on_tensorrt(path, batch, size) if shutil.which("trtexec") else "-",
            on_coreml(model, images, rounds) if find_spec("coremltools") else "-",
        ]
    return [name, batch, size, *figures, f"{difference:.1e}", f"{expected.abs().max():.2g}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="*", default=MODELS, metavar="MODEL")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 384], help="pixels on a side")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if not shutil.which("trtexec"):
        print("TensorRT is left out: there is no trtexec on the path; run this where TensorRT is installed.")
    if not find_spec("coremltools"):
        print("CoreML is left out: coremltools is not installed; run pip install coremltools, on a Mac to measure.")
    print(f"milliseconds, median of {options.rounds}, {options.threads} thread{'s' * (options.threads > 1)}")
    columns = ["onnxruntime", "torch", "TensorRT fp16", "CoreML", "difference", "largest"]
    print_header(["model", "batch", "pixels", *columns])
    for name in options.models:
        for size in options.sizes:
            for batch in options.batches:
                print_row(measure_model(name, batch, size, options.rounds, options.threads))


if __name__ == "__main__":
    main()
