"""`fcmae evaluate`: accuracy of weights on prepared images."""

from typing import Annotated, Literal

import typer

from tools.options import Json, Processes


def evaluate_weights(
    weights: Annotated[
        str,
        typer.Argument(
            metavar="WEIGHTS", help="A weights file of any layout that `fcmae convert` reads, a stage or a run."
        ),
    ],
    data: Annotated[str, typer.Option(metavar="FILE", help="The images: a .beton file of `fcmae prepare`.")],
    image_size: Annotated[
        int | None,
        typer.Option(min=1, metavar="PIXELS", help="Side of the input images. Default: the stage's or file's, or 224."),
    ] = None,
    crop_pct: Annotated[
        float | None,
        typer.Option(
            min=0.1,
            max=1,
            help="Side of the centre crop as a fraction of the resized image; 1 squashes the whole image to a square."
            " Default: the stage's; else 0.875, or 1 from 384 pixels on.",
        ),
    ] = None,
    ema: Annotated[
        bool | None,
        typer.Option("--ema/--raw", help="Where there are both: the moving average, or the raw weights."),
    ] = None,
    nproc: Processes = 1,
    classes: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Class names of the classifier's outputs: one a line, a JSON list, or a .beton file. Needed only where"
            " the weights do not name them.",
        ),
    ] = None,
    real: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="ImageNet-ReaL's real.json: count its answers. Needs all validation images in order."
        ),
    ] = None,
    knn: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="A .beton file of training images: the 20 nearest in feature space vote, so no head is needed.",
        ),
    ] = None,
    all_outputs: Annotated[
        bool,
        typer.Option(
            "--all-outputs", help="Let the classifier answer any of its classes, also those that the data lacks."
        ),
    ] = False,
    benchmark: Annotated[
        Literal["val", "v2", "a", "r", "sketch"] | None,
        typer.Option(help="Which ImageNet test set FILE is, to compare with. Default: val for 50,000 images."),
    ] = None,
    chain: Annotated[
        Literal["in1k", "in22k_in1k"] | None,
        typer.Option(help="Compare with published weights of this training only: in1k, or ImageNet-22K first."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images in a batch of each process.")] = 64,
    bf16: Annotated[bool, typer.Option("--bf16", help="Compute in bfloat16 (autocast) instead of fp32.")] = False,
    json: Json = False,
) -> None:
    """Measure top-1 and top-5 accuracy of weights, and compare with the published accuracy of such weights."""
    from tools.evaluate.published import compare_with_published, result_json
    from tools.evaluate.run_evaluation import EvaluationRequest, run_evaluation

    request = EvaluationRequest(
        weights, data, image_size=image_size, crop_pct=crop_pct, ema=ema, classes=classes, real=real, knn=knn,
        all_outputs=all_outputs, batch=batch, bf16=bf16,
    )  # fmt: skip
    result = run_evaluation(request, nproc)
    comparisons = [] if knn else compare_with_published(result, "real" if real else benchmark, chain)
    if json:
        print(result_json(result, comparisons))
        return
    print(result)
    for comparison in comparisons:
        print(comparison)
