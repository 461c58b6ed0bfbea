"""The page of one run: recipe, course, result, and how it compares with the published value."""

import time
from collections.abc import Callable, Iterator
from typing import Any

from cluster.show.status_table import duration, rate
from pipeline.health.verdict import OFF_TRACK, ON_TRACK, UNPUBLISHED
from pipeline.recipe import FCMAESettings
from pipeline.storage.file_names import DATA_FILE
from pipeline.storage.run_records import read_record
from pipeline.tracking.metric_names import TITLES, is_percentage
from pipeline.tracking.pictures import main_metric
from tools.report.document import Block, Chapter, Checks, Code, Document, Figures, Fold, Grid, Picture, Text, Toned
from tools.report.evaluations import evaluation_blocks
from tools.report.facts import UNITS, Attempt, RunFacts, StageFacts
from tools.report.plots import curves_svg, sheet

EVENTS_SHOWN = 40
# By the number of columns; pictures of three by earlier versions have the rescaled reconstruction alone.
PICTURE_COLUMNS = {
    3: "the input, the visible cells, the reconstruction",
    4: "the input; the visible cells; the reconstruction as predicted, around grey and in the contrast of the visible"
    " cells, because the network does not predict a hidden cell's own brightness and contrast; and as papers draw it,"
    " rescaled with the true mean and deviation of each hidden cell",
}
COMPARED = (*TITLES, "box_ap50", "mask_ap", "mask_ap50")
"""The results that recipes name published values of."""
SHOWN_AP = ("box_ap", "box_ap50", "box_ap75", "mask_ap", "mask_ap50", "mask_ap75")
"""Of a detector's figures, those that the page's first table has; its stage's chapter has all."""
NAMED_PACKAGES = ("fcmae", "torch", "ffcv", "numpy", "numba", "deepspeed", "triton", "spconv", "mlflow-skinny")


def run_page(run: RunFacts) -> Document:
    """The report of a run, finished or not."""
    stages = [stage for stage in run.stages if stage.events]
    chapters = [Chapter("Result", list(result_blocks(run)))]
    chapters += [Chapter(f"Stage {stage.name}", list(stage_blocks(stage))) for stage in stages]
    if stages:
        chapters += [
            Chapter("Throughput and cost", [cost_grid(run)]),
            Chapter("Attempts", [attempt_grid(run)]),
            Chapter("Events", list(event_blocks(run))),
        ]
    chapters.append(Chapter("Recipe", list(recipe_blocks(run))))
    if stages:
        chapters += [Chapter("Data", _shown(data_blocks, run)), Chapter("Environment", _shown(environment_blocks, run))]
    written = time.strftime("%Y-%m-%d %H:%M %Z")
    return Document(
        title=run.name,
        subtitle=f"{' → '.join(s.name for s in run.stages)} · {period(run)}",
        lead=[Text(summary(run)), Figures(list(headline(run)))],
        chapters=chapters,
        foot=f"Written by fcmae report on {written} from {run.directory}; its journals have every step.",
    )


def _shown(blocks: Callable[[RunFacts], Iterator[Block]], run: RunFacts) -> list[Block]:
    """Blocks of facts that only people read, of whatever version of this program wrote them."""
    try:
        return list(blocks(run))
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        return [Text(f"The journal's record cannot be read ({type(error).__name__}: {error}).", quiet=True)]


def period(run: RunFacts) -> str:
    """From the start of the first attempt to the last event."""
    times = [t for s in run.stages for a in s.attempts for t in (a.started, a.ended) if t]
    if not times:
        return "not started"
    first, last = (time.strftime("%Y-%m-%d %H:%M", time.localtime(t)) for t in (min(times), max(times)))
    return f"{first} to {last[11:] if first[:10] == last[:10] else last}"


def summary(run: RunFacts) -> str:
    """The state of the run in a sentence or two."""
    done, count = sum(stage.done for stage in run.stages), len(run.stage_names)
    if done == count:
        state = "All stages are done" if done > 1 else "The stage is done"
        off = ", ".join(stage.name for stage in run.stages if not stage.verdict.on_track)
        return f"{state}; off track: {off}. Look there first." if off else f"{state}, and on track."
    active = [f"; {s.name} is {s.status.state}" for s in run.stages if s.status.state not in ("done", "waiting")]
    return f"{done} of {count} stages are done{''.join(active)}. This page shows the state so far."


