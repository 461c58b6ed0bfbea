"""`fcmae recipe`: which recipes there are, what is in one and why, how two differ, whether one is right."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from tools.tables import plain_table, wide_console

if TYPE_CHECKING:
    from pipeline.recipe import ChainRecipe, StageRecipe
    from pipeline.recipe.schema import PublishedResult

app = typer.Typer(no_args_is_help=True, help="Recipes: what is trained, and where each value comes from.")

Name = Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file, or the name of an included recipe.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the recipe.")]
All = Annotated[bool, typer.Option("--all", help="Also what only says how fast or where it runs.")]
FILLED_IN = ("name", "seed", "previous")  # of a stage, from its chain
NAMED = ("data.train", "data.validation", "init.weights")  # operational, but what people look for


@app.command("list")
def list_recipes() -> None:
    """The included recipes, with the results that others have published."""
    from pipeline.recipe import load_recipe
    from tools.recipes.library import included_recipes

    columns = ("recipe", "stages: epochs, pixels", "top-1", "source", "timm's top-1", "top-5")
    table = plain_table(*columns, right=("top-1", "timm's top-1", "top-5"))
    for name, path in included_recipes().items():
        chain = load_recipe(path)
        told = " > ".join(_in_short(stage) for stage in chain.stages.values())
        table.add_row(name, told, *_result(chain.published))
    console = wide_console()
    console.print(table)
    console.print(
        "top-1 is what the paper prints for ImageNet-1K, timm's what it measured with the released weights; no number"
        " here was reached by this program."
    )


@app.command()
def show(
    name: Name,
    overrides: Overrides = None,
    sources: Annotated[bool, typer.Option("--sources", help="Where each value comes from, and why.")] = False,
    everything: All = False,
) -> None:
    """What a recipe says, with all that it inherits."""
    from pipeline.recipe import load_recipe
    from tools.recipes.library import find_recipe

    path, console = find_recipe(name), wide_console()
    chain = load_recipe(path, overrides or [])
    top1, printed, timm, top5 = _result(chain.published)
    if chain.published:
        measured = f"; timm measured {timm} (top-5 {top5 or 'not given'})" if timm else ""
        console.print(f"{chain.name}: published top-1 {top1 or 'none'} ({printed}){measured}")
    if sources:
        _show_sources(console, chain, path, overrides or [], everything)
        return
    stages = {name: dict(_values(stage, everything)) for name, stage in chain.stages.items()}
    table = plain_table("field", *stages)
    for field in dict.fromkeys(field for values in stages.values() for field in values):
        table.add_row(field, *(_told(values[field]) if field in values else "" for values in stages.values()))
    console.print(table)


def _show_sources(console: Console, chain: "ChainRecipe", path: Path, overrides: list[str], everything: bool) -> None:
    from pipeline.recipe.value_sources import value_sources
    from tools.recipes.docs import mentioned, read_conflicts
    from tools.recipes.library import conflicts_beside

    given = value_sources(path, overrides)
    comments = []
    for name, stage in chain.stages.items():
        table = plain_table("field", "value", "source", "line")
        table.title, table.title_justify = f"stage {name}", "left"
        for field, value in _values(stage, everything):
            source = given.get(f"stages.{name}.{field}")
            place = "" if source is None else f"{source.file.name}:{source.line}" if source.file else "command line"
            comment = source.comment if source else "default"
            comments.append(comment)
            table.add_row(field, _told(value), comment, place)
        console.print(table, "")
    beside = conflicts_beside(path)
    known = read_conflicts(beside) if beside else {}
    for key in mentioned(comments):
        if key in known:
            console.print(Text.assemble((f"{key} ", "bold"), known[key].told()))


@app.command()
def diff(
    first: Annotated[str, typer.Argument(metavar="A")],
    second: Annotated[str, typer.Argument(metavar="B")],
    everything: All = False,
) -> None:
    """The values in which two recipes differ."""
    from pipeline.recipe import load_recipe
    from tools.recipes.library import find_recipe

    chains = [load_recipe(find_recipe(name)) for name in (first, second)]
    sides: list[dict[str, Any]] = [
        {f"{name}.{field}": v for name, stage in chain.stages.items() for field, v in _values(stage, everything)}
        for chain in chains
    ]
    only = [chain.stages.keys() - other.stages.keys() for chain, other in (chains, chains[::-1])]
    table = plain_table("field", chains[0].name, chains[1].name)
    for name in (n for chain in chains for n in chain.stages if n in only[0] | only[1]):
        table.add_row(f"stage {name}", *("-" if name in only[1 - side] else "yes" for side in (0, 1)))
    for field in dict.fromkeys([*sides[0], *sides[1]]):
        if field.partition(".")[0] not in only[0] | only[1] and any(field in side for side in sides):
            before, after = (_told(side[field]) if field in side else "-" for side in sides)
            if before != after:
                table.add_row(field, before, after)
    console = wide_console()
    console.print(table if table.rows else "no difference" + ("" if everything else " in what is trained"))


@app.command()
def validate(
    names: Annotated[list[str], typer.Argument(metavar="RECIPE... [KEY=VALUE]...")],
    nproc: Annotated[int | None, typer.Option(min=1, help="Does a global batch divide into so many ranks?")] = None,
) -> None:
    """Whether recipes can be run: their values, and the classes and images of those data files that are here."""
    from cluster.chain import check_data, resolve_paths
    from pipeline.data.beton import sidecar_path
    from pipeline.recipe import load_recipe
    from tools.recipes.library import find_recipe

    overrides = [name for name in names if "=" in name]
    for name in (n for n in names if "=" not in n):
        chain, absent = load_recipe(find_recipe(name), overrides), []
        classes: dict[str, set[str]] = {}
        for stage in chain.stages.values():
            if nproc:
                stage.check_world_size(nproc)
            files = [stage.data.train, stage.data.validation, stage.init.weights]
            missing = [file for file in files if file and not _is_here(file, sidecar_path)]
            absent += missing
            if not missing:
                check_data(resolve_paths(stage), classes)
        told = f"{chain.name} is valid: {', '.join(chain.stages)}"
        if absent:
            told += f"; not here, so looked at when it starts: {', '.join(dict.fromkeys(absent))}"
        print(told)


def _is_here(file: str, sidecar_path: Any) -> bool:
    import os

    path = os.path.expanduser(os.path.expandvars(file))
    return "://" not in path and "$" not in path and (sidecar_path(Path(path)).exists() or Path(path).exists())


@app.command()
def docs() -> None:
    """Markdown of the included recipes: their values by size, their sources and conflicts."""
    from tools.recipes.docs import page

    print(page(), end="")


def _values(stage: "StageRecipe", everything: bool) -> Iterator[tuple[str, Any]]:
    from pipeline.recipe.schema import leaf_fields

    for field, value, is_operational in leaf_fields(stage):
        if field not in FILLED_IN and (everything or not is_operational or field in NAMED):
            yield field, value


def _result(published: "PublishedResult | None") -> tuple[str, str, str, str]:
    """top-1, its source, timm's top-1, timm's top-5: "" where nothing is known."""
    if published is None:
        return "", "", "", ""
    numbers = [f"{v:.{d}f}" if v is not None else "" for v, d in _digits(published)]
    return numbers[0], published.source, numbers[1], numbers[2]


def _digits(published: "PublishedResult") -> list[tuple[float | None, int]]:
    return [(published.top1, 1), (published.timm_top1, 3), (published.timm_top5, 3)]


def _in_short(stage: "StageRecipe") -> str:
    pixels = "" if stage.data.image_size == 224 else f", {stage.data.image_size}"
    if stage.objective.kind == "fcmae":
        return f"FCMAE {stage.schedule.epochs:g}{pixels}"
    what = {1000: "1K", 21841: "22K"}.get(stage.objective.classes, f"{stage.objective.classes} classes")
    return f"{what} {stage.schedule.epochs:g}{pixels}"


def _told(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return "[" + ", ".join(_told(v) for v in value) + "]"
    return "none" if value is None else str(value)
