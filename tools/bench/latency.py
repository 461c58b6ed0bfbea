"""Milliseconds of a forward pass of deployed models: `python -m tools.bench.latency [MODEL...]`.

BatchNorm is merged, weights are random, of the sizes that training gives, and outputs are compared: `difference` is a
share of the largest one, `largest`. Batch and resolution are those of Next-ViT's published
latencies: batch 8 (TensorRT, fp16) and 1 (CoreML), at 224 and 384 pixels. onnxruntime and torch run on this machine's
CPU in fp32. TensorRT is measured by its own `trtexec`, CoreML on a Mac; on Linux the CoreML model is only made. What is
absent is said in one line. Each figure is the median of its rounds; with one thread it is CPU time, which other work on
the machine hardly changes.
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
from statistics import median

import onnxruntime
import torch
from torch import Tensor, nn

from pipeline.models import create_model
from tools.weights.export import ONNX_TOLERANCE, merged, relative_difference, trace

MODELS = [f"convnextv2_{size}" for size in ("atto", "nano", "tiny", "base")]
MODELS += ["slak_tiny", "slak_small", "slak_base", "nextvit_small", "nextvit_base", "nextvit_large"]


def milliseconds(work: Callable[[], object], rounds: int, clock: Callable[[], float] = time.perf_counter) -> float:
    """The median of `rounds` after one that counts for nothing."""
    times = []
    for _ in range(rounds + 1):
        began = clock()
        work()
        times.append(1e3 * (clock() - began))
    return median(times[1:])


def onnx_session(path: Path, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def on_tensorrt(path: Path, batch: int, size: int) -> str:
    """Milliseconds as trtexec reports them, in fp16."""
    shape = f"images:{batch}x3x{size}x{size}"
    command = ["trtexec", f"--onnx={path}", "--fp16"]
    command += [f"--{which}Shapes={shape}" for which in ("min", "opt", "max")] + [f"--shapes={shape}"]
    done = subprocess.run(command, capture_output=True, text=True)
    found = re.search(r"GPU Compute Time:.*?median = ([0-9.]+) ms", done.stdout)
    return f"{float(found[1]):.2f}" if found else f"failed: {(done.stderr or done.stdout).strip().splitlines()[-1]}"


def on_coreml(model: nn.Module, images: Tensor, rounds: int) -> str:
    """Milliseconds on a Mac; elsewhere whether the model could be made."""
    import coremltools

    # coremltools knows layer norms and the like as they are, but not GRN's addcmul.
    table = torch._decomp.get_decompositions([torch.ops.aten.addcmul])
    program = torch.export.export(model, (images,)).run_decompositions(table)
    made = coremltools.convert(program, minimum_deployment_target=coremltools.target.iOS16)
    if sys.platform != "darwin":
        return "made"
    (name,) = made.input_description
    return f"{milliseconds(lambda: made.predict({name: images.numpy()}), rounds):.2f}"


@torch.no_grad()
def scattered(name: str, size: int) -> nn.Module:
    """The model in evaluation with outputs of order 1, to which every block adds: before training those of Next-ViT are
    1e-6, SLaK's blocks are scaled by 1e-6, and a comparison would show nothing."""
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
def measure(name: str, batch: int, size: int, rounds: int, threads: int) -> str:
    """A row of the table."""
    plain = scattered(name, size)
    model = merged(plain)
    images = torch.randn(batch, 3, size, size)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        trace(model, path, size, external=True)
        session = onnx_session(path, threads)
        inputs, expected = {"images": images.numpy()}, plain(images)
        clock = time.process_time if threads == 1 else time.perf_counter
        difference = relative_difference(expected, torch.from_numpy(session.run(None, inputs)[0]))
        assert difference <= ONNX_TOLERANCE, difference
        figures = [
            f"{milliseconds(lambda: session.run(None, inputs), rounds, clock):.0f}",
            f"{milliseconds(lambda: model(images), rounds, clock):.0f}",
            on_tensorrt(path, batch, size) if shutil.which("trtexec") else "-",
            on_coreml(model, images, rounds) if find_spec("coremltools") else "-",
        ]
    return f"| {name} | {batch} | {size} | {' | '.join(figures)} | {difference:.1e} | {expected.abs().max():.2g} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="*", default=MODELS, metavar="MODEL")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 384], help="pixels on a side")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    if not shutil.which("trtexec"):
        print("TensorRT is left out: there is no trtexec on the path; run this where TensorRT is installed.")
    if not find_spec("coremltools"):
        print("CoreML is left out: coremltools is not installed; run pip install coremltools, on a Mac to measure.")
    print(f"milliseconds, median of {given.rounds}, {given.threads} thread{'s' * (given.threads > 1)}")
    print("| model | batch | pixels | onnxruntime | torch | TensorRT fp16 | CoreML | difference | largest |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in given.models:
        for size in given.sizes:
            for batch in given.batches:
                print(measure(name, batch, size, given.rounds, given.threads), flush=True)


if __name__ == "__main__":
    main()
