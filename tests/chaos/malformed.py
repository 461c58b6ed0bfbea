"""Give the command files and overrides that are damaged or odd, and see that each ends in a sentence, soon and small:

    python -m tests.chaos.malformed [--cases 500] [--seed 0] [--only KIND] [--untrained]

Real files of every kind are made once: recipes, sites, side-cars, data, archives, labels, weights, and a finished run.
hypothesis draws what is changed in a copy of one (see `malformed_inputs`): its bytes, or a value in its structure. The
command that reads it runs in a forked process. The table counts how the commands ended; the exit code is 0 if there was
no traceback, no death by a signal, nothing slower than 5 s of CPU and nothing larger than 1 GiB.
"""

import argparse
import io
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings

from cluster.slurm.decision import decide
from cluster.slurm.job_history import last_submitted, note_job_event
from cluster.slurm.retry import newest_commit
from cluster.slurm.supervisor import collect_facts
from cluster.slurm.time_limit import TimeLimitWatch
from pipeline.errors import UserError
from pipeline.health.verdict import judge_stage, update_verdict
from pipeline.stage.attempts import Attempts
from pipeline.stage.directory import Stage
from pipeline.stage.outcome import Outcome, OutcomeKind, SrunCode
from pipeline.storage.file_names import DATA_FILE, DONE_FILE, JOURNAL_FILE, RESULT_FILE
from pipeline.storage.folder import write_json
from pipeline.tracking.journal import Journal, read_events
from pipeline.training.saving import best_evaluation
from tests.archives import encoded, photograph, tar
from tests.chaos.malformed_inputs import Input, inputs, put, yaml_bytes
from tests.processes import Forked
from tests.support import fcmae, make_tiny_run, tiny_data, write_tiny_recipe

WEIGHTS_FILES = ("weights.safetensors", "weights.pth", "old.pth")
MOST_SECONDS, MOST_MIB, PATIENCE_SECONDS = 5.0, 1024, 60
ONE_STAGE = ("stages.intermediate=null", "stages.finetune=null", "stages.pretrain.schedule.epochs=1",
             "stages.pretrain.schedule.warmup_epochs=0")  # fmt: skip


@dataclass
class Workshop:
    """The real files, and for each kind of input how a copy is changed and which commands read it."""

    place: Path
    real: dict[str, bytes]
    """Every file that is changed, by its path."""
    run_files: list[str]

    @classmethod
    def set_up(cls, place: Path, trained: bool) -> "Workshop":
        """Make the real files. `trained`: with a run that was trained and its weights; otherwise records alone."""
        tiny_data(place / "data", train=64, validation=16)
        recipe = write_tiny_recipe(place, ONE_STAGE if trained else ())
        files = {
            "site.yaml": yaml_bytes({"nodes": 2, "gpus_per_node": 4, "partition": "a", "cpus_per_task": 3,
                "time_limit_minutes": 100, "exclude": ["n1"], "environment": {"A": "b"}, "sbatch": {"nice": 5},
                "gpu": {"name": "A", "memory_gib": 80, "bf16_tflops": 300, "fp32_tflops": 60},
                "preflight": {"disk_gib": 1.0}, "stages": {"finetune": {"nodes": 1}}}),
            "labels.csv": b"name,class\n" + b"".join(b"%d.jpg,%s\n" % (n, (b"cat", b"dog")[n % 2]) for n in range(6)),
            "images.tar": tar({f"{'ab'[n % 2]}/{n}.jpg": encoded(photograph(n, 24)) for n in range(4)}),
            "outer.tar": tar({f"{name}.tar": tar({f"{name}_{n}.jpg": encoded(photograph(n, 24)) for n in range(2)})
                for name in ("n01", "n02")}),
            "rows.parquet": _rows_of_images(),
        }  # fmt: skip
        for name, content in files.items():
            (place / name).write_bytes(content)
        (place / "photos").mkdir()
        for n in range(6):
            (place / "photos" / f"{n}.jpg").write_bytes(encoded(photograph(n, 24)))
        if trained:
            done = fcmae("run", recipe, "--out", place / "run")
            assert done.returncode == 0, done.stderr
        else:
            make_records(make_tiny_run(place))
        _make_weights(place)
        stage = place / "run" / "pretrain"
        inside = [path for path in stage.rglob("*") if path.is_file()]
        kept = ("manifest.json", "COMMIT", ".metadata")
        run_files = [path for path in inside if "checkpoints/" not in str(path) or path.name in kept]
        run_files += [path for path in (place / "run/recipe.yaml", place / "run/origin.json") if path.exists()]
        names = sorted(str(path.relative_to(place)) for path in run_files)
        others = [*files, "tiny.yaml", "data/train.beton", "data/train.beton.json", *WEIGHTS_FILES]
        return cls(place, {name: (place / name).read_bytes() for name in (*others, *names)}, names)

    def copy(self, to: Path) -> None:
        """A copy whose files are links to the real ones; a changed file takes the place of a link."""
        shutil.copytree(self.place, to, copy_function=os.link)