def headline(run: RunFacts) -> Iterator[tuple[str, str]]:
    """The few numbers to read first."""
    finals = [(s, name) for s in run.stages for name in TITLES if name in s.metrics]
    if finals:
        stage, name = finals[-1]
        yield _metric(name, stage.metrics[name]), f"{TITLES[name]}, {stage.name}"
    elif run.stages and run.stages[0].metrics:
        name, value = next(iter(run.stages[0].metrics.items()))
        yield f"{value:.4f}", f"{name}, {run.stages[0].name}"
    papers = [paper for name in TITLES if (paper := run.published.get(name)) is not None]
    if papers:
        yield f"{papers[0]:.1f} %", "published"
    yield duration(run.seconds) or "0s", "of running"
    for unit in UNITS:
        if hours := run.device_hours[unit]:
            yield f"{hours:,.2f}" if hours < 100 else f"{hours:,.0f}", unit
    attempts = sum(len(stage.attempts) for stage in run.stages)
    yield f"{attempts}", "attempt" if attempts == 1 else "attempts"


def result_blocks(run: RunFacts) -> Iterator[Block]:
    """The final metrics, and the source of the published value."""
    yield final_grid(run)
    published = run.published
    if published:
        source = [f"Published value: {published.get('source', 'source not given')}.", published.get("remark")]
        if published.get("timm_top1") is not None:
            source.append("timm: its own evaluation of the released weights.")
        yield Text(" ".join(filter(None, source)), quiet=True)
    else:
        yield Text("The recipe names no published value to compare with.", quiet=True)
    if any(isinstance(stage.recipe.objective, FCMAESettings) for stage in run.stages):
        yield Text(f"Pre-training cannot be compared with published values: {UNPUBLISHED}.", quiet=True)


def final_grid(run: RunFacts) -> Grid:
    """A row for each metric of each stage; the last stage's beside the published values."""
    published = run.published
    references = {"published": {name: published.get(name) for name in COMPARED}}
    references["timm"] = {"top1": published.get("timm_top1"), "top5": published.get("timm_top5")}
    references = {title: values for title, values in references.items() if any(v is not None for v in values.values())}
    numbers = ["here", *references, *(["difference"] if "published" in references else [])]
    headers = ["stage", "metric", *numbers, "verdict"]
    rows = []
    for stage in run.stages:
        judged = any(name in stage.metrics for name in TITLES)
        metrics = {name: v for name, v in stage.metrics.items() if name != "loss" or not judged}
        if "box_ap" in metrics:
            metrics = {name: metrics[name] for name in SHOWN_AP if name in metrics}
        lines: list[dict[str, str | Toned]] = []
        for name, value in metrics.items():
            lines.append({"metric": name, "here": _metric(name, value)})
            if stage.name == run.stage_names[-1]:
                lines[-1] |= {title: _metric(name, values.get(name)) for title, values in references.items()}
                target = references.get("published", {}).get(name)
                lines[-1]["difference"] = f"{value - target:+.2f}" if target is not None else ""
        if lines:
            lines[0]["verdict"] = verdict_cell(stage)
        for cells in lines or [{"metric": stage.status.state}]:
            rows.append([stage.name, *(cells.get(header, "") for header in headers[1:])])
    return Grid(headers, rows, numbers)


def verdict_cell(stage: StageFacts) -> Toned:
    """The verdict in two or four words."""
    far = "" if stage.done else " so far"
    return Toned(ON_TRACK + far, "good") if stage.verdict.on_track else Toned("off track" + far, "bad")


def _metric(name: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.2f} %" if is_percentage(name) else f"{value:.4f}"


