"""The commands for weights of any origin: convert, export, evaluate."""

from pathlib import Path
from typing import Annotated, Literal

import typer


def convert(
    source: Annotated[
        str, typer.Argument(metavar="IN", help="Weights: ours, official (dense or sparse), timm or transformers.")
    ],
    destination: Annotated[Path, typer.Argument(metavar="OUT", help="A .safetensors, .pt, .pth or .bin file.")],
    to: Annotated[Literal["official", "timm", "transformers"], typer.Option(help="Names and shapes to write.")],
    head: Annotated[
        Literal["keep", "drop", "map"],
        typer.Option(help="The classifier's head, or the decoder of FCMAE; `map` moves rows by class names."),
    ] = "keep",
    classes: Annotated[
        tuple[Path, Path] | None,
        typer.Option(
            metavar="OLD NEW", help="For `map`: class names by line, as a JSON list, or in a .beton's side-car."
        ),
    ] = None,
    entry: Annotated[str | None, typer.Option(help="The key of a checkpoint to read, such as model_ema.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
) -> None:
    """Rename and reshape weights between layouts, every tensor accounted for."""
    from tools.weights import convert as tool

    print(tool.convert(source, destination, to, head=head, classes=classes, entry=entry, overwrite=overwrite))


def export(
    source: Annotated[str, typer.Argument(metavar="WEIGHTS", help="Weights of any layout that `convert` reads.")],
    destination: Annotated[
        Path, typer.Argument(metavar="OUT", help="A .safetensors or .onnx file; for timm a folder.")
    ],
    kind: Annotated[Literal["safetensors", "onnx", "timm"], typer.Option("--format")] = "safetensors",
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Pixels on a side; by default what the weights' facts say, or 224.")
    ] = None,
    entry: Annotated[str | None, typer.Option(help="The key of a checkpoint to read, such as model_ema.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what exists.")] = False,
) -> None:
    """Write weights for use elsewhere; ONNX is compared with onnxruntime first."""
    from tools.weights import export as tool

    print(tool.export(source, destination, kind, image_size=image_size, entry=entry, overwrite=overwrite))


def evaluate(
    weights: Annotated[
        str, typer.Argument(help="A weights file of any layout that `convert` reads, a run, or a stage's directory.")
    ],
    data: Annotated[str, typer.Option(help="Images, as `fcmae prepare` writes them.")],
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Pixels on a side; by default the stage's, or what the file says, or 224.")
    ] = None,
    crop_pct: Annotated[
        float | None, typer.Option(min=0.1, max=1, help="1 squashes; by default 0.875, from 384 px on 1.")
    ] = None,
    ema: Annotated[
        bool | None, typer.Option("--ema/--raw", help="Where there are both: the moving average, or the weights.")
    ] = None,
    nproc: Annotated[int, typer.Option(min=1, help="Processes on this machine.")] = 1,
    classes: Annotated[
        str | None,
        typer.Option(help="Names of the classifier's classes: by line, a JSON list, or a .beton's side-car."),
    ] = None,
    real: Annotated[
        str | None, typer.Option(help="ImageNet-ReaL's real.json, for the validation images in their order.")
    ] = None,
    knn: Annotated[
        str | None, typer.Option(help="Training images: their 20 nearest vote, and no head is needed.")
    ] = None,
    all_outputs: Annotated[
        bool, typer.Option("--all-outputs", help="Answers among all the classifier's classes, not the data's alone.")
    ] = False,
    benchmark: Annotated[
        Literal["val", "v2", "a", "r", "sketch"] | None,
        typer.Option(help="Which of ImageNet's these images are, to compare; by default val if there are 50,000."),
    ] = None,
    chain: Annotated[
        Literal["in1k", "in22k_in1k"] | None, typer.Option(help="Which published weights to compare with.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images at once.")] = 64,
    bf16: Annotated[bool, typer.Option("--bf16", help="Autocast, instead of fp32.")] = False,
    json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Top-1 and top-5 of weights on prepared images, compared with what was published for such weights."""
    from tools.evaluate.report import compared, to_json
    from tools.evaluate.run import Job, run

    job = Job(
        weights, data, image_size=image_size, crop_pct=crop_pct, ema=ema, classes=classes, real=real, knn=knn,
        all_outputs=all_outputs, batch=batch, bf16=bf16,
    )  # fmt: skip
    result = run(job, nproc)
    verdicts = [] if knn else compared(result, "real" if real else benchmark, chain)
    if json:
        print(to_json(result, verdicts))
        return
    print(result)
    for verdict in verdicts:
        print(verdict)
