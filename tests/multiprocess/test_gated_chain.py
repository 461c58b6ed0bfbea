"""A chain that its gate ends, goes on after a change, and is told about: verdicts and reports of real runs."""

import html.parser
import json
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from cluster.show.status import RunFollower
from pipeline.errors import OffTrackError, StageError
from pipeline.stage.directory import Stage
from pipeline.tracking import journal
from pipeline.training.handoff import receive
from tests.support import fcmae, write_tiny_recipe
from tools.report import write_report

SHORT = ["stages.finetune=null", "defaults.evaluation.every_epochs=100"]


@pytest.fixture(scope="module")
def chain(tmp_path_factory) -> tuple[Path, Path, subprocess.CompletedProcess]:
    """A recipe whose first stage cannot reach what its gate asks for, its run, and what the command said."""
    directory = tmp_path_factory.mktemp("gated")
    recipe = write_tiny_recipe(directory)
    gate = "stages.pretrain.gate={metric: loss, at_most: 0.5, stop: true}"
    return recipe, directory / "run", fcmae("run", recipe, "--out", directory / "run", *SHORT, gate)


def test_an_off_track_stage_ends_the_chain_if_the_recipe_says_so(chain):
    _, run, said = chain
    assert said.returncode == 77
    assert re.search(r"^fcmae: stage pretrain is off track, look here: .*the recipe asks for at most 0.5", said.stderr)
    assert "Traceback" not in said.stderr
    assert Stage(run / "pretrain").done()
    assert Stage(run / "intermediate").attempts.newest() == 0
    verdict = Stage(run / "pretrain").result()["verdict"]
    lines = [e for e in journal.read_events(run / "pretrain" / "journal.jsonl") if e["kind"] == "verdict"]
    assert [line["sentence"] for line in lines] == [verdict["sentence"]]
    assert [s.on_track for s in RunFollower(run).statuses()] == [False, None]


def test_the_next_stage_refuses_by_itself_to_start(chain):
    """Whoever started it: a scheduler's dependency is a hint."""
    alone = SimpleNamespace(on_main=lambda work: work())
    with pytest.raises(OffTrackError, match=r"pretrain.gate.stop=false"):
        receive(Stage(chain[1] / "intermediate"), SimpleNamespace(world=alone), None, ())


class Page(html.parser.HTMLParser):
    """What a page refers to, whether its tags are closed, and its text."""

    VOID = ("meta", "img", "link", "br")

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)
        self.references += [value for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_a_report_of_an_unfinished_run_is_one_page_of_its_own(chain):
    run = chain[1]
    said = fcmae("report", run)
    assert said.stdout == f"{run}/report.html is written\n", said.stderr
    text = (run / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    assert "<script" not in text
    assert all(re.match(r"data:image/(png|jpeg);base64,|#", reference) for reference in page.references)
    assert not re.findall(r"url\((?!#)", text)  # an SVG refers to its own clip paths only
    assert any(reference.startswith("data:image/png") for reference in page.references)
    words = " ".join(" ".join(page.words).split())
    sha = Stage(run / "pretrain").directory / "data.json"
    for expected in (
        "1 of 2 stages are done",
        "off track, look here",
        "the recipe asks for at most 0.5",
        "no loss curve of FCMAE, or of fine-tuning on ImageNet-22K, has been published",
        json.loads(sha.read_text())["train"],
        "stages.pretrain.gate={metric: loss, at_most: 0.5, stop: true}",
        "core-hours",
        "git commit",
    ):
        assert expected in words


@pytest.mark.slow
def test_the_same_command_with_the_gate_open_goes_on_and_runs_are_compared(chain, tmp_path):
    recipe, run, _ = chain
    ended = tmp_path / "ended"
    shutil.copytree(run, ended)
    said = fcmae("run", recipe, "--out", run, *SHORT, "stages.pretrain.gate={metric: loss, at_most: 0.5}")
    assert said.returncode == 0, said.stderr
    assert Stage(run / "intermediate").done()
    write_report([str(ended), str(run)], tmp_path / "both.html", markdown=False, compare=True)
    words = " ".join(" ".join(Page((tmp_path / "both.html").read_text()).words).split())
    assert "pretrain.gate.stop True False" in words
    write_report([str(run)], tmp_path / "page.md", markdown=True, compare=False)
    markdown = (tmp_path / "page.md").read_text()
    linked = re.findall(r"!\[[^]]*\]\(([^)]+)\)", markdown)
    assert linked
    assert all((tmp_path / name).stat().st_size > 1000 for name in linked)
    assert re.search(r"^\| intermediate \| top1 \| \d+\.\d\d % \|", markdown, re.M)


@pytest.mark.parametrize(
    ("runs", "out", "compare", "sentence"),
    [
        (["{empty}"], None, False, "is no run directory"),
        (["{run}", "{run}"], None, False, "2 runs were given: a report is of one"),
        (["{run}"], None, True, "1 run was given: a report is of one"),
        (["{run}"], Path("/proc/nowhere/report.html"), False, "cannot be written"),
    ],
)
def test_wrong_calls_are_one_sentence(chain, tmp_path, runs, out, compare, sentence):
    given = [run.format(empty=tmp_path, run=chain[1]) for run in runs]
    with pytest.raises(StageError, match=sentence):
        write_report(given, out, markdown=False, compare=compare)