def stage_blocks(stage: StageFacts) -> Iterator[Block]:
    """Curves, verdict and pictures of one stage."""
    name, points = main_metric(stage.kept)
    resumes = [e["step"] for e in stage.kept if e.get("kind") == "attempt" and e.get("step")]
    total = stage.status.total_steps
    reference = stage.recipe.gate.loss_at if total == stage.recipe.gate.of_steps else {}
    if stage.steps:
        caption = f"{len(stage.steps):,} of {total or 0:,} steps; each loss as logged, and smoothed"
        caption += "; dotted lines are resumes" if resumes else ""
        caption += "; diamonds are the recipe's reference curve" if reference else ""
        drawn = curves_svg([(stage.name, stage.steps, points)], name or "loss", reference, resumes, salt=stage.name)
        yield Picture(f"{stage.name}-curves", caption, drawn)
    verdict = stage.verdict
    sentence = (ON_TRACK if verdict.on_track else OFF_TRACK) + ("" if stage.done else ", so far")
    yield Checks(verdict.on_track, sentence, verdict.checks)
    if stage.pictures:
        shown = stage.pictures[-1]
        picture, columns = sheet(shown)
        seen = PICTURE_COLUMNS.get(columns, PICTURE_COLUMNS[3])
        if stage.recipe.objective.kind == "segmentation":
            seen = "the image, the true classes of its pixels, and the predicted ones; ignored pixels are grey"
        if stage.recipe.objective.kind == "detection":
            seen = "the image, its annotated objects (crowds are dark), and detections with scores from 0.3"
        caption = f"Validation images ({shown.stem}): {seen}"
        yield Picture(f"{stage.name}-pictures", caption, picture)
    yield from evaluation_blocks(stage)


def cost_grid(run: RunFacts) -> Grid:
    """Steps, throughput and hours of each stage."""
    unit = UNITS[0] if run.device_hours[UNITS[0]] else UNITS[1]
    rows = []
    for stage in run.stages:
        step, speed, wait = stage.status.step, stage.images_per_second, stage.data_wait
        saves = [e.get("blocked_seconds", e.get("seconds", 0)) for e in stage.kept if e.get("kind") == "save"]
        rows.append(
            [
                stage.name,
                f"{step:,}",
                f"{step * stage.recipe.batch.global_batch:,}",
                rate(speed),
                f"{wait:.1%}" if wait is not None else "",
                f"{len(saves)}, {sum(saves):.1f} s",
                duration(stage.seconds),
                f"{stage.device_hours[unit]:,.2f}",
            ]
        )
    numbers = ["steps", "images seen", "images/s", "data wait", "saves, blocking", "running", unit]
    return Grid(["stage", *numbers], rows, numbers)


def attempt_grid(run: RunFacts) -> Grid:
    """Every attempt of every stage."""
    rows = [[stage.name, *_attempt_cells(attempt)] for stage in run.stages for attempt in stage.attempts]
    return Grid(["stage", "no.", "began", "where", "ranks", "steps", "took", "ended"], rows)


def _attempt_cells(attempt: Attempt) -> list[str]:
    began = time.strftime("%m-%d %H:%M:%S", time.localtime(attempt.started)) if attempt.started else ""
    job = f", job {attempt.job}" if attempt.job else ""
    threads = f"{attempt.threads} thread{'s' if attempt.threads > 1 else ''} each"
    ranks = f"{attempt.ranks}, {'a GPU each' if attempt.on_gpu else threads}"
    steps = f"{attempt.first_step:,} to {attempt.last_step:,}" if attempt.first_step is not None else "none"
    return [str(attempt.number), began, attempt.host + job, ranks, steps, duration(attempt.seconds), attempt.end]


def event_blocks(run: RunFacts) -> Iterator[Block]:
    """The journals' warnings and rollbacks: skipped steps, quarantined checkpoints, changed versions."""
    rows = []
    for stage in run.stages:
        for event in stage.events:
            step = str(event.get("step", ""))
            if event.get("kind") == "rollback":
                first, last = event.get("left_out") or ("?", "?")
                message = f"back to step {step}: {event.get('reason')}; steps {first} to {last} are skipped"
                rows.append([stage.name, step, Toned(message, "bad")])
            elif event.get("kind") == "event":
                rows.append([stage.name, step, str(event.get("message"))])
    if not rows:
        yield Text("None: no step was skipped, nothing rolled back, no checkpoint quarantined.", quiet=True)
        return
    yield Grid(["stage", "step", "event"], rows[:EVENTS_SHOWN])
    if len(rows) > EVENTS_SHOWN:
        yield Text(f"and {len(rows) - EVENTS_SHOWN:,} more in the journals", quiet=True)


