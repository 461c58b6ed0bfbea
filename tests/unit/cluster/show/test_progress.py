"""The display fed by real files, with and without a terminal."""

import io
import os
from pathlib import Path

import pytest
from rich.console import Console

from cluster.show import progress
from cluster.show.progress import Progress, event_sentence
from pipeline.distributed.processes import start_time as process_start_time
from pipeline.storage.folder import write_json
from pipeline.tracking.journal import Journal
from tests.support import mark_done


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TERM", "xterm")  # a dumb terminal is not redrawn
    (tmp_path / "recipe.yaml").write_text("name: tiny\nstages: {pretrain: {}, finetune: {}}\n")
    return tmp_path


def open_stage(stage: Path, attempt: int) -> Journal:
    (stage / "attempts").mkdir(parents=True, exist_ok=True)
    owner = {"host": os.uname().nodename, "pid": os.getpid(), "pid_start_time": process_start_time(os.getpid())}
    write_json(stage / "attempts" / f"{attempt:06d}.json", {"attempt": attempt, **owner})
    return Journal(stage / "journal.jsonl", attempt)


def finish(stage: Path, **metrics: float) -> None:
    stage.mkdir(exist_ok=True)
    write_json(stage / "result.json", {"steps": 10, "metrics": metrics, "weights_sha256": "c0ffee" * 11})
    mark_done(stage)


def console(terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=80, legacy_windows=False)


def text(shown: Console) -> str:
    assert isinstance(shown.file, io.StringIO)
    return shown.file.getvalue()


def test_plain_lines_tell_what_happens_and_no_more(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 3600)
    shown = console(terminal=False)
    with Progress(run, shown) as display:
        display.update()
        assert text(shown) == ""
        journal = open_stage(run / "pretrain", 1)
        journal.write("attempt", step=0, total_steps=10, world_size=2)
        for step in range(1, 11):
            journal.write("step", step=step, loss=0.5, images_per_second=640.0)
            display.update()  # ten updates at once: one line, since no more than some seconds pass
        journal.write("save", step=10, seconds=0.25, why="end", path="x")
        journal.write("evaluate", step=10, metrics={"loss": 0.4321, "strange": "text"})
        journal.write("event", level="warning", message="[red]no markup[/] here [")
        with journal.path.open("ab") as file:
            file.write(b'[1, 2]\nrubbish\n{"kind": 7}\n{"kind": "save", "seconds": "long"}\n{}\n')
        journal.write("end", outcome="done", reason="all steps", step=10)
        finish(run / "pretrain", loss=0.4321)
        display.update()
        display.update()
    lines = text(shown).splitlines()
    assert lines[0] == "pretrain: started, attempt 1, world size 2"
    assert lines[1] == "pretrain: step 1/10  loss 0.5", "the first step's time is no speed"
    assert lines[2:] == [
        "pretrain: saved step 10 in 0.2 s (end)",
        "pretrain: evaluation at step 10: loss 0.4321",
        "pretrain: warning: [red]no markup[/] here [",
        "pretrain: saved step None",
        "pretrain: done, loss 0.4321, 10 steps, weights c0ffeec0ffee",
    ]


def test_a_slow_run_shows_its_speed_and_time_after_two_steps_and_on_a_cpu_what_shortens_it(run, monkeypatch):
    monkeypatch.setattr(progress, "LINE_SECONDS", 0)
    shown = console(terminal=False)
    with Progress(run, shown) as display:
        journal = open_stage(run / "finetune", 1)
        journal.write("attempt", step=0, total_steps=4000, world_size=1, global_batch=16, device="cpu")
        for step, (seconds, ended) in enumerate(((200, 0), (32, 32), (32, 64), (32, 96)), 1):
            journal.write("step", step=step, loss=1.2, images_per_second=16 / seconds, time=1e9 + ended)
            display.update()
    assert text(shown).splitlines() == [
        "finetune: started, attempt 1, world size 1",
        "finetune: step 1/4,000  loss 1.2",
        "finetune: step 2/4,000  loss 1.2  0.5 images/s  ETA 1d 11h",
        "finetune: a CPU needs 1d 11h for this stage. Faster: a GPU, a smaller model (such as --model atto; in a recipe"
        " defaults.model.name=convnextv2_atto), fewer epochs (--epochs; schedule.epochs)",
        "finetune: step 3/4,000  loss 1.2  0.5 images/s  ETA 1d 11h",
        "finetune: step 4/4,000  loss 1.2  0.5 images/s  ETA 1d 11h",
    ]


def test_a_resume_begins_in_the_middle(run: Path) -> None:
    finish(run / "pretrain", loss=0.4)
    with open_stage(run / "finetune", 1) as journal:
        journal.write("attempt", step=0, total_steps=10)
        for step in range(1, 8):
            journal.write("step", step=step, loss=1.0)
    shown = console(terminal=False)
    with Progress(run, shown) as display, open_stage(run / "finetune", 2) as journal:
        journal.write("attempt", step=5, total_steps=10, world_size=1)
        journal.write("step", step=6, loss=0.9)
        display.update()
        journal.write("end", outcome="saved", reason="SIGTERM", step=6)
    assert text(shown).splitlines() == [
        "pretrain: done before, loss 0.4000, 10 steps, weights c0ffeec0ffee",
        "finetune: resumed at step 5, attempt 2, world size 1",
        "finetune: step 6/10  loss 0.9",
        "finetune: saved at step 6: SIGTERM",
    ]


def test_an_end_without_a_step_names_none() -> None:
    end = {"kind": "end", "outcome": "permanent", "reason": "too many rollbacks", "step": None}
    assert event_sentence(end, terse=False) == "permanent: too many rollbacks"
    assert event_sentence(end | {"step": 0}, terse=False) == "permanent at step 0: too many rollbacks"


def test_a_terminal_gets_one_row_per_stage(run: Path) -> None:
    shown = console(terminal=True)
    with Progress(run, shown) as display:
        with open_stage(run / "pretrain", 1) as journal:
            journal.write("attempt", step=0, total_steps=10, world_size=1)
            journal.write("step", step=4, loss=0.625, images_per_second=1234.0)
            journal.write("event", level="warning", message="slow disk")
            display.update()
        finish(run / "pretrain", top1=61.5)
    last = text(shown)[text(shown).rindex("stage") :]
    assert "pretrain: warning: slow disk" in text(shown)
    assert "1,234" in text(shown)
    assert "4/10" in text(shown)
    assert "top1 61.50 %" in last
    assert "waiting" in last
    assert "…" not in last, "80 columns are enough"


def test_a_broken_display_never_raises(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(run, console(terminal=False)) as display:
        open_stage(run / "pretrain", 1).close()
        (run / "pretrain" / "journal.jsonl").unlink()
        (run / "pretrain" / "journal.jsonl").mkdir()
        display.update()
        display.update()
    assert capsys.readouterr().err.count("journal.jsonl cannot be read") == 1


def test_parts_of_a_backbone_are_told_from_all_of_it():
    names = ["auxiliary_head.conv_seg.bias", "backbone.norm0.weight", "backbone.norm0.bias", "temperature"]
    event = {"kind": "handoff", "step": 0, "loaded": 196, "initialised": names, "dropped": ["head.weight"]}
    parts = "initialised: auxiliary_head.*, backbone.norm0.*, temperature; dropped: head.*"
    assert progress.event_sentence(event, terse=False) == f"initial weights: 196 tensors loaded; {parts}"
