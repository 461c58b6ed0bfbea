"""Export weights to safetensors, to ONNX, or to a folder that timm loads."""

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from pipeline.errors import CheckpointError, UserError
from pipeline.recipe.channel_statistics import ChannelStatistics
from pipeline.recipe.image_size import ImageSize, describe_size, height_and_width, read_image_size
from pipeline.storage.folder import check_writable
from pipeline.weights.architecture import Architecture, DetectorArchitecture
from pipeline.weights.conversion import ConversionReport, from_internal
from pipeline.weights.foreign import LoadedWeights, load_weights
from pipeline.weights.safetensors_file import FACTS, canonical, safetensors_bytes, write_bytes, write_weights
from tools.predict.image_model import default_crop
from tools.weights.convert import check_destination, output_facts, refuse_unpublished_options
from tools.weights.detector_export import build_detector, part_file, part_names, write_detector
from tools.weights.model import build_model, model_tensors
from tools.weights.onnx_files import (
    ONE_FILE_BYTES,
    ONNX_TOLERANCE,
    describe_input,
    folded,
    relative_difference,
    write_onnx,
)

Format = Literal["safetensors", "onnx", "timm"]


@dataclass(frozen=True)
class Export:
    """The report about reading, the files written, and for ONNX the difference from the model's outputs."""

    report: ConversionReport
    files: tuple[Path, ...]
    max_difference: float | None = None  # relative to the largest output
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [str(self.report), *(f"  {note}" for note in self.notes)]
        if self.max_difference is not None:
            lines.append(f"  largest difference from PyTorch: {self.max_difference:.2e} of the largest output")
        return "\n".join([*lines, *(f"  {path} is ready" for path in self.files)])


def export(
    source: str | os.PathLike,
    destination: Path,
    kind: Format,
    *,
    image_size: ImageSize | None = None,
    entry: str | None = None,
    overwrite: bool = False,
) -> Export:
    """Write weights of any layout as fp32.

    - "safetensors": internal names, and one metadata key `fcmae` with sorted JSON of facts about the weights.
    - "onnx": images (N, C, H, W) -> logits, or without a head the last map (N, C, h, w), for any N and for
      the H and W of `image_size`. BatchNorms and SLaK's small kernels are folded into the convolutions beside them.
      Before it is written, its outputs in onnxruntime are compared with those of the model as it is. Above 1.8 GB, the
      weights are in OUT.data. The metadata say how images are normalised, see `describe_input`. Models for detection
      become two or three files, see detector_export.py.
    - "timm": a folder with model.safetensors and config.json.

    Args:
        image_size: pixels, the edge of a square or (height, width). Default: that in the facts of the weights, or 224.
        entry: see `load_weights`.

    Raises:
        CheckpointError: if a tensor of the source has no place, or the destination cannot be written.
        UserError: if a package is missing, or onnxruntime's outputs differ from the model's.
    """
    loaded = load_weights(source, entry)
    about = output_facts(source, loaded.report.architecture, "official")
    try:
        size = height_and_width(read_image_size(image_size or about.get("image_size") or 224))
    except ValueError as error:
        raise UserError(f"image_size: {error}") from None
    if kind == "safetensors":
        check_destination(destination, (".safetensors",), overwrite)
        write_weights(destination, loaded.tensors, about)
        return Export(loaded.report, (destination,))
    if kind == "onnx":
        refuse_unpublished_options(source)
        architecture = loaded.report.architecture
        parts = part_names(architecture.head) if isinstance(architecture, DetectorArchitecture) else ()
        for path in (destination, *(part_file(destination, part) for part in parts)):
            check_destination(path, (".onnx",), overwrite)
        return _export_onnx(source, loaded, destination, size, about)
    refuse_unpublished_options(source, loaded.report.architecture.unrecorded_options)
    return _export_timm(loaded, destination, size, about, overwrite)


def _export_onnx(
    source: str | os.PathLike,
    loaded: LoadedWeights,
    destination: Path,
    size: tuple[int, int],
    about: Mapping[str, Any],
) -> Export:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 (torch.onnx needs it)
    except ImportError as error:
        raise UserError(
            f"--format onnx needs the package {error.name}, which is not installed; run: pip install 'fcmae[onnx]'"
        ) from error
    report, detects = loaded.report, isinstance(loaded.report.architecture, DetectorArchitecture)
    if detects:
        model = build_detector(loaded, about, str(source))
        stride = model.backbone.stride
    else:
        model = build_model(loaded.tensors, about.get("model"), str(source))
        report = replace(report, dropped=(*report.dropped, *model_tensors(loaded.tensors)[1]))
        stride = model.stride
    if min(size) < stride:
        raise UserError(
            f"image_size is {describe_size(size)} pixels, less than the model's stride of {stride}; give a larger one"
        )
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=destination.parent, prefix=f".{destination.name}.") as folder:
        path = Path(folder) / destination.name  # the final name, because ONNX records it when the weights lie beside
        if detects:
            difference = write_detector(model, size, path, about)
        else:
            bytes_total = 4 * sum(tensor.numel() for tensor in model.state_dict().values())
            write_onnx(folded(model), path, size, external=bytes_total > ONE_FILE_BYTES)
            describe_input(path, model.in_channels, size, about)
            session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
            difference = max(_compare_outputs(model, session, batch, size) for batch in (1, 3))
            del session
        files = sorted(Path(folder).iterdir(), reverse=True)  # OUT.data before OUT
        for file in files:
            os.replace(file, destination.parent / file.name)
    return Export(report, tuple(destination.parent / file.name for file in files), difference)


