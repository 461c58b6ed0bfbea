"""Judge journals: every check fails where it must, and events that do not count change nothing."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import OffTrackError, RecipeError
from pipeline.health.verdict import Verdict, judge_journal, loss_at, refuse_off_track, update_verdict
from pipeline.recipe import StageRecipe, load_recipe
from pipeline.recipe.yaml_files import parse_settings
from pipeline.stage.directory import Stage
from pipeline.stage.outcome import exit_code
from pipeline.tracking.journal import Journal, strict_json
from tests.support import make_tiny_run, write_tiny_recipe
from tests.unit.recipe.test_detection_settings import SMALL

STEPS, CLASSES, CELL = 60, 4, 4
GREY = 1 - 1 / (3 * CELL**2)


@pytest.fixture(scope="module")
def recipes(tmp_path_factory) -> dict[str, StageRecipe]:
    return load_recipe(write_tiny_recipe(tmp_path_factory.mktemp("recipe"))).stages


def gated(recipe: StageRecipe, **gate: object) -> StageRecipe:
    return recipe.model_copy(update={"gate": type(recipe.gate).model_validate(gate)})


def history(losses: list[float], refused: tuple[int, ...] = (), **metrics: float) -> list[dict]:
    """The events of one attempt, with an evaluation at the end if there are metrics."""
    events: list[dict] = [
        {"kind": "attempt", "step": 0, "total_steps": len(losses)},
        {"kind": "data", "validation": {"images": 1000}},
    ]
    for step, loss in enumerate(losses, 1):
        events.append({"kind": "step", "step": step, "loss": loss, **({"refused": True} if step in refused else {})})
    return [*events, {"kind": "evaluate", "step": len(losses), "metrics": metrics}] if metrics else events


def falling(first: float, last: float, steps: int = STEPS) -> list[float]:
    return [last + (first - last) * math.exp(-5 * step / steps) for step in range(steps)]


def failed(verdict: Verdict) -> list[str]:
    return [check.name for check in verdict.checks if check.passed is False]


def test_sound_stages_are_on_track(recipes):
    assert judge_journal(recipes["pretrain"], history(falling(0.98, 0.6), loss=0.63)).sentence == "on track"
    verdict = judge_journal(recipes["finetune"], history(falling(1.4, 0.9), top1=60.0, loss=1.0))
    assert verdict.on_track
    assert all(check.detail for check in verdict.checks)


def test_a_detector_must_find_objects():
    recipe = parse_settings(StageRecipe, SMALL, "it")
    for value, expected in ((0.0, ["finds objects"]), (3.5, [])):
        verdict = judge_journal(recipe, history(falling(3.0, 1.0), box_ap=value))
        assert failed(verdict) == expected
    assert failed(judge_journal(gated(recipe, metric="box_ap", at_least=4.0), history([], box_ap=3.5))) == ["gate"]


@pytest.mark.parametrize(
    ("stage", "losses", "refused", "metrics", "name"),
    [
        ("pretrain", falling(0.6, 0.98), (), {"loss": 0.7}, "loss falls"),
        ("pretrain", [*falling(0.98, 0.3, 50), *[0.9] * 10], (), {"loss": 0.7}, "loss falls"),
        ("finetune", [*falling(1.4, 0.9)[:-1], math.nan], (), {"top1": 60.0, "loss": 1.0}, "loss falls"),
        ("pretrain", falling(0.98, 0.6), (5, 9), {"loss": 0.63}, "steps made"),
        ("pretrain", falling(1.1, 0.99), (), {"loss": GREY}, "better than grey"),
        ("pretrain", falling(0.98, 0.5), (), {"loss": 0.8}, "validation near training"),
        ("finetune", falling(1.4, 0.9), (), {"top1": 28.0, "loss": 1.0}, "better than guessing"),
        ("finetune", falling(1.4, 0.9), (), {"top1": 60.0, "loss": 1.5}, "validation near training"),
    ],
)
def test_what_no_sound_training_does_is_seen(recipes, stage, losses, refused, metrics, name):
    verdict = judge_journal(recipes[stage], history(losses, refused, **metrics))
    assert failed(verdict) == [name]
    assert verdict.sentence.startswith("off track, look here: ")


def test_cells_of_one_channel_have_fewer_values(recipes):
    recipe = recipes["pretrain"]
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"in_channels": 1})})
    painted = history(falling(1.1, 0.95), loss=1 - 1 / CELL**2)
    assert failed(judge_journal(recipe, painted)) == ["better than grey"]


def test_more_than_one_rollback_is_off_track_and_left_out_steps_count(recipes):
    sound = history(falling(0.98, 0.6, 400), loss=0.63)
    left_out = [e for e in sound if not (e["kind"] == "step" and 100 < e["step"] <= 103)]
    once, twice = ({"kind": "rollback", "step": 0, "rollbacks": n} for n in (1, 2))
    assert judge_journal(recipes["pretrain"], [once, *left_out]).on_track
    assert failed(judge_journal(recipes["pretrain"], [twice, *left_out])) == ["steps made"]
    many = [e for e in sound if not (e["kind"] == "step" and 100 < e["step"] <= 105)]
    assert failed(judge_journal(recipes["pretrain"], many)) == ["steps made"]


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_a_stage_that_made_no_step_is_off_track(recipes, stage):
    """The last rollback leaves all of its steps out, so that no line of a step is kept."""
    events = history([math.nan] * 12, tuple(range(1, 13)), loss=math.nan)
    back = {"kind": "rollback", "step": 0, "rollbacks": 1}
    verdict = judge_journal(recipes[stage], [*events[:-1], back, events[-1]])
    assert "steps made" in failed(verdict)
    assert "12 of 12 steps were skipped" in verdict.sentence


def test_the_best_evaluation_is_remembered(recipes):
    events = history(falling(1.4, 0.9), top1=60.0, loss=1.0)
    for best, expected in ((66.0, ["validation near training"]), (62.0, [])):  # 1000 images may lose 4.6 by chance
        better = {"kind": "evaluate", "step": 30, "metrics": {"top1": best, "loss": 1.0}}
        assert failed(judge_journal(recipes["finetune"], [*events[:-1], better, events[-1]])) == expected


@pytest.mark.parametrize("images", [6, 53, 54, 1000])
def test_few_validation_images_say_nothing_against_a_classifier(recipes, images):
    """Of four classes 54 images tell guessing from halfway to 100 %."""

    def verdict_on(top1: float, loss: float = 1.0) -> Verdict:
        held_out = {"kind": "data", "validation": {"images": images}}
        return judge_journal(recipes["finetune"], [*history(falling(1.4, 0.9), top1=top1, loss=loss), held_out])

    few = images < 54
    for top1, loss, name in ((25.0, 1.0, "better than guessing"), (99.0, 1.5, "validation near training")):
        check = next(check for check in verdict_on(top1, loss).checks if check.name == name)
        assert check.passed is (None if few else False)
        assert (f"only {images} images" in check.detail) is few
    guessing = next(check for check in verdict_on(25.0).checks if check.name == "better than guessing")
    assert guessing.detail.startswith("top-1 is 25.00 %; guessing has 25.00 %, ")
    assert ("54 or more" if few else f"% of {images:,} images") in guessing.detail
    assert verdict_on(100.0).checks[2].passed, "chance does not reach 100 % with six images either"


def test_the_verdict_on_images_of_published_size_is_that_of_three_deviations(recipes):
    objective = recipes["finetune"].objective.model_copy(update={"classes": 1000})
    recipe = recipes["finetune"].model_copy(update={"objective": objective})
    held_out = {"kind": "data", "validation": {"images": 50_000}}
    bound = 100 * (0.001 + 3 * math.sqrt(0.001 * 0.999 / 50_000))
    for top1 in (bound - 0.002, bound + 0.002):
        verdict = judge_journal(recipe, [*history(falling(7.0, 3.0), top1=top1, loss=3.0), held_out])
        assert failed(verdict) == ([] if top1 > bound else ["better than guessing"])
    best = {"kind": "evaluate", "step": 30, "metrics": {"top1": 61.1, "loss": 3.0}}
    fallen = [
        held_out,
        *history(falling(7.0, 3.0))[2:],
        best,
        {"kind": "evaluate", "metrics": {"top1": 60.0, "loss": 3}},
    ]
    assert failed(judge_journal(recipe, fallen)) == ["validation near training"]


def test_published_values_and_reference_curves(recipes):
    events = history(falling(1.4, 0.9), top1=60.0, loss=1.0)
    made = {event["step"]: event["loss"] for event in events if event["kind"] == "step"}
    assert judge_journal(gated(recipes["finetune"], published=60.4), events).on_track
    assert failed(judge_journal(gated(recipes["finetune"], published=60.6), events)) == ["published value"]
    curve = {"loss_at": {20: loss_at(made, 20), STEPS: loss_at(made, STEPS) * 1.04}, "loss_within": 0.05}
    assert judge_journal(gated(recipes["finetune"], **curve, of_steps=STEPS), events).on_track
    tighter = {**curve, "loss_within": 0.03}
    assert failed(judge_journal(gated(recipes["finetune"], **tighter, of_steps=STEPS), events)) == ["reference curve"]
    other_length = judge_journal(gated(recipes["finetune"], **tighter, of_steps=STEPS + 1), events)
    assert other_length.on_track
    assert any("this run has 60" in check.detail for check in other_length.checks)


@settings(max_examples=60, deadline=None)
@given(
    losses=st.lists(st.floats(0, 10) | st.sampled_from([math.nan, math.inf]), max_size=50),
    more=st.lists(st.floats(0, 10), max_size=10),
    at=st.integers(0, 50),
    top1=st.floats(0, 100),
    bounds=st.tuples(st.floats(0, 100), st.floats(0, 100)),
)
def test_properties(recipes, losses, more, at, top1, bounds):
    recipe = recipes["finetune"]
    events = history(losses, top1=top1, loss=1.0)
    verdict = judge_journal(recipe, events)
    json.dumps(strict_json(verdict.entry()), allow_nan=False)
    # Withdrawn events change nothing.
    start = min(at, len(losses))
    lost = [{"kind": "step", "step": start + i, "loss": loss} for i, loss in enumerate(more, 1)]
    kept = [e for e in events if e.get("step", 0) <= start]
    rewound = [*kept, *lost, {"kind": "attempt", "step": start, "total_steps": len(losses)}]
    rest = [e for e in events if e.get("step", 0) > start]
    assert judge_journal(recipe, [*rewound, *rest]).entry() == verdict.entry()
    # A lower bound never turns a pass into a failure.
    low, high = sorted(bounds)
    asks = [gated(recipe, metric="top1", at_least=bound) for bound in (low, high)]
    easy, hard = (judge_journal(recipe, events).on_track for recipe in asks)
    assert easy or not hard


def finished(run: Path, name: str, events: list[dict]) -> Stage:
    """A finished stage directory with these events in its journal."""
    stage = Stage(run / name)
    with Journal(stage.directory / "journal.jsonl", 1) as log:
        for event in events:
            log.write(**event)
    stage.finish({"weights": "w", "weights_sha256": "0", "verdict": judge_journal(stage.recipe, events).entry()}, STEPS)
    return stage


def test_a_chain_ends_only_where_the_recipe_says_so_and_goes_on_after_a_change(tmp_path):
    from cluster.chain import open_chain

    run = make_tiny_run(tmp_path, ["stages.pretrain.gate.stop=true"])
    stage = finished(run, "pretrain", history(falling(0.98, 0.9), loss=GREY))
    with pytest.raises(
        OffTrackError, match=r"stage pretrain is off track, look here: .*pretrain.gate.stop=false"
    ) as refused:
        refuse_off_track(stage)
    assert exit_code(refused.value) == 77
    open_chain(load_recipe(tmp_path / "tiny.yaml", ["stages.pretrain.gate.stop=false"]), run)
    refuse_off_track(Stage(run / "pretrain"))


def test_changed_bounds_change_the_verdict_in_the_result(tmp_path):
    run = make_tiny_run(tmp_path)
    stage = finished(run, "finetune", history(falling(1.4, 0.9), top1=60.0, loss=1.0))
    assert stage.result()["verdict"]["on_track"]
    stage.recipe = gated(stage.recipe, metric="top1", at_least=61.0)
    update_verdict(stage)
    assert stage.result()["verdict"]["sentence"] == "off track, look here: top1 is 60, the recipe asks for at least 61"


def test_a_slurm_job_of_a_stage_that_ends_the_chain_has_failed(tmp_path, capsys):
    from cluster.slurm.job_history import read_job_history
    from cluster.slurm.supervisor import conclude

    run = make_tiny_run(tmp_path, ["stages.finetune.gate.stop=true"])
    stage = finished(run, "finetune", history(falling(1.4, 0.9), top1=20.0, loss=1.0))
    assert conclude(stage, 0, "7", 3) == 1
    assert "stage finetune is off track" in capsys.readouterr().out
    assert read_job_history(stage.directory)[-1]["event"] == "stopped"


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("stages.pretrain.gate={metric: top1, at_least: 1.0}", "gate.metric is top1; pre-training is judged by loss"),
        ("stages.finetune.gate={at_least: 1.0}", "metric None needs at_least or at_most"),
        ("stages.finetune.gate={metric: top1}", "metric top1 needs at_least or at_most"),
        ("stages.finetune.gate={loss_at: {5: 1.0}}", "loss_at needs of_steps"),
        ("stages.finetune.gate={least: 1.0}", "did you mean at_least"),
    ],
)
def test_wrong_gates_are_one_sentence(tmp_path, override, sentence):
    with pytest.raises(RecipeError, match=sentence):
        write_tiny_recipe(tmp_path, [override])
