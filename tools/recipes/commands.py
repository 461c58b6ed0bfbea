"""`fcmae recipe`: list recipes, show their values and sources, compare two, check them."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from tools.options import Overrides, RecipeName
from tools.tables import plain_table, wide_console

if TYPE_CHECKING:
    from pipeline.recipe import ChainRecipe, StageRecipe

app = typer.Typer(no_args_is_help=True, help="Show, compare and check recipes.")

ShowAll = Annotated[
    bool, typer.Option("--all", help="Include values that only affect speed or place, such as batch.micro_slots.")
]
SET_BY_CHAIN = ("name", "seed", "previous")
ALWAYS_SHOWN = ("data.train", "data.validation", "init.weights")  # operational values that readers look for


@app.command("list")
def list_recipes() -> None:
    """List the included recipes and their published results."""
    from pipeline.recipe import load_recipe
    from tools.recipes.docs import average_precision_cells, mean_iou_cells, published_cells
    from tools.recipes.library import included_recipes

    columns = ("recipe", "stages: epochs, pixels", "top-1", "source", "timm's top-1", "top-5")
    table = plain_table(*columns, right=("top-1", "timm's top-1", "top-5"))
    columns = ("recipe", "segmentation", "mIoU", "several scales", "source")
    segmentation = plain_table(*columns, right=("mIoU", "several scales"))
    detection = plain_table("recipe", "detection", "box AP", "mask AP", "source", right=("box AP", "mask AP"))
    for name, path in included_recipes().items():
        chain = load_recipe(path)
        stages = " > ".join(_summary(stage) for stage in chain.stages.values())
        match [*chain.stages.values()][-1].objective.kind:
            case "segmentation":
                segmentation.add_row(name, stages, *mean_iou_cells(chain.published))
            case "detection":
                detection.add_row(name, stages, *average_precision_cells(chain.published))
            case _:
                table.add_row(name, stages, *published_cells(chain.published))
    wide_console().print(
        table,
        "",
        segmentation,
        "",
        detection,
        "",
        "top-1 is the paper's on ImageNet-1K, timm's was measured by timm with the released weights; mIoU is that of"
        " ADE20K's validation images, AP that of COCO's. This program has reached none of these numbers.",
        sep="\n",
    )


@app.command("show")
def show_recipe(
    name: RecipeName,
    overrides: Overrides = None,
    sources: Annotated[bool, typer.Option("--sources",
        help="Show the source of each value: paper, code, file and line.")] = False,
    everything: ShowAll = False,
) -> None:  # fmt: skip
    """Show all values of a recipe, inherited ones included."""
    from pipeline.recipe import load_recipe
    from tools.recipes.docs import published_text
    from tools.recipes.library import find_recipe

    path, console = find_recipe(name), wide_console()
    chain = load_recipe(path, overrides or [])
    if chain.published:
        console.print(f"{chain.name}: published {published_text(chain.published)}")
    if sources:
        _show_sources(console, chain, path, overrides or [], everything)
        return
    stages = {name: dict(_values(stage, everything)) for name, stage in chain.stages.items()}
    table = plain_table("field", *stages)
    for field in dict.fromkeys(field for values in stages.values() for field in values):
        table.add_row(field, *(values.get(field, "") for values in stages.values()))
    console.print(table)


def _show_sources(console: Console, chain: "ChainRecipe", path: Path, overrides: list[str], everything: bool) -> None:
    from pipeline.recipe.value_sources import value_sources
    from tools.recipes.docs import mentioned, read_conflicts
    from tools.recipes.library import conflicts_file

    sources, comments = value_sources(path, overrides), []
    for name, stage in chain.stages.items():
        table = plain_table("field", "value", "source", "line", title=f"stage {name}", title_justify="left")
        for field, value in _values(stage, everything):
            source = sources.get(f"stages.{name}.{field}")
            line = "" if source is None else f"{source.file.name}:{source.line}" if source.file else "command line"
            comments.append(source.comment if source else "default")
            table.add_row(field, value, comments[-1], line)
        console.print(table, "")
    file = conflicts_file(path)
    conflicts = read_conflicts(file) if file else {}
    for key in mentioned(comments):
        if key in conflicts:
            console.print(Text.assemble((f"{key} ", "bold"), str(conflicts[key])))


@app.command("diff")
def diff_recipes(
    first: Annotated[str, typer.Argument(metavar="A", help="A recipe, as for `fcmae recipe show`.")],
    second: Annotated[str, typer.Argument(metavar="B", help="Another recipe.")],
    everything: ShowAll = False,
) -> None:
    """Show the values in which two recipes differ."""
    from pipeline.recipe import load_recipe
    from tools.recipes.library import find_recipe

    chains = [load_recipe(find_recipe(name)) for name in (first, second)]
    sides = [
        {
            f"{name}.{field}": value
            for name, stage in chain.stages.items()
            for field, value in _values(stage, everything)
        }
        for chain in chains
    ]
    unshared = chains[0].stages.keys() ^ chains[1].stages.keys()
    table = plain_table("field", chains[0].name, chains[1].name)
    for name in (name for chain in chains for name in chain.stages if name in unshared):
        table.add_row(f"stage {name}", *("yes" if name in chain.stages else "-" for chain in chains))
    for field in dict.fromkeys([*sides[0], *sides[1]]):
        before, after = (side.get(field, "-") for side in sides)
        if before != after and field.partition(".")[0] not in unshared:
            table.add_row(field, before, after)
    scope = "" if everything else " in values that affect the result"
    wide_console().print(table if table.rows else f"no difference{scope}")


@app.command("validate")
def validate_recipes(
    names: Annotated[list[str], typer.Argument(metavar="RECIPE... [KEY=VALUE]...",
        help="Recipes, and changes that apply to all of them.")],
    nproc: Annotated[int | None, typer.Option(min=1,
        help="Check that the global batch can be divided among this many ranks.")] = None,
) -> None:  # fmt: skip
    """Check that recipes can be run: their values, and the data files that are on this machine."""
    from cluster.chain import check_data, check_handoffs, resolve_paths
    from pipeline.recipe import load_recipe
    from pipeline.training.handoff import check_weights_file
    from tools.recipes.library import find_recipe

    overrides = [name for name in names if "=" in name]
    for name in (n for n in names if "=" not in n):
        chain, absent = load_recipe(find_recipe(name), overrides), []
        classes: dict[str, set[str]] = {}
        for stage in chain.stages.values():
            if nproc:
                stage.check_world_size(nproc)
            files = filter(None, (stage.data.train, stage.data.validation, stage.init.weights))
            missing = [file for file in files if not _is_on_disk(file) or _is_folder_of_images(stage, file)]
            absent += missing
            if not missing:
                resolved = resolve_paths(stage)
                check_data(resolved, classes)
                if resolved.init.weights:
                    check_weights_file(resolved, resolved.init.weights)
        check_handoffs(chain.stages)
        unchecked = f"; not here, so checked when the run starts: {', '.join(dict.fromkeys(absent))}" if absent else ""
        ranks = ", ".join(f"{name} {_fitting_ranks(stage)}" for name, stage in chain.stages.items())
        print(f"{chain.name} is valid: {', '.join(chain.stages)}{unchecked}; most ranks: {ranks}")


def _fitting_ranks(stage: "StageRecipe") -> str:
    """The largest number of ranks; of a stage with norm groups all numbers, with the micro-batch that each needs."""
    from pipeline.recipe.stage_sections import divisors

    if not stage.norm_group_images:
        return f"{stage.world_sizes()[-1]:,}"
    fitting = {ranks: stage.micro_slots_on(ranks) for ranks in divisors(stage.batch.global_batch)}
    return " or ".join(f"{n:,} (micro_slots {', '.join(map(str, m))})" for n, m in fitting.items() if m)


def _is_on_disk(file: str) -> bool:
    from pipeline.data.beton import sidecar_path

    path = os.path.expanduser(os.path.expandvars(file))
    return "://" not in path and "$" not in path and (sidecar_path(Path(path)).exists() or Path(path).exists())


def _is_folder_of_images(stage: "StageRecipe", file: str) -> bool:
    """Whether data are prepared when the run starts."""
    from tools.prepare.prepared_cache import is_source

    return file != stage.init.weights and is_source(os.path.expanduser(os.path.expandvars(file)))


@app.command("docs")
def print_docs() -> None:
    """Print the included recipes as a Markdown page: values by model size, sources, conflicts between sources."""
    from tools.recipes.docs import recipes_page

    print(recipes_page(), end="")


def _values(stage: "StageRecipe", everything: bool) -> Iterator[tuple[str, str]]:
    from pipeline.recipe.fields import leaf_fields
    from tools.recipes.docs import value_text

    for field, value, is_operational in leaf_fields(stage):
        if field not in SET_BY_CHAIN and (everything or not is_operational or field in ALWAYS_SHOWN):
            yield field, value_text(value)


def _summary(stage: "StageRecipe") -> str:
    """A stage in a few characters, such as "FCMAE 1600" or "1K 30, 512"."""
    from pipeline.errors import counted
    from pipeline.recipe.image_size import describe_size

    task, classes = "FCMAE", getattr(stage.objective, "classes", 0)
    named = counted(classes, "class", "classes")
    if stage.objective.kind == "segmentation":
        task = {"upernet": "UperNet", "semantic_fpn": "Semantic FPN"}[stage.objective.head]
        task = f"{task}, {named},"
    elif stage.objective.kind == "detection":
        heads = {"mask_rcnn": "Mask R-CNN", "cascade": "Cascade Mask R-CNN", "faster_rcnn": "Faster R-CNN"}
        task = f"{heads[stage.objective.head]}, {named},"
    elif stage.objective.kind != "fcmae":
        task = {1000: "1K", 21841: "22K"}.get(classes, named)
    pixels = "" if stage.data.image_size == 224 else f", {describe_size(stage.data.image_size)}"
    length = f"{stage.schedule.steps:,} steps" if stage.schedule.steps else f"{stage.schedule.epochs:g}"
    return f"{task} {length}{pixels}"