@torch.no_grad()
def _compare_outputs(model: nn.Module, session: Any, batch: int, size: tuple[int, int]) -> float:
    """The largest difference of outputs, relative to the largest output.

    Raises:
        UserError: if onnxruntime fails, or the difference exceeds ONNX_TOLERANCE.
    """
    images = torch.randn(batch, model.in_channels, *size, generator=torch.Generator().manual_seed(batch))
    expected = model(images)
    try:
        outputs = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
    except Exception as error:  # its classes are not public; the exporter may have fixed the batch size
        raise UserError(
            f"onnxruntime cannot run the exported model at batch {batch} ({' '.join(str(error).split())[:200]}), so "
            "nothing is written; try other versions of torch, onnxscript and onnxruntime"
        ) from error
    difference = relative_difference(expected, outputs)
    if not difference <= ONNX_TOLERANCE:
        raise UserError(
            f"onnxruntime differs from the model by {difference:.2e} of its largest output at batch {batch}, more than "
            f"{ONNX_TOLERANCE:.0e}, so nothing is written; try other versions of torch, onnxscript and onnxruntime"
        )
    return difference


def _export_timm(
    loaded: LoadedWeights, folder: Path, size: tuple[int, int], about: Mapping[str, Any], overwrite: bool
) -> Export:
    if folder.exists() and not (folder.is_dir() and (overwrite or not any(folder.iterdir()))):
        raise CheckpointError(f"{folder} exists already; name another folder, or add --overwrite to write into one")
    check_writable(folder / "config.json")
    report, notes = loaded.report, []
    tensors, dropped = from_internal(loaded.tensors, report.architecture, "timm")
    report = replace(report, dropped=(*report.dropped, *dropped))
    width = report.architecture.dims[-1]
    if report.architecture.family == "convnextv2" and "head.norm.weight" not in tensors:
        tensors |= {"head.norm.weight": torch.ones(width), "head.norm.bias": torch.zeros(width)}
        notes.append("added: head.norm.weight (ones), head.norm.bias (zeros), which timm has after the encoder")
    statistics = ChannelStatistics.of_weights(about, report.architecture.in_channels)
    config = _timm_config(report.architecture, size, statistics)
    written = {name: tensor.float() for name, tensor in tensors.items()}
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / "model.safetensors"
    write_bytes(weights, safetensors_bytes(written, {FACTS: canonical({**about, "layout": "timm"})}))
    write_bytes(folder / "config.json", (json.dumps(config, indent=2) + "\n").encode())
    arguments = "".join(f", {name}={value!r}" for name, value in config["model_args"].items())
    notes.append(
        f"timm.create_model({config['architecture']!r}, num_classes={config['num_classes']}{arguments}, "
        f"checkpoint_path='{weights}'), or timm.create_model('local-dir:{folder}', pretrained=True)"
    )
    return Export(report, (weights, folder / "config.json"), notes=tuple(notes))


def _timm_config(architecture: Architecture, size: tuple[int, int], statistics: ChannelStatistics) -> dict[str, Any]:
    """The config.json for timm. Unpublished shapes are described as arguments of its tiny model."""
    options: dict[str, Any] = {}
    if architecture.variant is None:
        options |= {"depths": list(architecture.depths), "dims": list(architecture.dims)}
    if architecture.in_channels != 3:
        options["in_chans"] = architecture.in_channels
    return {
        "architecture": architecture.variant or ("convnext_tiny" if architecture.v1 else "convnextv2_tiny"),
        "num_classes": architecture.classes,
        "num_features": architecture.dims[-1],
        "model_args": options,
        "pretrained_cfg": {
            "num_classes": architecture.classes,
            "input_size": [architecture.in_channels, *size],
            "mean": list(statistics.mean),
            "std": list(statistics.std),
            "interpolation": "bicubic",
            "crop_pct": default_crop(size),
            "crop_mode": "center" if default_crop(size) < 1 else "squash",
            "first_conv": "stem.0.conv" if architecture.family == "nextvit" else "stem.0",
            "classifier": "head.fc",
        },
    }
