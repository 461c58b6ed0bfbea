"""The page of one run: what was asked for, what was done, what came out, and how it compares with the paper."""

import json
import time
from collections.abc import Iterator
from typing import Any

from cluster.show.status_table import duration
from pipeline.health.verdict import OFF_TRACK, ON_TRACK, UNPUBLISHED
from pipeline.recipe import FCMAESettings
from pipeline.storage.file_names import DATA_FILE
from pipeline.tracking.pictures import main_metric
from tools.report.document import (
    Cell,
    Checks,
    Code,
    Document,
    Figures,
    Fold,
    Picture,
    Section,
    Table,
    Text,
)
from tools.report.facts import Attempt, RunFacts, StageFacts
from tools.report.plots import curves, sheet

EVENTS_SHOWN = 40
NAMED_PACKAGES = ("fcmae", "torch", "ffcv", "numpy", "numba", "deepspeed", "triton", "spconv", "mlflow-skinny")


def page(run: RunFacts) -> Document:
    """The report of a run, finished or not."""
    stages = [stage for stage in run.stages if stage.events]
    sections = [Section("Result", list(result(run)))]
    sections += [Section(f"Stage {stage.name}", list(course(stage))) for stage in stages]
    if stages:
        sections += [
            Section("Throughput and cost", [speeds(run)]),
            Section("Attempts", [attempts(run)]),
            Section("Events", list(events(run))),
        ]
    sections.append(Section("Recipe", list(recipe(run))))
    if stages:
        sections += [Section("Data", list(data(run))), Section("Environment", list(environment(run)))]
    written = time.strftime("%Y-%m-%d %H:%M %Z")
    return Document(
        title=run.name,
        subtitle=f"{' → '.join(s.name for s in run.stages)} · {period(run)}",
        lead=[Text(summary(run)), Figures(list(headline(run)))],
        sections=sections,
        foot=f"Written by fcmae report on {written} from {run.directory}, whose journals have every step.",
    )


def period(run: RunFacts) -> str:
    """From the first attempt's start to the last line written."""
    times = [t for s in run.stages for a in s.attempts for t in (a.started, a.ended) if t]
    if not times:
        return "not started"
    first, last = (time.strftime("%Y-%m-%d %H:%M", time.localtime(t)) for t in (min(times), max(times)))
    return f"{first} to {last[11:] if first[:10] == last[:10] else last}"


def summary(run: RunFacts) -> str:
    """What became of the run, in a sentence or two."""
    done = [stage for stage in run.stages if stage.status.state == "done"]
    if run.done:
        off = [stage.name for stage in run.stages if not stage.verdict.on_track]
        told = "All stages are done" if len(done) > 1 else "The stage is done"
        return f"{told}, and on track." if not off else f"{told}; off track: {', '.join(off)}. Look there first."
    now = [f"{s.name} is {s.status.state}" for s in run.stages if s.status.state not in ("done", "waiting")]
    now = f"; {', '.join(now)}" if now else ""
    return f"{len(done)} of {len(run.stages)} stages are done{now}. What follows is so far."


def headline(run: RunFacts) -> Iterator[tuple[str, str]]:
    """The few numbers to read first."""
    finals = [stage for stage in run.stages if "top1" in stage.metrics]
    if finals:
        yield f"{finals[-1].metrics['top1']:.2f} %", f"top-1, {finals[-1].name}"
    elif run.stages and run.stages[0].metrics:
        name, value = next(iter(run.stages[0].metrics.items()))
        yield f"{value:.4f}", f"{name}, {run.stages[0].name}"
    if (paper := run.published.get("top1")) is not None:
        yield f"{paper:.1f} %", "published"
    yield duration(sum(stage.seconds for stage in run.stages)) or "0s", "of running"
    for gpu, unit in ((True, "GPU-hours"), (False, "core-hours")):
        if hours := run.device_hours(gpu):
            yield f"{hours:,.2f}" if hours < 100 else f"{hours:,.0f}", unit
    taken = sum(len(stage.attempts) for stage in run.stages)
    yield f"{taken}", "attempt" if taken == 1 else "attempts"


def result(run: RunFacts) -> Iterator[Any]:
    """The final table, against the paper where it says something."""
    yield final_table(run)
    published = run.published
    if published:
        told = [f"Published value: {published.get('source', 'source not given')}.", str(published.get("remark") or "")]
        if published.get("timm_top1") is not None:
            told.append("timm: its own evaluation of the released weights.")
        yield Text(" ".join(filter(None, told)), quiet=True)
    else:
        yield Text("The recipe names no published value to compare with.", quiet=True)
    if any(isinstance(stage.recipe.objective, FCMAESettings) for stage in run.stages):
        yield Text(f"Pre-training has nothing outside to compare with: {UNPUBLISHED}.", quiet=True)


