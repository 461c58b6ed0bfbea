"""`fcmae study`: arms of a recipe compared, over seeds, with what others published."""

import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Studies: a recipe's arms over seeds, beside published values.")

Name = Annotated[str, typer.Argument(metavar="STUDY", help="A YAML file, or the name of an included study.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Changes to all arms' recipes; seeds=[0,1] or arms.NAME=null."),
]


@app.command("list")
def list_studies() -> None:
    """The included studies."""
    from tools.recipes.library import included_studies
    from tools.study.definition import load_study

    for name, path in included_studies().items():
        study = load_study(path)
        seeds = "1 seed" if len(study.seeds) == 1 else f"{len(study.seeds)} seeds"
        print(f"{name}: {study.about} {len(study.arms)} arms, {seeds}, {study.recipe}")


@app.command()
def run(
    name: Name,
    out: Annotated[Path, typer.Option(help="The study's directory: made, or continued.")],
    overrides: Overrides = None,
    nproc: Annotated[int, typer.Option(min=1, help="Processes on this machine.")] = 1,
) -> None:
    """Run all arms with all seeds on this machine, or what is missing of them. Exit codes: as `fcmae run`."""
    from pipeline.errors import UserError
    from pipeline.stage.outcome import OutcomeKind
    from tools.recipes.library import find_study
    from tools.study.definition import load_study
    from tools.study.runs import run_study

    outcome = run_study(load_study(find_study(name), overrides or []), out, nproc, lambda said: print(said, flush=True))
    if outcome.kind in (OutcomeKind.SAVED, OutcomeKind.BAD_NODE):
        print(f"fcmae: {outcome.reason}; the same command goes on", file=sys.stderr)
        raise typer.Exit(outcome.kind.exit_code)
    table(out)
    if outcome.kind is not OutcomeKind.DONE:
        raise UserError(outcome.reason)


@app.command()
def submit(
    name: Name,
    site: Annotated[str, typer.Option(help="A YAML file that describes the cluster, or an included example.")],
    out: Annotated[Path, typer.Option(help="The study's directory, on a file system that all nodes share.")],
    overrides: Overrides = None,
) -> None:
    """Queue all arms with all seeds as Slurm jobs, or what is missing of them."""
    from cluster.site import load_site
    from tools.recipes.library import find_study
    from tools.study.definition import load_study
    from tools.study.runs import submit_study

    profile = load_site(site)
    directory = (Path(profile.run_root or "") / out).resolve()
    submit_study(load_study(find_study(name), overrides or []), directory, profile, print)


@app.command()
def table(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The study's directory.")],
    markdown: Annotated[bool, typer.Option("--markdown", help="For a page.")] = False,
    json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Mean and deviation over the seeds, beside the published value. Arms that are not done are empty."""
    from tools.study import table as view
    from tools.tables import wide_console

    study = view.open_study(directory)
    found = view.rows(study, directory)
    if json:
        print(view.to_json(study, found))
    elif markdown:
        print(view.markdown(study, found))
    else:
        wide_console(140).print(view.render(study, found))
