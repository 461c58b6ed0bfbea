"""The `fcmae` command: which command runs which function."""

import errno
import importlib.metadata
import io
import os
import re
import signal
import sys
from itertools import takewhile
from typing import Annotated, Any

import typer
import typer.core
from pydantic import ValidationError

from pipeline.distributed.processes import keep_imports_safe
from pipeline.errors import UserError, describe_full_gpu
from pipeline.stage.outcome import ExitCode, exit_code
from pipeline.storage.announcement import announced
from pipeline.storage.user_cache import redirect_caches
from pipeline.url_secrets import redact_tracebacks
from tools.analyze import commands as analyze
from tools.estimate.commands import estimate_cost
from tools.evaluate.commands import evaluate_weights
from tools.options import Json
from tools.own_images.commands import finetune_images, pretrain_images
from tools.predict.commands import embed_images, predict_classes
from tools.prepare.commands import prepare_coco, prepare_images, prepare_masks, prepare_yolo
from tools.recipes import commands as recipes
from tools.rehearse.commands import rehearse_recipe
from tools.report.commands import report_runs
from tools.run import commands as runs
from tools.simulate.commands import simulate_chain
from tools.study import commands as study
from tools.tables import wide_console
from tools.verify.commands import verify_path
from tools.weights import checkpoint_commands as checkpoints
from tools.weights.commands import convert_weights, export_weights

UsageError = typer.BadParameter.__base__  # click's, or that of the copy of click inside newer versions of typer


def _print_version(wanted: bool) -> None:
    if wanted:
        try:
            print(f"fcmae {importlib.metadata.version('fcmae')}")
        except importlib.metadata.PackageNotFoundError:
            print("fcmae, from a directory where it was not installed")
        raise typer.Exit


class _Commands(typer.core.TyperGroup):
    """Commands of which some have a name of two words. Ctrl-C ends each with one sentence and exit code 130."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            print("fcmae: interrupted", file=sys.stderr)
            raise typer.Exit(128 + signal.SIGINT) from None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        two = " ".join(args[:2])
        known = two in self.commands
        if known and args[0] == "prepare" and os.path.isdir(args[1]) and not {"-h", "--help"} & {*args}:
            # `fcmae prepare maps OUT.beton` packs the images of a folder called maps: one word follows, not two.
            known = len(list(takewhile(lambda word: not word.startswith("-"), args[2:]))) > 1
        return super().resolve_command(ctx, [two, *args[2:]] if known else args)


app = typer.Typer(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.callback()
def answer_for_all(
    version: Annotated[bool, typer.Option("--version", is_eager=True, callback=_print_version,
        help="Print the version and exit.")] = False,
) -> None:  # fmt: skip
    """Train ConvNeXt V2 from images: FCMAE pre-training, then classification, segmentation or detection, as stages
    that resume by themselves.
    """


def examine_machine(
    json: Json = False,
    warm: Annotated[bool, typer.Option("--warm",
        help="Only do now what a first run would do once: compile the image decoder and a GPU's kernels.")] = False,
) -> None:  # fmt: skip
    """List what this machine has and lacks for training, and how to get it. Exit code 1 if it cannot run stages."""
    from cluster.check_results import Level, results_json, results_table
    from tools.doctor import check_machine, warm_up

    if warm:
        warm_up()
        return
    with announced("looking at this machine", plain=False):
        findings = check_machine()
    if json:
        print(results_json(findings))
    else:
        wide_console().print(results_table(findings))
    if any(finding.level is Level.MISSING for finding in findings):
        raise typer.Exit(1)


PREPARE, TRAIN, RESULTS = "Before training", "Train and watch", "Results and weights"
COMMANDS = {
    "doctor": (examine_machine, PREPARE),
    "prepare": (prepare_images, PREPARE),
    "prepare maps": (prepare_masks, PREPARE),
    "prepare coco": (prepare_coco, PREPARE),
    "prepare yolo": (prepare_yolo, PREPARE),
    "estimate": (estimate_cost, PREPARE),
    "simulate": (simulate_chain, PREPARE),
    "rehearse": (rehearse_recipe, PREPARE),
    "pretrain": (pretrain_images, TRAIN),
    "finetune": (finetune_images, TRAIN),
    "run": (runs.run_here, TRAIN),
    "submit": (runs.submit_run, TRAIN),
    "resume": (runs.resume_run, TRAIN),
    "cancel": (runs.cancel_run, TRAIN),
    "status": (runs.show_status, TRAIN),
    "logs": (runs.show_logs, TRAIN),
    "times": (runs.show_times, TRAIN),
    "profile": (runs.profile_run, TRAIN),
    "report": (report_runs, RESULTS),
    "evaluate": (evaluate_weights, RESULTS),
    "predict": (predict_classes, RESULTS),
    "embed": (embed_images, RESULTS),
    "verify": (verify_path, RESULTS),
    "convert": (convert_weights, RESULTS),
    "export": (export_weights, RESULTS),
}
for name, (command, panel) in COMMANDS.items():
    app.command(name, rich_help_panel=panel)(command)
app.add_typer(recipes.app, name="recipe", rich_help_panel=PREPARE)
app.add_typer(study.app, name="study", rich_help_panel=TRAIN)
app.add_typer(checkpoints.app, name="checkpoint", rich_help_panel=RESULTS)
app.add_typer(analyze.app, name="analyze", rich_help_panel=RESULTS)


def _escape_odd_names() -> None:
    """Print names of files that are no UTF-8 with escapes, as errors are printed, where Python would refuse them."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


def _usage_sentence(error: "UsageError") -> str:
    """What is wrong with a command line, in one sentence."""
    said, _, guess = " ".join(error.format_message().split()).rstrip(".").partition(". Did you mean ")
    if options := getattr(error, "possibilities", None):
        said, guess = error.message, " or ".join(sorted(options))
    found = error.__cause__.errors() if isinstance(error.__cause__, ValidationError) else []
    if any(str(one["input"]).strip("+- ").lower() == "nan" for one in found):
        said = said.replace("Input should be", "it is nan; give a number")
    said, guess = said.replace(": Value error, ", ": "), f"; did you mean {guess.rstrip('?')}?" if guess else ""
    command = error.ctx.command_path if error.ctx else "fcmae"
    return f"{said[0].lower()}{said[1:]}{guess} (`{command} --help` explains)"


def main() -> None:
    """Run the command. An error that the user can mend is printed as one sentence, without a traceback."""
    keep_imports_safe()
    redirect_caches()
    redact_tracebacks()
    _escape_odd_names()
    try:
        for argument in sys.argv[1:]:
            key, _, value = argument.partition("=")
            UserError.refuse_secrets({key: value} if re.fullmatch(r"[\w.]+", key) else argument)
        code = app(prog_name="fcmae", standalone_mode=False)
    except UserError as error:
        print(f"fcmae: {error}", file=sys.stderr)
        sys.exit(exit_code(error))
    except UsageError as error:
        if type(error).__name__ != "NoArgsIsHelpError":  # that has printed the help
            print(f"fcmae: {_usage_sentence(error)}", file=sys.stderr)
        sys.exit(error.exit_code)
    except typer.Abort:
        sys.exit(1)
    except BrokenPipeError:
        sys.exit(128 + signal.SIGPIPE)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's; most commands do not import torch
            raise
        print(f"fcmae: {describe_full_gpu(error)}", file=sys.stderr)
        sys.exit(ExitCode.PERMANENT)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        place = error.filename or "a file could not be written"
        print(f"fcmae: {place}: {error.strerror}; make room, then run the same command again", file=sys.stderr)
        sys.exit(ExitCode.PERMANENT)
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
