"""`fcmae study`: compare arms of a recipe over several seeds with published values."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from tools.options import Json, Processes, SiteName

app = typer.Typer(
    no_args_is_help=True, help="Compare variants (arms) of a recipe over several seeds with published values."
)

StudyName = Annotated[str, typer.Argument(metavar="STUDY", help="A YAML file, or the name of an included study.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Changes to the recipes of all arms. seeds=[0,1] chooses the seeds, arms.NAME=null leaves an arm out.",
    ),
]


@app.command("list")
def list_studies() -> None:
    """List the included studies."""
    from tools.recipes.library import included_studies
    from tools.study.definition import load_study

    for name, path in included_studies().items():
        study = load_study(path)
        seeds = "1 seed" if len(study.seeds) == 1 else f"{len(study.seeds)} seeds"
        print(f"{name}: {study.about} {len(study.arms)} arms, {seeds}, {study.recipe}")


@app.command("run")
def run_study_here(
    name: StudyName,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="The directory of the study. If it exists, the study continues.")
    ],
    overrides: Overrides = None,
    nproc: Processes = 1,
) -> None:
    """Train all arms with all seeds on this machine, except what is done already. Exit codes: see `fcmae run`."""
    from pipeline.errors import UserError
    from pipeline.stage.outcome import OutcomeKind
    from tools.recipes.library import find_study
    from tools.study.definition import load_study
    from tools.study.runs import run_study

    outcome = run_study(load_study(find_study(name), overrides or []), out, nproc, lambda line: print(line, flush=True))
    if outcome.kind in (OutcomeKind.SAVED, OutcomeKind.BAD_NODE):
        print(f"fcmae: {outcome.reason}; the same command resumes the study", file=sys.stderr)
        raise typer.Exit(outcome.kind.exit_code)
    print_table(out)
    if outcome.kind is not OutcomeKind.DONE:
        raise UserError(outcome.reason)


@app.command("submit")
def submit_study_jobs(
    name: StudyName,
    site: SiteName,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="The directory of the study, on a file system that all nodes share.")
    ],
    overrides: Overrides = None,
) -> None:
    """Queue all arms with all seeds as Slurm jobs, except what is done or queued already."""
    from cluster.site import load_site
    from tools.recipes.library import find_study
    from tools.study.definition import load_study
    from tools.study.runs import submit_study

    profile = load_site(site)
    directory = (Path(profile.run_root or "") / out).resolve()
    submit_study(load_study(find_study(name), overrides or []), directory, profile, print)


@app.command("table")
def print_table(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The directory of the study.")],
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table.")] = False,
    json: Json = False,
) -> None:
    """Print the mean and deviation of each arm over the seeds, beside the published value.

    Arms without a finished run have no result.
    """
    from tools.study.study_table import arm_results, open_study, study_json, study_markdown, study_table
    from tools.tables import wide_console

    study = open_study(directory)
    results = arm_results(study, directory)
    if json:
        print(study_json(study, results))
    elif markdown:
        print(study_markdown(study, results))
    else:
        wide_console(140).print(study_table(study, results))
