"""The report's figures, from journals written here: what a resume has withdrawn, what was paid, foreign text."""

import dataclasses
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from cluster.recipe_origin import read_origin, write_origin
from pipeline.stage.directory import Stage
from pipeline.stage.outcome import Outcome, OutcomeKind
from pipeline.storage.folder import Folder
from pipeline.storage.working_copy import Mirror
from pipeline.tracking.journal import Journal
from pipeline.tracking.pictures import draw_label_maps, draw_reconstruction
from tests.support import make_tiny_run
from tools.report import write_report
from tools.report.compare import comparison_page, run_labels
from tools.report.facts import gather
from tools.report.page import run_page
from tools.report.plots import LARGEST_BYTES, sheet


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A first stage that was lost at step 8, went on from step 4 on other ranks, and is done; the others wait."""
    directory = make_tiny_run(tmp_path)
    stage = Stage(directory / "pretrain")
    for attempt, first, last, ranks, device in ((1, 0, 8, 2, "cpu"), (2, 4, 12, 4, "cuda:0")):
        stage.attempts.claim(ranks)
        begin = {"total_steps": 12, "world_size": ranks, "threads": 3, "device": device, "host": f"node{attempt}"}
        with Journal(stage.directory / "journal.jsonl", attempt) as log:
            log.write("attempt", step=first, **begin)
            for step in range(first + 1, last + 1):
                log.write("step", step=step, loss=1 / step, lr=0.1, images_per_second=64.0, data_wait_seconds=0.05)
            if attempt == 1:
                log.write("event", level="warning", message="step 7 was skipped: its <loss> is nan", step=7)
            else:
                log.write("evaluate", step=12, metrics={"loss": 0.5})
        if attempt == 1:
            path = stage.directory / "attempts" / "000001.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), "pid_start_time": 1}))  # it was killed
        else:
            stage.attempts.record(Outcome(OutcomeKind.DONE, step=12))
    stage.finish({"steps": 12, "metrics": {"loss": 0.5}, "weights": "w", "weights_sha256": "0"}, 12)
    for line in (path := stage.directory / "journal.jsonl").read_text().splitlines():
        event = json.loads(line)
        event["time"] = 1e9 + 3600 * event["attempt"] + 10 * event.get("step", 0)
        with open(path.with_suffix(".new"), "a") as out:
            out.write(json.dumps(event) + "\n")
    path.with_suffix(".new").replace(path)
    entries = [json.loads(line) for line in (stage.directory / "attempts.jsonl").read_text().splitlines()]
    lines = [json.dumps({**e, "started": f"2001-09-09T0{1 + e['attempt']}:46:40+00:00"}) for e in entries]
    (stage.directory / "attempts.jsonl").write_text("\n".join(lines) + "\n")
    return directory


def test_what_was_paid_is_counted_by_attempt_also_the_lost_one(run):
    facts = gather(run)
    stage = facts.stages[0]
    assert [a.seconds for a in stage.attempts] == [80.0, 120.0]
    assert stage.device_hours["core-hours"] == pytest.approx(80 / 3600 * 2 * 3)
    assert stage.device_hours["GPU-hours"] == pytest.approx(120 / 3600 * 4)
    assert [a.host for a in stage.attempts] == ["node1", "node2"]
    assert [(a.first_step, a.last_step) for a in stage.attempts] == [(0, 8), (4, 12)]
    assert [a.end for a in stage.attempts] == ["no end written: running, killed or lost", "done"]


def test_steps_that_were_withdrawn_count_once(run):
    stage = gather(run).stages[0]
    assert [event["step"] for event in stage.steps] == list(range(1, 13))
    assert stage.images_per_second == 64.0
    assert stage.data_wait == pytest.approx(0.05 * 64 / 32)
    assert len([e for e in stage.events if e["kind"] == "step"]) == 16


def test_the_page_escapes_what_others_wrote_and_shows_events(run):
    text = run_page(gather(run)).html()
    assert "its &lt;loss&gt; is nan" in text
    assert "<loss>" not in text
    assert "1 of 3 stages are done" in text
    assert "node1" in text


def test_a_stage_whose_directory_was_removed_is_not_done(run):
    for name in ("intermediate", "finetune"):
        shutil.rmtree(run / name)
    facts = gather(run)
    facts = dataclasses.replace(facts, recipe={**facts.recipe, "published": {"top1": 88.9}})
    facts.stages[-1].status.metrics.update(top1=60.0)
    page = run_page(facts)
    assert "1 of 3 stages are done" in page.html()
    rows = {row[1]: row[2:5] for row in page.chapters[0].blocks[0].rows}
    assert rows["top1"] == ["60.00 %", "", ""], "the published value is that of the last stage"


def test_the_recipe_is_shown_as_it_was_written(run, tmp_path):
    base, own = tmp_path / "base.yaml", tmp_path / "own.yaml"
    base.write_text("seed: 3  # the paper's\n")
    own.write_text("extends: [demo-scratch, base.yaml, notes.yaml]\nname: own  # Table 1\n")
    (tmp_path / "notes.yaml").write_text("# comments alone\n")
    write_origin(run, own, ["seed=4"])
    read = [Path(file["path"]).stem for file in read_origin(run)["files"]]
    assert read == ["own", "demo-scratch", "demo", "base", "notes"]
    text = run_page(gather(run)).html()
    for shown in ("# Table 1", "# the paper&#39;s", "seed=4"):
        assert shown in text


def test_the_published_value_stands_beside_the_result(run):
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    published = {"top1": 88.9, "source": "paper, Table 5", "timm_top1": 88.86, "timm_top5": 98.74, "remark": "<note>"}
    facts = gather(run)
    last = facts.stages[-1]
    last.status.metrics.update(top1=88.5, top5=98.6, loss=0.8)
    facts = dataclasses.replace(facts, recipe={**recipe, "published": published})
    document = run_page(facts)
    table = document.chapters[0].blocks[0]
    assert table.headers == ["stage", "metric", "here", "published", "timm", "difference", "verdict"]
    rows = {(row[0], row[1]): row[2:6] for row in table.rows}
    assert rows["finetune", "top1"] == ["88.50 %", "88.90 %", "88.86 %", "-0.40"]
    assert rows["finetune", "top5"] == ["98.60 %", "", "98.74 %", ""]
    assert rows["pretrain", "loss"] == ["0.5000", "", "", ""]
    assert "paper, Table 5. &lt;note&gt;" in document.html()


def test_runs_of_the_same_name_are_told_apart_and_equal_ones_do_not_differ(run, tmp_path):
    other = tmp_path / "elsewhere" / "run"
    shutil.copytree(run, other)
    facts = [gather(run), gather(other)]
    assert run_labels(facts) == [f"{tmp_path.name}/run", "elsewhere/run"]
    text = comparison_page(facts).html()
    assert "Nothing: every value is the same." in text
    assert "Nothing: code, machine, packages and data are the same." in text


def test_markdown_keeps_a_table_a_table(run):
    stage = run / "pretrain"
    with Journal(stage / "journal.jsonl", 2) as log:
        log.write("event", level="warning", message="a | in\na message", step=12)
    text = run_page(gather(run)).markdown("report_files")
    assert "| pretrain | 12 | a \\| in a message |" in text
    for block in text.split("\n\n"):
        rows = [line for line in block.splitlines() if line.startswith("|")]
        assert len({line.replace("\\|", "").count("|") for line in rows}) <= 1, block


@pytest.mark.parametrize(("images", "size"), [(2, 32), (8, 32), (5, 224)])
def test_a_sheet_fits_the_page_and_keeps_every_image(tmp_path, images, size):
    draw = np.random.default_rng(0)
    pictures = draw.integers(0, 256, (images, 3, size, size), dtype=np.uint8)
    mask = np.zeros((images, 16), bool)
    draw_reconstruction(pictures, mask, {"a": pictures, "b": pictures}, tmp_path / "sheet.png")
    content, columns = sheet(tmp_path / "sheet.png")
    assert columns == 4
    (tmp_path / "shown").write_bytes(content)
    shown, whole = Image.open(tmp_path / "shown"), Image.open(tmp_path / "sheet.png")
    assert len(content) <= LARGEST_BYTES or shown.format == "JPEG"
    assert shown.width >= shown.height
    assert shown.width * shown.height >= 0.5 * whole.width * whole.height or shown.format == "JPEG"


@pytest.mark.parametrize("heights", [[64, 8, 8, 8, 8], [8, 8, 8, 8, 64], [16, 32, 8, 24]])
def test_a_sheet_of_rows_of_different_heights_cuts_between_rows(tmp_path, heights):
    images = [np.full((3, high, 256), 10 * number, np.uint8) for number, high in enumerate(heights, 1)]
    maps = [np.full((high, 256), 255, np.uint8) for high in heights]  # ignored pixels show the image in grey
    draw_label_maps(images, maps, maps, ["a"], tmp_path / "sheet.png")
    content, _ = sheet(tmp_path / "sheet.png")
    whole, shown = (np.asarray(Image.open(file)) for file in (tmp_path / "sheet.png", io.BytesIO(content)))
    for number, high in enumerate(heights, 1):
        rows, columns = np.nonzero((shown == 10 * number).all(-1))
        assert len(rows) == 3 * high * 256
        assert np.ptp(rows) == high - 1, "a row is not cut"
        assert np.ptp(columns) < whole.shape[1]
    assert len(shown) < len(whole)


def test_a_run_on_an_object_store_is_reported_from_a_copy(run, tmp_path, monkeypatch):
    monkeypatch.setenv("FCMAE_MIRROR", str(tmp_path / "mirror"))
    url = "memory://bucket/chain"
    Mirror(run, Folder.at(url)).push()
    out = write_report([url], tmp_path / "page.html", markdown=False, compare=False)
    assert "node1" in out.read_text()
    assert "1 of 3 stages are done" in out.read_text()