def final_table(run: RunFacts) -> Table:
    """A row for each metric of each stage; the last stage's beside what is published."""
    published, rows = run.published, []
    paper = {"top1": published.get("top1")}
    timm = {"top1": published.get("timm_top1"), "top5": published.get("timm_top5")}
    known = [any(v is not None for v in values.values()) for values in (paper, timm)]
    for stage in run.stages:
        last = stage is run.stages[-1]
        for name, value in stage.metrics.items():
            if name == "loss" and "top1" in stage.metrics:
                continue
            cells = [stage.name, name, _metric(name, value)]
            for there, values in zip(known, (paper, timm), strict=True):
                cells += [_metric(name, values.get(name) if last else None)] if there else []
            if known[0]:
                target = paper.get(name) if last else None
                cells.append(f"{value - target:+.2f}" if target is not None else "")
            first = not rows or rows[-1][0] != stage.name
            rows.append([*cells, verdict_cell(stage) if first else ""])
        if not stage.metrics:
            blank = [""] * (1 + sum(known) + known[0])
            rows.append([stage.name, stage.status.state, *blank, ""])
    extra = [title for title, there in (("published", known[0]), ("timm", known[1]), ("difference", known[0])) if there]
    return Table(["stage", "metric", "here", *extra, "verdict"], rows, ("here", *extra))


def verdict_cell(stage: StageFacts) -> Cell:
    """In two or four words."""
    far = "" if stage.status.state == "done" else " so far"
    return Cell(ON_TRACK + far, "good") if stage.verdict.on_track else Cell("off track" + far, "bad")


def _metric(name: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.2f} %" if name.startswith("top") else f"{value:.4f}"


def course(stage: StageFacts) -> Iterator[Any]:
    """Curves, verdict and pictures of one stage."""
    name, points = main_metric(stage.kept)
    resumed = [e["step"] for e in stage.kept if e.get("kind") == "attempt" and e.get("step")]
    total = stage.status.total_steps
    marks = stage.recipe.gate.loss_at if total == stage.recipe.gate.of_steps else {}
    if stage.steps:
        caption = f"{len(stage.steps):,} of {total or 0:,} steps; each loss as logged, and smoothed"
        caption += "; dotted lines are resumes" if resumed else ""
        caption += "; diamonds are the recipe's reference curve" if marks else ""
        drawn = curves([(stage.name, stage.steps, points)], name or "loss", marks, resumed, salt=stage.name)
        yield Picture(f"{stage.name}-curves", caption, drawn)
    verdict = stage.verdict
    sentence = (ON_TRACK if verdict.on_track else OFF_TRACK) + ("" if stage.status.state == "done" else ", so far")
    yield Checks("Verdict", verdict.on_track, sentence, verdict.checks)
    if stage.pictures:
        shown = stage.pictures[-1]
        caption = f"Validation images: what went in, what the encoder saw, what the decoder painted ({shown.stem})"
        yield Picture(f"{stage.name}-pictures", caption, sheet(shown))


def speeds(run: RunFacts) -> Table:
    """What each stage took."""
    gpu, headers, rows = run.device_hours(True) > 0, ["stage", "steps", "images seen", "images/s", "data wait"], []
    for stage in run.stages:
        step, waits = stage.status.step, stage.data_wait
        saves = [e.get("blocked_seconds", e.get("seconds", 0)) for e in stage.kept if e.get("kind") == "save"]
        rows.append(
            [
                stage.name,
                f"{step:,}",
                f"{step * stage.recipe.batch.global_batch:,}",
                f"{stage.images_per_second:,.0f}" if stage.images_per_second else "",
                f"{waits:.1%}" if waits is not None else "",
                f"{len(saves)}, {sum(saves):.1f} s",
                duration(stage.seconds),
                f"{stage.device_hours(gpu):,.2f}",
            ]
        )
    unit = "GPU-hours" if gpu else "core-hours"
    headers += ["saves, blocking", "running", unit]
    return Table(headers, rows, headers[1:])


def attempts(run: RunFacts) -> Table:
    """Every attempt of every stage."""
    rows = [[stage.name, *_attempt(attempt)] for stage in run.stages for attempt in stage.attempts]
    return Table(["stage", "no.", "began", "where", "ranks", "steps", "took", "ended"], rows)


def _attempt(attempt: Attempt) -> list[str]:
    began = time.strftime("%m-%d %H:%M:%S", time.localtime(attempt.started)) if attempt.started else ""
    job = f", job {attempt.job}" if attempt.job else ""
    threads = f"{attempt.threads} thread{'s' if attempt.threads > 1 else ''} each"
    ranks = f"{attempt.ranks}, {'a GPU each' if attempt.on_gpu else threads}"
    steps = f"{attempt.first_step:,} to {attempt.last_step:,}" if attempt.first_step is not None else "none"
    return [str(attempt.number), began, attempt.host + job, ranks, steps, duration(attempt.seconds), attempt.end]


