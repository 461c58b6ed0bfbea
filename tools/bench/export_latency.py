"""Milliseconds of a forward pass of exported models: `python -m tools.bench.export_latency [MODEL...]`.

A MODEL is one of ours or `timm:NAME`, with options as for `fcmae analyze` ('nextvit_small norm=layer label=LayerNorm'),
or `study:NAME` for all arms of a study. All models of a run take turns, so their ratios hold on a busy machine.

BatchNorm of our models is folded into the convolutions; onnxruntime folds timm's. Weights are random, of the sizes that
training gives; `difference` is the largest difference of onnxruntime's output from torch's as a share of the largest
output, `rounding` that of torch's in fp32 from float64, which some random networks enlarge. The defaults are those of
Next-ViT's published latencies: batch 8 (TensorRT, fp16) and 1 (CoreML), 224 and 384 pixels. onnxruntime and torch run
on this machine's CPU in fp32. TensorRT is measured by its own `trtexec`; CoreML is measured on a Mac, and on Linux its
model is only converted. Each figure is the median of its rounds; with one thread it is CPU time, which other work on
the machine hardly changes. Published figures: recipes/nextvit/latencies.yaml.
"""

import argparse
import copy
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pipeline.errors import UserError, first_line
from pipeline.models import create_model
from pipeline.storage.bounded_files import read_yaml
from tools.analyze.analyzed_model import open_model
from tools.bench.timing import Clock, medians, print_header, print_row
from tools.recipes.library import find_study, included_recipes
from tools.study.definition import load_study
from tools.weights.onnx_files import ONNX_TOLERANCE, folded, relative_difference, write_onnx

MODELS = [f"convnextv2_{size}" for size in ("atto", "nano", "tiny", "base")]
MODELS += ["slak_tiny", "slak_small", "slak_base", "nextvit_small", "nextvit_base", "nextvit_large"]
TIMM_MODELS = ("resnet50", "resnet101", "convnext_tiny", "swin_tiny_patch4_window7_224", "efficientformer_l3")
TIMM_MODELS += ("efficientformer_l7", "twins_svt_small", "poolformer_s36")
MODELS += [f"timm:{name}" for name in TIMM_MODELS]

MOST_DIFFERENCE = 1e-2  # of outputs, as a share of the largest one


@dataclass(frozen=True)
class Candidate:
    """A model to measure: its name, and how to make it for images of a number of pixels."""

    name: str
    create: Callable[[int], nn.Module]


def named_models(words: str) -> Iterator[Candidate]:
    """The models that an argument names."""
    kind, _, name = words.partition(":")
    if kind != "study":
        yield Candidate(words, lambda size: _unfused(open_model(words, size).network))
        return
    study = load_study(find_study(name))
    for arm in study.arms:
        *_, stage = study.chain(arm, 0).stages.values()
        model = stage.model
        yield Candidate(arm, lambda size, model=model: create_model(model.name, **model.options))


def _unfused(model: nn.Module) -> nn.Module:
    """Let timm's attention be matrix products: its fused form in windows has five dimensions, ONNX's has four."""
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    return model


def published_latencies() -> dict[tuple[str, int], dict[str, Any]]:
    """The published figures of a model and a number of pixels."""
    path = included_recipes()["nextvit/small"].with_name("latencies.yaml")
    return {(entry["model"], entry["image_size"]): entry for entry in read_yaml(path)["latencies"]}


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
    predict = {"work": lambda: made.predict({name: images.numpy()})}
    return f"{1e3 * medians(predict, rounds, time.perf_counter)['work']:.2f}"


@torch.no_grad()
def scattered(model: nn.Module, images: Tensor) -> nn.Module:
    """The model in evaluation mode, with weights that make every block count and outputs of order 1.

    With initial weights a comparison shows nothing: Next-ViT's outputs are 1e-6, and SLaK scales its blocks by 1e-6.
    BatchNorms have the statistics of `images` (N, 3, H, W); for other images the outputs of some models explode.
    """
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
        model.train()(images)
    return model.eval()


