"""`fcmae study`: compare arms of a recipe over several seeds with published values."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tools.options import Json, Processes, Rehearsal, SiteName
from tools.tables import wide_console

if TYPE_CHECKING:
    from pipeline.recipe import ChainRecipe
    from tools.study.definition import Study, StudyRun

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


StudyDirectory = Annotated[Path, typer.Argument(metavar="DIR", help="The directory of the study.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check all, say what would be trained, and write nothing.")]


@app.command("list")
def list_studies() -> None:
    """List the included studies."""
    from pipeline.errors import counted
    from tools.recipes.library import included_studies
    from tools.study.definition import load_study

    for name, path in included_studies().items():
        study = load_study(path)
        arms, seeds = counted(len(study.arms), "arm"), counted(len(study.seeds), "seed")
        print(f"{name}: {study.about} {arms}, {seeds}, {study.recipe}")


@app.command("show")
def show_study(name: StudyName, overrides: Overrides = None, json: Json = False) -> None:
    """Show what a study will train: its arms, what each changes, published values, runs, and shared stages."""
    from tools.recipes.library import find_study
    from tools.study.definition import load_study
    from tools.study.plan import StudyPlan, plan_json, plan_table

    plan = StudyPlan.of(load_study(find_study(name), overrides or []))
    if json:
        print(plan_json(plan))
    else:
        wide_console(180).print(plan_table(plan))


@app.command("estimate")
def estimate_whole_study(
    name: StudyName,
    site: SiteName,
    overrides: Overrides = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="Number of nodes. Default: what the site says.")] = None,
    price: Annotated[float | None, typer.Option(min=0, help="Price of one hour of one GPU, to get the cost.")] = None,
    images: Annotated[
        list[str] | None, typer.Option(metavar="[FILE=]N", help="Number of images in a data file, as in estimate.")
    ] = None,
    json: Json = False,
) -> None:
    """Predict hours and cost of a whole study on a cluster. Stages that several runs share are counted once."""
    from cluster.site import load_site
    from tools.recipes.library import find_study
    from tools.study.definition import load_study
    from tools.study.plan import StudyPlan
    from tools.study.study_estimate import estimate_study, study_cost_json, study_cost_table

    plan = StudyPlan.of(load_study(find_study(name), overrides or []))
    cost = estimate_study(plan, load_site(site), nodes=nodes, images=images or ())
    if json:
        print(study_cost_json(cost, price))
    else:
        wide_console(180).print(study_cost_table(cost, price))


@app.command("run")
def run_study_here(
    name: StudyName,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="The directory of the study. If it exists, the study continues.")
    ],
    overrides: Overrides = None,
    nproc: Processes = 1,
    dry_run: DryRun = False,
) -> None:
    """Train all arms with all seeds on this machine, except what is done already. Exit codes: see `fcmae run`.

    Equal stages are trained once, and the same command on several machines divides the runs among them.
    """
    from pipeline.errors import UserError
    from pipeline.stage.outcome import OutcomeKind
    from tools.recipes.library import find_study
    from tools.study.definition import load_study
    from tools.study.runs import checked_chains, run_study

    study = load_study(find_study(name), overrides or [])
    if dry_run:
        print_plan(study, checked_chains(study, out, nproc, dry_run=True))
        return
    outcome = run_study(study, out, nproc, lambda line: print(line, flush=True))
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
    dry_run: DryRun = False,
    rehearsal: Rehearsal = True,
) -> None:
    """Queue all arms with all seeds as Slurm jobs, except what is done or queued already. Equal stages have one job."""
    from cluster.site import load_site
    from tools.recipes.library import find_study
    from tools.study.definition import load_study
    from tools.study.runs import plan_submission, submit_study

    profile, study = load_site(site), load_study(find_study(name), overrides or [])
    directory = (Path(profile.run_root or "") / out).resolve()
    if dry_run:
        planned = plan_submission(study, directory, profile, print, dry_run=True)
        print_plan(study, {run: chain for run, (chain, _) in planned.items()})
        return
    submit_study(study, directory, profile, print, rehearsal=rehearsal)


def print_plan(study: "Study", chains: "dict[StudyRun, ChainRecipe]") -> None:
    """Print what a command would do with each run."""
    from tools.study.plan import StudyPlan, dry_run_lines

    for line in dry_run_lines(StudyPlan(study, chains)):
        print(line)


@app.command("table")
def print_table(
    directory: StudyDirectory,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table.")] = False,
    json: Json = False,
) -> None:
    """Print the mean and deviation of each arm over the seeds, beside the published value, and the differences between
    arms within each seed, with their interval.

    Arms without a finished run have no result.
    """
    from tools.study.study_table import arm_results, open_study, study_json, study_markdown, study_tables

    study = open_study(directory)
    results = arm_results(study, directory)
    if json:
        print(study_json(study, results))
    elif markdown:
        print(study_markdown(study, results))
    else:
        wide_console(140).print(*study_tables(study, results), sep="\n")


@app.command("curves")
def draw_curves_of_study(
    name: Annotated[str, typer.Argument(metavar="STUDY|DIR", help="An included study or a file; or a study's runs.")],
    out: Annotated[Path, typer.Option(metavar="PLACE", help="A .png file or a folder.")] = Path(),
    dpi: Annotated[int, typer.Option(min=50, help="Pixels per inch of the PNG.")] = 200,
) -> None:
    """Draw accuracy over parameters, multiply-adds or epochs of pre-training: published curves, and own results."""
    from tools.analyze.paper_figure import publish_figure
    from tools.recipes.library import find_study
    from tools.study.definition import load_study
    from tools.study.study_curves import draw_study_curves, study_curves
    from tools.study.study_table import arm_results, open_study

    directory = Path(name)
    if directory.is_dir():
        study = open_study(directory)
        numbers = study_curves(study, arm_results(study, directory))
    else:
        numbers = study_curves(load_study(find_study(name)))
    for path in publish_figure(draw_study_curves(numbers), "curves", numbers, out, dpi):
        print(f"{path} is ready")


@app.command("report")
def report_study(
    directory: StudyDirectory,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The file to write. Default: DIR/report.html, or report.md.")
    ] = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Write Markdown, with the pictures in a folder beside it.")
    ] = False,
) -> None:
    """Write a study as one page: results with deviations over seeds, published values, curves of the arms."""
    from tools.report import write_document
    from tools.study.study_page import study_page

    out = out or directory / ("report.md" if markdown else "report.html")
    print(f"{write_document(study_page(directory), out, markdown=markdown)} is written")