def make_records(run: Path) -> None:
    """Write what a finished stage leaves, without training."""
    stage = run / "pretrain"
    attempts = Attempts(stage, None)
    attempts.claim(1, threads=1)
    with Journal(stage / JOURNAL_FILE, 1) as journal:
        journal.write("attempt", step=0, total_steps=4, world_size=1, global_batch=32, objective="fcmae", device="cpu",
            threads=1, host="here", job=None, versions={"torch": "2"})  # fmt: skip
        journal.write("data", train={"path": "t", "sha256": "a" * 64, "samples": 9, "images": 9, "classes": 2})
        journal.write("started", step=1, seconds=1.5, cpu_seconds=1.0, laps={"imports": 1.0})
        for step in range(1, 5):
            journal.write("step", step=step, loss=1 / step, lr=1e-3, gradient_norm=1.0, images_per_second=50.0,
                data_wait_seconds=0.1)  # fmt: skip
        journal.write("evaluate", step=4, metrics={"loss": 0.5})
        journal.write("save", step=4, why="end", path="step-000000004.000001", seconds=0.5, blocked_seconds=0.1)
        journal.write("rollback", step=4, reason="spikes", left_out=[1, 2], rollbacks=1)
        journal.write("stop", step=4, reason="SIGTERM", asked=time.time() - 1)
        journal.write("end", outcome="done", reason="", step=4)
    attempts.record(Outcome(OutcomeKind.DONE, step=4))
    write_json(stage / DATA_FILE, {"train": "a" * 64})
    write_json(stage / RESULT_FILE, {"steps": 4, "metrics": {"loss": 0.5}, "weights_sha256": "b" * 64, "seconds": 3.0,
        "verdict": {"on_track": True, "sentence": "on track", "checks": []}})  # fmt: skip
    write_json(stage / DONE_FILE, {"weights": "weights.safetensors", "weights_sha256": "b" * 64, "step": 4})
    note_job_event(stage, "submitted", "7", committed=-1, nodes=1, ranks=1)
    note_job_event(stage, "requeued", "7", committed=4, code=0, reason="x")


def _make_weights(place: Path) -> None:
    import torch

    from pipeline.models import create_model
    from pipeline.weights.safetensors_file import write_weights

    shape = {"name": "convnextv2", "depths": [1, 1], "dims": [8, 16], "stem_stride": 2}
    torch.manual_seed(0)
    tensors = create_model(**shape, num_classes=3).state_dict()
    facts = {"model": shape, "weights": "model", "image_size": 16, "classes": ["a", "b", "c"], "objective": "x"}
    write_weights(place / "weights.safetensors", tensors, facts)
    torch.save({"model": tensors}, place / "weights.pth")
    torch.save({"model": tensors}, place / "old.pth", _use_new_zipfile_serialization=False)


@dataclass
class Ending:
    """How one command ended."""

    kind: str
    arguments: tuple[str, ...]
    file: str
    how: str
    """refused, accepted, or what must not be: traceback, signal, hang, silent."""
    seconds: float
    mib: float
    said: str
    place: Path

    @property
    def bad(self) -> bool:
        return self.how not in ("refused", "accepted") or self.seconds > MOST_SECONDS or self.mib > MOST_MIB


def measured(arguments: tuple[str, ...], note: str) -> None:
    """Run the command in this process, and note the CPU seconds and the largest memory of it and its children."""
    import atexit

    resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))
    began = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])

    def write() -> None:
        own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        seconds = sum(own[:2]) - began + sum(children[:2])
        Path(note).write_text(f"{seconds} {max(own.ru_maxrss, children.ru_maxrss) / 1024}")

    atexit.register(write)
    try:
        command(arguments)
    finally:
        write()


def command(arguments: tuple[str, ...]) -> None:
    """Run `fcmae` with these arguments in this process; "watch" reads a run as a job does."""
    if arguments[0] == "watch":
        with sentences():
            read_like_a_job(Path(arguments[1]) / "pretrain")
        return
    from tools import cli

    sys.argv = ["fcmae", *arguments]
    cli.main()


@contextmanager
def sentences() -> Iterator[None]:
    """End the process as the command does where a sentence says what is wrong."""
    try:
        yield
    except UserError as error:
        print(f"fcmae: {error}", file=sys.stderr)
        sys.exit(1)


def read_like_a_job(directory: Path) -> None:
    """Read what a job and its supervisor read in a stage: the stop watch, the count of attempts, the owner."""
    TimeLimitWatch(directory, time.time() + 100).is_due(time.time())
    last_submitted(directory)
    stage = Stage(directory)
    decide(collect_facts(stage, SrunCode.CRASHED, "7", 3, newest_commit(directory).step))
    stage.attempts.last_threads(1)
    update_verdict(stage)
    judge_stage(stage)
    best_evaluation(read_events(directory / JOURNAL_FILE), "loss")
    stage.attempts.own = stage.attempts.newest()
    stage.attempts.record(Outcome(OutcomeKind.SAVED, "test", 3))
    stage.pin_data({"train": "a" * 64})