class ExportedModel:
    """A model on disk, in onnxruntime and in torch, checked against each other, with what its row says of it."""

    @torch.no_grad()
    def __init__(self, candidate: Candidate, size: int, threads: int, folder: Path):
        self.name, self.size, self.path = candidate.name, size, folder / "model.onnx"
        images = torch.randn(2, 3, size, size)
        original = scattered(candidate.create(size), images)
        self.model = folded(original)
        write_onnx(self.model, self.path, (size, size), external=True)
        self.session = onnx_session(self.path, threads)
        expected = original(images)
        with FlopCounterMode(display=False) as counter:  # on meta, because it does not know the CPU's attention
            copy.deepcopy(original).to("meta")(images[:1].to("meta"))
        self.difference = relative_difference(expected, self.run_onnx(images))
        # Some random networks enlarge rounding: torch in fp32 is then as far from float64 as onnxruntime is.
        self.rounding = relative_difference(copy.deepcopy(original).double()(images.double()).float(), expected)
        self.check_difference()
        self.multiply_adds = counter.get_total_flops() / 2e9
        self.parameters = sum(parameter.numel() for parameter in original.parameters()) / 1e6

    def check_difference(self) -> None:
        """Raise UserError if onnxruntime differs from torch by more than rounding may make of it, or by a hundredth."""
        allowed = min(max(ONNX_TOLERANCE, 100 * self.rounding), MOST_DIFFERENCE)
        if not self.difference <= allowed:
            raise UserError(
                f"{self.name} in onnxruntime differs from torch by {self.difference:.1e} of the largest output, and at"
                f" most {allowed:.1e} is rounding; do not use its time"
            )

    def run_onnx(self, images: Tensor) -> Tensor:
        return torch.from_numpy(self.session.run(None, {"images": images.numpy()})[0])

    def row(self, batch: int, times: dict[str, float], first: dict[str, float], rounds: int) -> list[object]:
        """The row of a batch size: times in seconds by `onnxruntime` and `torch`, and those of the first model."""
        images = torch.randn(batch, 3, self.size, self.size)
        known = published_latencies().get((self.name, self.size), {})
        return [
            self.name, f"{self.parameters:.1f}", f"{self.multiply_adds:.2f}", batch, self.size,
            *(f"{1e3 * times[way]:.0f}" for way in ("onnxruntime", "torch")),
            f"{times['onnxruntime'] / first['onnxruntime']:.2f}",
            on_tensorrt(self.path, batch, self.size) if shutil.which("trtexec") else "-",
            on_coreml(self.model, images, rounds) if find_spec("coremltools") else "-",
            *(known.get(name) or "" for name in ("top1", "tensorrt", "coreml")), f"{self.difference:.1e}",
            f"{self.rounding:.1e}",
        ]  # fmt: skip


COLUMNS = ["model", "M parameters", "GMACs", "batch", "pixels", "onnxruntime", "torch", "x the first", "TensorRT fp16"]
COLUMNS += ["CoreML", "published top-1", "TensorRT, batch 8", "CoreML, batch 1", "difference", "rounding"]


@torch.no_grad()
def measure(models: list[ExportedModel], batch: int, rounds: int, clock: Clock) -> None:
    """Let the models take turns, then print their rows."""
    works: dict[str, Callable[[], object]] = {}
    for model in models:
        images = torch.randn(batch, 3, model.size, model.size)
        works[f"{model.name}, onnxruntime"] = lambda model=model, images=images: model.run_onnx(images)
        works[f"{model.name}, torch"] = lambda model=model, images=images: model.model(images)
    seconds = medians(works, rounds, clock)
    times = [{way: seconds[f"{model.name}, {way}"] for way in ("onnxruntime", "torch")} for model in models]
    for model, own in zip(models, times, strict=True):
        print_row(model.row(batch, own, times[0], rounds))


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
    print_header(COLUMNS)
    clock = time.process_time if options.threads == 1 else time.perf_counter
    chosen = [candidate for words in options.models for candidate in named_models(words)]
    for size in options.sizes:
        with tempfile.TemporaryDirectory() as folder:
            models = []
            for number, candidate in enumerate(chosen):
                place = Path(folder, str(number))
                place.mkdir()
                try:
                    models.append(ExportedModel(candidate, size, options.threads, place))
                except Exception as error:  # one model that cannot be exported must not cost the others
                    if number == 0:
                        sys.exit(
                            f"{candidate.name} cannot be exported ({first_line(error)}), but all times are compared"
                            " with those of the first model; name another one first"
                        )
                    print(f"{candidate.name} is left out: {first_line(error)}", file=sys.stderr)
            for batch in options.batches:
                measure(models, batch, options.rounds, clock)


if __name__ == "__main__":
    main()