def events(run: RunFacts) -> Iterator[Any]:
    """Refused steps, rollbacks, quarantined checkpoints, changed versions: what the journals warn about."""
    rows = []
    for stage in run.stages:
        for event in stage.events:
            at = str(event.get("step", ""))
            if event.get("kind") == "rollback":
                first, last = event.get("left_out") or ("?", "?")
                message = f"back to step {at}: {event.get('reason')}; steps {first} to {last} are left out"
                rows.append([stage.name, at, Cell(message, "bad")])
            elif event.get("kind") == "event":
                rows.append([stage.name, at, str(event.get("message"))])
    if not rows:
        yield Text("None: no step was refused, no rollback made, no checkpoint set aside.", quiet=True)
        return
    yield Table(["stage", "step", "what"], rows[:EVENTS_SHOWN])
    if len(rows) > EVENTS_SHOWN:
        yield Text(f"and {len(rows) - EVENTS_SHOWN:,} more in the journals", quiet=True)


def recipe(run: RunFacts) -> Iterator[Any]:
    """As it was written, with its comments; what was changed on the command line; and all of it, resolved."""
    files, overrides = run.origin.get("files", []), run.origin.get("overrides", [])
    if files:
        first, *bases = files
        over = f", over {' over '.join(base['path'] for base in bases)}" if bases else ""
        yield Text(f"As it was written, in {first['path']}{over}:")
        yield Code(first["text"].rstrip())
        yield from (Fold(f"its base, {base['path']}", [Code(base["text"].rstrip())]) for base in bases)
        if overrides:
            yield Text("Changed on the command line:")
            yield Code("\n".join(overrides))
        else:
            yield Text("Nothing was changed on the command line.", quiet=True)
    else:
        yield Text("Nobody noted the file that this recipe was written in.", quiet=True)
    yield Fold("the resolved recipe, every value", [Code(run.recipe_text.rstrip())])
    fingerprints = [[stage.name, stage.recipe.fingerprint()] for stage in run.stages]
    yield Fold("fingerprints: equal ones are the same experiment", [Table(["stage", "sha256"], fingerprints)])


def data(run: RunFacts) -> Iterator[Any]:
    """The data files of the stages, each once."""
    used: dict[tuple[str, str], tuple[dict[str, Any], list[str]]] = {}
    for stage in run.stages:
        for name, facts in _files(stage).items():
            used.setdefault((name, facts["sha256"]), (facts, []))[1].append(stage.name)
    rows = []
    for (name, digest), (facts, stages) in used.items():
        images = f"{facts['images']:,} of {facts['samples']:,}" if "images" in facts else ""
        rows.append([name, ", ".join(stages), images, f"{facts.get('classes', ''):,}" if images else "", digest[:16]])
    yield Table(["file", "stages", "images", "classes", "sha256"], rows, ("images", "classes"))
    lines = []
    for (_, digest), (facts, _) in used.items():
        made = [f"{key} {value}" for key, value in facts.get("settings", {}).items() if value is not None]
        lines.append(f"{digest}  {facts.get('path', '')}")
        lines += [f"    {line}" for line in made or ["not noted how it was made"]]
    yield Fold("whole hashes, paths, and how the files were made", [Code("\n".join(lines))])


def _files(stage: StageFacts) -> dict[str, dict[str, Any]]:
    """What the journal says of the stage's data; in an older run only the hashes that it is held to."""
    noted = {name: facts for name, facts in stage.latest("data").items() if isinstance(facts, dict)}
    pinned = stage.directory / DATA_FILE
    if noted or not pinned.exists():
        return noted
    return {name: {"sha256": digest} for name, digest in json.loads(pinned.read_text()).items()}


def environment(run: RunFacts) -> Iterator[Any]:
    """By what it was made: the last stage's; changes between attempts are among the events."""
    found = run.latest("environment")
    if not found:
        versions = run.latest("attempt").get("versions", {})
        yield Text("This run noted nothing but a few versions.", quiet=True)
        yield Table(["package", "version"], [[k, v] for k, v in versions.items()])
        return
    commit, packages = found.get("commit", {}), found.get("packages", {})
    changed = commit.get("changed_files")
    state = "" if changed is None else " (clean)" if not changed else f" ({changed} files changed since)"
    rows = [
        ["git commit", f"{commit['sha']}{state}" if commit else "not a checkout"],
        ["interpreter", f"{found.get('python')}, {found.get('interpreter')}"],
        ["processor", f"{found.get('cpu')}, {found.get('cores')} cores, {found.get('cpu_capability')}"],
        ["memory", f"{found.get('memory_bytes', 0) / 2**30:.0f} GiB"],
        ["GPUs", ", ".join(found["gpus"]) if found.get("gpus") else "none"],
    ]
    if found.get("gpus"):
        libraries = f"CUDA {found.get('cuda')}, cuDNN {found.get('cudnn')}, NCCL {found.get('nccl')}"
        rows.append(["driver", f"{found.get('driver')}; {libraries}"])
    rows.append(["system", str(found.get("platform"))])
    rows += [[name, packages[name]] for name in NAMED_PACKAGES if name in packages]
    yield Table(["what", "value"], rows)
    listed = "\n".join(f"{name}=={version}" for name, version in packages.items())
    yield Fold(f"all {len(packages)} packages", [Code(listed)])