def run_forked(arguments: tuple[str, ...], place: Path) -> tuple[int | None, str, float, float]:
    """(exit code, output, CPU seconds, MiB) of a command in a process of its own. No exit code: it hung."""
    note, began = place / "note", time.monotonic()
    with Forked(measured, arguments, str(note), XDG_CACHE_HOME=str(place / "cache")) as process:
        with suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE_SECONDS)
        code, said = process.poll(), "\n".join(process.said())
    noted = note.read_text().split() if note.exists() else (time.monotonic() - began, 0)
    return code, said, *map(float, noted)


def run_here(arguments: tuple[str, ...], place: Path) -> tuple[int | None, str, float, float]:
    """The same in this process, for tests that cannot wait; memory is not measured."""
    said, began = io.StringIO(), time.process_time()
    with redirect_stdout(said), redirect_stderr(said):
        try:
            command(arguments)
            code = 0
        except SystemExit as end:
            code = end.code or 0
        except Exception:
            code = 1
            traceback.print_exc()
    return code, said.getvalue(), time.process_time() - began, 0.0


def end_of(shop: Workshop, kind: str, case: Input, place: Path, run: Callable = run_forked) -> Ending:
    """Make a copy with the changed input, run the command on it, and see how it ends."""
    arguments, name, content = case
    shop.copy(place)
    put(place, name, content, kind)
    with chdir(place):
        code, said, seconds, mib = run(arguments, place)
    sentences = [line for line in said.splitlines() if line.startswith("fcmae: ")]
    if code is None:
        how = "hang"
    elif "Traceback" in said:
        how = "traceback"
    elif code < 0:
        how = "signal"
    elif code in (0, 75):
        how = "accepted"
    else:
        how = "refused" if len(sentences) == 1 or code == 2 else "silent"
    return Ending(kind, arguments, name, how, seconds, mib, said.strip()[-2000:], place)


def _rows_of_images() -> bytes:
    import pyarrow
    import pyarrow.parquet

    rows = [{"image": {"bytes": encoded(photograph(n, 24)), "path": f"{n}.jpg"}, "label": n % 2} for n in range(4)]
    file = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file, row_group_size=2)
    return file.getvalue().to_pybytes()


SETTINGS = settings(
    phases=[Phase.generate], database=None, deadline=None, suppress_health_check=list(HealthCheck), derandomize=False
)
KINDS = {"recipe": 70, "site": 50, "override": 50, "side-car": 40, "data": 15, "sample table": 25, "archive": 35,
         "parquet": 10, "labels": 30, "weights": 55, "run": 100, "no file": 20}  # fmt: skip
"""Of 500 cases so many are of each kind."""


def give_all(
    shop: Workshop, place: Path, cases: int, chosen_seed: int, only: str = "", run: Callable = run_forked
) -> list[Ending]:
    """Give the commands so many inputs, in the shares of KINDS."""
    endings: list[Ending] = []

    def giver(kind: str) -> Callable[[Input], None]:
        def give(case: Input) -> None:
            folder = place / f"{len(endings):04d}"
            endings.append(end_of(shop, kind, case, folder, run))
            if not endings[-1].bad:
                shutil.rmtree(folder, ignore_errors=True)

        return give

    for kind, share in KINDS.items():
        if only in ("", kind):
            drawn = given(inputs(shop.real, shop.run_files, kind))(giver(kind))
            number = max(1, round(cases * share / 500))
            seed(chosen_seed)(settings(SETTINGS, max_examples=number)(drawn))()
    return endings


def table(endings: list[Ending]) -> str:
    """A line for each kind of input."""
    lines = [f"{'kind':14}{'inputs':>8}{'refused':>9}{'accepted':>10}{'wrong':>7}{'slowest s':>11}{'largest MiB':>13}"]
    for kind in (*dict.fromkeys(e.kind for e in endings), "all"):
        own = [e for e in endings if kind in (e.kind, "all")]
        ways = Counter(e.how for e in own)
        wrong = sum(e.bad for e in own)
        slow, large = max(e.seconds for e in own), max(e.mib for e in own)
        lines.append(f"{kind:14}{len(own):8}{ways['refused']:9}{ways['accepted']:10}{wrong:7}{slow:11.1f}{large:13.0f}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", choices=["", *KINDS])
    parser.add_argument("--here", action="store_true", help="in this process: faster, without limits")
    parser.add_argument("--untrained", action="store_true", help="records of a run alone, without training it")
    options = parser.parse_args()
    place = Path(tempfile.mkdtemp(prefix="malformed-"))
    shop = Workshop.set_up(place / "real", not options.untrained)
    endings = give_all(shop, place, options.cases, options.seed, options.only, run_here if options.here else run_forked)
    for ending in endings:
        if ending.bad:
            command = " ".join(ending.arguments)[:200]
            print(f"\n{ending.how}: {ending.kind}, {command} ({ending.file}) in {ending.place}")
            print(f"{ending.seconds:.1f} s, {ending.mib:.0f} MiB\n{ending.said}")
    print(table(endings))
    if not any(ending.bad for ending in endings):
        shutil.rmtree(place)
    return int(any(ending.bad for ending in endings))


if __name__ == "__main__":
    sys.exit(main())
