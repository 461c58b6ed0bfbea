"""What a study will train and cost, each equal stage counted once; ladders; the page."""

import json
import re
import shutil

import pytest
import yaml

from cluster.local import LocalLauncher
from cluster.site import load_site
from pipeline.errors import OffTrackError, RecipeError
from pipeline.recipe import load_recipe
from pipeline.stage.directory import Stage
from pipeline.stage.outcome import Outcome, OutcomeKind
from tests.support import write_tiny_recipe
from tools.estimate.stage_estimate import estimate
from tools.prepare import recipe_data
from tools.recipes.library import find_recipe, find_study
from tools.study.definition import STUDY_FILE, load_study, study_runs, write_study
from tools.study.plan import StudyPlan, dry_run_lines, plan_json, plan_table
from tools.study.runs import checked_chains, run_study
from tools.study.shared_stages import SharedStages
from tools.study.study_estimate import estimate_study, study_cost_json, study_cost_table
from tools.study.study_page import _results as study_page_results
from tools.study.study_page import study_page
from tools.study.study_table import ArmResult
from tools.tables import wide_console

ARMS = {
    "plain": {"published": 50.0},
    "mixed": {"change": {"stages.finetune.objective.mixup": 0.4}},
    "middle": {"change": {"stages.intermediate.objective.mixup": 0.4}},
    "scratch": {"change": {"stages.pretrain": None}},
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return write_tiny_recipe(tmp_path_factory.mktemp("planned"))


@pytest.fixture
def study(tmp_path, recipe):
    return lambda **changes: load_study(_written(tmp_path, recipe, changes))


def _written(tmp_path, recipe, changes):
    content = {"name": "s", "about": "Does it?", "recipe": str(recipe), "seeds": [0, 1], "arms": ARMS, **changes}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return tmp_path / "study.yaml"


def printed(renderable):
    console = wide_console(200)
    with console.capture() as captured:
        console.print(renderable)
    return captured.get()


def test_equal_stages_are_counted_once_for_each_seed(study, tmp_path):
    plan = StudyPlan.of(study(), tmp_path / "out")
    described = {(run.arm, run.seed): plan.describe(run) for run in plan.chains}
    for seed in (0, 1):
        assert described["plain", seed] == "pretrain > intermediate > finetune"
        assert described["mixed", seed] == "pretrain of plain > intermediate of plain > finetune"
        assert described["middle", seed] == "pretrain of plain > intermediate > finetune"
        assert described["scratch", seed] == "intermediate > finetune"
    assert (
        plan.total == "4 arms x 2 seeds = 8 runs with 22 stages, of which 16 are trained and 6 shared with equal ones"
    )
    known = json.loads(plan_json(plan))
    assert (len(known["runs"]), known["stages"], known["trained"]) == (8, 22, 16)
    table = printed(plan_table(plan))
    assert re.search(r"mixed +stages.finetune.objective.mixup=0.4 +pretrain of plain > intermediate of plain", table)
    assert plan.total in table


def test_the_plan_is_what_opening_the_runs_does(study, tmp_path):
    own, out = study(), tmp_path / "out"
    out.mkdir()
    plan, shared = StudyPlan.of(own, out), SharedStages(out)
    directories = [
        stage.directory for run, chain in plan.chains.items() for stage in shared.open_run(chain, run.directory)
    ]
    planned = [stage.owner.directory / stage.recipe.name for stages in plan.stages.values() for stage in stages]
    assert directories == planned
    assert len(set(directories)) == len(plan.trained)


def test_a_dry_run_checks_and_writes_nothing(study, tmp_path):
    own, out = study(), tmp_path / "out"
    lines = dry_run_lines(StudyPlan(own, checked_chains(own, out, 1, dry_run=True)))
    assert lines[1] == "2/8 mixed, seed 0: pretrain of plain > intermediate of plain > finetune"
    assert not out.exists()
    with pytest.raises(RecipeError, match="3 processes"):
        checked_chains(own, out, 3, dry_run=True)


def test_all_arms_are_checked_before_the_images_of_the_first_are_prepared(study, tmp_path, monkeypatch):
    monkeypatch.setattr(recipe_data, "prepared", lambda *_, **__: pytest.fail("images were prepared first"))
    (tmp_path / "photos").mkdir()
    photos = {"defaults.data.train": str(tmp_path / "photos")}
    for change, words in (
        ({"stages.finetune.batch.slot": 7}, "arm last: .* is not a multiple of slot 7"),
        ({"stages.finetune.model.dims": [8, 24]}, "stage finetune could not start from the weights"),
    ):
        own = study(change=photos, arms={"first": {}, "last": {"change": change}})
        with pytest.raises(RecipeError, match=words):
            checked_chains(own, tmp_path / "out", 1)


def test_a_study_costs_what_its_stages_cost_once(study, recipe):
    plan, site = StudyPlan.of(study()), load_site("h100").model_copy(update={"nodes": 1, "gpus_per_node": 2})
    cost = estimate_study(plan, site, nodes=None, images=())
    single = {one.recipe.name: one for one in estimate(load_recipe(recipe), site)}
    assert len(cost.stages) == 16
    pretrain = [own for stage, own in cost.stages if stage.recipe.name == "pretrain"]
    assert [own.gpu_hours for own in pretrain] == [single["pretrain"].gpu_hours] * 2
    assert cost.gpu_hours == pytest.approx(sum(own.gpu_hours for _, own in cost.stages))
    saved = 2 * (2 * single["pretrain"].gpu_hours + single["intermediate"].gpu_hours)
    assert cost.gpu_hours_unshared - cost.gpu_hours == pytest.approx(saved)
    run = next(iter(plan.chains))
    assert cost.run_hours(run) == pytest.approx(sum(one.hours for one in single.values()))
    assert json.loads(study_cost_json(cost, 2.0))["gpu_hours"] == cost.gpu_hours
    assert "if nothing were shared" in printed(study_cost_table(cost, 2.0))


def finish(stage, top1):
    result = {"seconds": 60.0, "metrics": {"top1": top1, "loss": 1.0}, "verdict": {}}
    events = [{"kind": "step", "step": step, "loss": 2.0 / step, "attempt": 1} for step in range(1, 7)]
    events.append({"kind": "evaluate", "step": 6, "metrics": {"top1": top1}, "attempt": 1})
    (stage.directory / "journal.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    stage.finish({**result, "weights": "w", "weights_sha256": "0"}, 6)


def trained(monkeypatch, top1):
    """Make launched stages finish at once with these results; the list of what was launched."""
    launched = []

    def run(self, directory):
        launched.append("/".join(directory.parts[-3:]))
        finish(Stage(directory), top1[len(launched) - 1] if isinstance(top1, list) else top1)
        return Outcome(OutcomeKind.DONE, step=6)

    monkeypatch.setattr(LocalLauncher, "run", run)
    return launched


def test_a_ladder_stops_at_the_rung_that_misses_its_band(study, tmp_path, monkeypatch):
    arms = {
        "low": {"expected": [60.0, 70.0]},
        "high": {**ARMS["mixed"], "expected": [70.0, 80.0]},
        "top": ARMS["middle"],
    }
    only = {"stages.pretrain": None, "stages.intermediate": None}
    arms["top"] = {"change": {"stages.finetune.objective.mixup": 0.6}}
    own = study(arms=arms, ladder=True, seeds=[0], change=only)
    gate = own.chain("low", 0).stages["finetune"].gate
    assert (gate.metric, gate.at_least, gate.at_most, gate.published, gate.stop) == ("top1", 60.0, 70.0, None, True)
    launched, lines = trained(monkeypatch, [65.0, 81.0, 75.0]), []
    with pytest.raises(OffTrackError, match="top1 is 81, the recipe asks for at least 70 and at most 80"):
        run_study(own, tmp_path / "out", 1, lines.append)
    assert launched == ["low/seed-0/finetune", "high/seed-0/finetune"]
    with pytest.raises(OffTrackError):
        run_study(own, tmp_path / "out", 1, lines.append)
    assert len(launched) == 2, "nothing is trained again, and the third rung has not begun"
    open_arms = {name: {**arm, "expected": [0.0, 100.0]} for name, arm in arms.items()}
    wider = study(arms=open_arms, ladder=True, seeds=[0], change=only)
    assert run_study(wider, tmp_path / "out", 1, lines.append).kind is OutcomeKind.DONE
    assert launched[2:] == ["top/seed-0/finetune"]


def test_a_rung_may_have_no_band_of_top1_in_pretraining(study):
    own = study(arms={"a": {"change": {"stages.finetune": None, "stages.intermediate": None}, "expected": [1.0, 2.0]}})
    with pytest.raises(RecipeError, match="expected is a band of top-1, but stage pretrain is pre-training"):
        own.chain("a", 0)


def test_the_included_ladder_is_judged_by_published_values():
    ladder = load_study(find_study("ladder"))
    assert ladder.ladder
    for arm in ("atto", "base"):
        low, high = ladder.arms[arm].expected
        assert (low + high) / 2 == pytest.approx(ladder.published(arm))
    chains = {arm: ladder.chain(arm, 0) for arm in ladder.arms}
    shown = printed(plan_table(StudyPlan.of(ladder)))
    assert "Every arm, unless it names another recipe: convnextv2/huge." in shown
    assert all([*chain.stages.values()][-1].gate.stop for chain in chains.values())
    tenth, huge = chains["huge-160-epochs"].stages["pretrain"], load_recipe(find_recipe("convnextv2/huge"))
    whole = huge.stages["pretrain"].schedule
    assert (10 * tenth.schedule.epochs, 10 * tenth.schedule.warmup_epochs) == (whole.epochs, whole.warmup_epochs)


def test_a_shared_stage_is_trained_once_and_a_failed_one_tried_once(study, tmp_path, monkeypatch):
    launched = trained(monkeypatch, 50.0)
    own = study(seeds=[0])
    assert run_study(own, tmp_path / "out", 1, lambda line: None).kind is OutcomeKind.DONE
    assert launched == [
        "plain/seed-0/pretrain",
        "plain/seed-0/intermediate",
        "plain/seed-0/finetune",
        "mixed/seed-0/finetune",
        "middle/seed-0/intermediate",
        "middle/seed-0/finetune",
        "scratch/seed-0/intermediate",
        "scratch/seed-0/finetune",
    ]
    failures = []
    monkeypatch.setattr(LocalLauncher, "run", lambda self, directory: failures.append(directory) or Outcome(
        OutcomeKind.PERMANENT, "broken"))  # fmt: skip
    outcome = run_study(study(seeds=[7]), tmp_path / "out", 1, lambda line: None)
    assert outcome.kind is OutcomeKind.PERMANENT
    assert outcome.reason.count("broken") == 4
    assert [path.name for path in failures] == ["pretrain", "intermediate"], "plain's and scratch's"


def test_runs_that_others_remove_or_make_anew_meanwhile_fail_and_are_not_waited_for(study, tmp_path, monkeypatch):
    own, out = study(seeds=[0], arms={"scratch": ARMS["scratch"], **ARMS}), tmp_path / "out"
    launched = trained(monkeypatch, 50.0)
    train = LocalLauncher.run

    def disturbed(self, directory):
        if not launched:
            other = load_recipe(own.origin("plain", 0)[0], ["stages.pretrain.objective.mask_ratio=0.3", "name=other"])
            SharedStages(out).open_run(other, out / "plain" / "seed-0")
        return train(self, directory)

    monkeypatch.setattr(LocalLauncher, "run", disturbed)
    monkeypatch.setattr("tools.study.runs.LOOK_AGAIN_SECONDS", -1)  # which sleep() refuses
    reason = run_study(own, out, 1, lambda line: None).reason
    assert launched == ["scratch/seed-0/intermediate", "scratch/seed-0/finetune"]
    assert reason.count("plain/seed-0/pretrain anew with another recipe; the same command trains this run's own") == 3
    shutil.rmtree(out / "plain")
    monkeypatch.setattr(LocalLauncher, "run", lambda self, directory: shutil.rmtree(out / "plain") or Outcome(
        OutcomeKind.PERMANENT, "broken"))  # fmt: skip
    reason = run_study(own, out, 1, lambda line: None).reason
    assert "mixed with seed 0: " in reason
    assert "plain/seed-0/pretrain was removed meanwhile; the same command trains it anew" in reason


def test_the_page_has_the_numbers_of_the_runs(study, tmp_path):
    own, out = study(), tmp_path / "out"
    write_study(own, out / STUDY_FILE)
    shared, given = SharedStages(out), {("plain", 0): 40.0, ("plain", 1): 43.0, ("mixed", 0): 51.5}
    for run in study_runs(own, out):
        for stage in shared.open_run(own.chain(run.arm, run.seed), run.directory):
            if (run.arm, run.seed) in given and not stage.done():
                finish(stage, given[run.arm, run.seed])
    page = study_page(out)
    assert [chapter.title for chapter in page.chapters] == [
        "Results", "Stage pretrain", "Stage intermediate", "Stage finetune",
    ]  # fmt: skip
    text = page.markdown("files")
    assert "| plain | 41.50 ± 2.12 | 2/2 | 50.0 | -8.50 |" in text
    assert "| mixed | plain | +11.50 |  | 1 | 1 of 1 |" in text
    assert "3 of 8 runs are done" in text
    assert "| mixed | 0 | intermediate | plain/seed-0 |" in text
    assert page.chapters == study_page(out).chapters, "the same runs give the same page"


def test_arms_with_other_metrics_are_not_drawn_on_one_axis(study):
    top1 = ArmResult("plain", "top1", (50.0,), (0,), 1, None, None, "")
    loss = ArmResult("mixed", "loss", (0.4,), (0,), 1, None, None, "")
    picture, table, *_ = study_page_results(study(seeds=[0]), [top1, loss])
    assert ">plain<" in picture.content
    assert ">mixed<" not in picture.content
    assert [row[:2] for row in table.rows] == [("plain", "50.00"), ("mixed", "0.4000")]