def recipe_blocks(run: RunFacts) -> Iterator[Block]:
    """The recipe as written, with its comments; the changes on the command line; and every resolved value."""
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
        yield Text("The run does not record the file of its recipe.", quiet=True)
    yield Fold("the resolved recipe, every value", [Code(run.recipe_text.rstrip())])
    fingerprints = [[stage.name, stage.recipe.fingerprint()] for stage in run.stages]
    yield Fold("fingerprints: equal ones are the same experiment", [Grid(["stage", "sha256"], fingerprints)])


def data_blocks(run: RunFacts) -> Iterator[Block]:
    """The data files of the stages, each once."""
    stages_of: dict[tuple[str, str], list[str]] = {}
    facts_of: dict[tuple[str, str], dict[str, Any]] = {}
    for stage in run.stages:
        for name, facts in _data_files(stage).items():
            stages_of.setdefault((name, facts["sha256"]), []).append(stage.name)
            facts_of.setdefault((name, facts["sha256"]), facts)
    rows, lines = [], []
    for (name, digest), facts in facts_of.items():
        stages = ", ".join(stages_of[name, digest])
        images = f"{facts['images']:,} of {facts['samples']:,}" if "images" in facts else ""
        rows.append([name, stages, images, _classes_of(facts) if images else "", digest[:16]])
        settings = [f"{key} {value}" for key, value in facts.get("settings", {}).items() if value is not None]
        lines.append(f"{digest}  {facts.get('path', '')}")
        lines += [f"    {line}" for line in settings or ["preparation not recorded"]]
    yield Grid(["file", "stages", "images", "classes", "sha256"], rows, ("images", "classes"))
    yield Fold("whole hashes, paths, and how the files were made", [Code("\n".join(lines))])


def _classes_of(facts: dict[str, Any]) -> str:
    """How many classes have images, and of how many if some have none."""
    classes, answered = facts.get("classes", ""), facts.get("classes_with_images")
    return f"{classes:,}" if answered in (None, classes) else f"{answered:,} of {classes:,}"


def _data_files(stage: StageFacts) -> dict[str, dict[str, Any]]:
    """The journal's facts about the stage's data; in an older run only the hashes of data.json."""
    files = {name: facts for name, facts in stage.latest("data").items() if isinstance(facts, dict)}
    pinned = stage.directory / DATA_FILE
    if files or not pinned.exists():
        return files
    return {name: {"sha256": digest} for name, digest in read_record(pinned).items() if isinstance(digest, str)}


def environment_blocks(run: RunFacts) -> Iterator[Block]:
    """Code, machine and packages of the last stage; changes between attempts are among the events."""
    environment = run.latest("environment")
    if not environment:
        versions = run.latest("attempt").get("versions", {})
        yield Text("This run records only a few versions.", quiet=True)
        yield Grid(["package", "version"], [[k, v] for k, v in versions.items()])
        return
    commit, packages = environment.get("commit", {}), environment.get("packages", {})
    changed = commit.get("changed_files")
    state = "" if changed is None else " (clean)" if not changed else f" ({changed} files changed since)"
    get = environment.get
    rows = [
        ["git commit", f"{commit['sha']}{state}" if commit else "not a checkout"],
        ["interpreter", f"{get('python')}, {get('interpreter')}"],
        ["processor", f"{get('cpu')}, {get('cores')} cores, {get('cpu_capability')}"],
        ["memory", f"{get('memory_bytes', 0) / 2**30:.0f} GiB"],
        ["GPUs", ", ".join(get("gpus") or ["none"])],
    ]
    if get("gpus"):
        libraries = f"CUDA {get('cuda')}, cuDNN {get('cudnn')}, NCCL {get('nccl')}"
        rows.append(["driver", f"{get('driver')}; {libraries}"])
    rows.append(["system", str(get("platform"))])
    rows += [[name, packages[name]] for name in NAMED_PACKAGES if name in packages]
    yield Grid(["part", "value"], rows)
    listed = "\n".join(f"{name}=={version}" for name, version in packages.items())
    yield Fold(f"all {len(packages)} packages", [Code(listed)])
