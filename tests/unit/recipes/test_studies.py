"""Studies: every included arm can be run, and the table says what the runs' files say."""

import json
import statistics

import pytest
import torch
import yaml

from cluster.chain import open_chain
from pipeline.errors import RecipeError, StageError
from pipeline.models import create_model
from tests.support import write_tiny_recipe
from tests.unit.models.tiny_models import multiply_adds
from tools.recipes.library import find_study, included_studies
from tools.study.definition import STUDY_FILE, load_study, refuse_another_study, study_runs, write_study
from tools.study.runs import _prepare as prepare
from tools.study.study_table import (
    ArmResult,
    arm_results,
    open_study,
    study_header,
    study_json,
    study_markdown,
    study_rows,
)


@pytest.mark.parametrize("name", included_studies())
def test_every_arm_is_a_recipe_of_its_own(name):
    study = load_study(find_study(name))
    chains = {arm: study.chain(arm, 0) for arm in study.arms}
    trained = {arm: tuple(stage.fingerprint() for stage in chain.stages.values()) for arm, chain in chains.items()}
    assert len(set(trained.values())) == len(trained), "two arms are the same"
    for arm, chain in chains.items():
        if not study.change and not study.arms[arm].change:
            assert study.arms[arm].published is None, f"{arm}: the recipe says it"
            assert study.published(arm) == (chain.published and chain.published.result)


V1_SIZES = ("Atto", "Femto", "Pico", "Nano", "Tiny", "Base", "Large")


def _with_parameters():
    for name in included_studies():
        study = load_study(find_study(name))
        yield from (
            pytest.param(study, arm, id=f"{name}, {arm}") for arm in study.arms if study.arms[arm].figures.parameters
        )


@pytest.mark.parametrize(("study", "arm"), _with_parameters())
def test_parameters_and_multiply_adds_are_those_of_the_arm(study, arm):
    """Within a digit of what a study prints, because README cuts digits off instead of rounding."""
    *_, stage = study.chain(arm, 0).stages.values()
    with torch.device("meta"):
        model = create_model(stage.model.name, stage.objective.classes, **stage.model.options)
    figures = study.arms[arm].figures
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(figures.parameters, abs=0.1)
    # Published ones of ConvNeXt count norms too, 0.1 % of Huge's.
    counted = multiply_adds(model, stage.data.image_size)
    assert counted == pytest.approx(figures.multiply_adds, abs=0.051, rel=0.002)


@pytest.mark.parametrize("size", [*V1_SIZES, "XLarge"])
def test_figures_of_references_are_those_of_convnext_v1(size):
    own = {"depths": (3, 3, 27, 3), "dims": (256, 512, 1024, 2048)} if size == "XLarge" else {}
    with torch.device("meta"):
        name = "convnextv2" if own else f"convnextv2_{size.lower()}"
        model = create_model(name, response="none", layer_scale=1e-6, **own)
    found = [r for r in load_study(find_study("scaling")).references if r.name.startswith(f"V1 {size},")]
    assert found
    for reference in found:
        parameters = sum(p.numel() for p in model.parameters()) / 1e6
        assert parameters == pytest.approx(reference.figures.parameters, abs=0.01)
        macs = multiply_adds(model, 384 if reference.name.endswith("384") else 224)
        assert macs == pytest.approx(reference.figures.multiply_adds, abs=0.051)


def test_columns_of_other_figures_are_there_if_some_arm_or_reference_has_one(study_file):
    content = yaml.safe_load(study_file.read_text())
    content["arms"]["mixed"]["figures"] = {"tensorrt": 7.7, "miou": 46.5}
    content["references"][0]["figures"] = {"coreml": 0.55}
    study_file.write_text(yaml.safe_dump(content, sort_keys=False))
    study = load_study(study_file)
    header, plain, mixed, rival = study_header(study), *study_rows(study, arm_results(study, study_file.parent))
    assert header[-4:] == ("TensorRT ms", "CoreML ms", "mIoU", "remark")
    assert [row[6:9] for row in (plain, mixed, rival)] == [("", "", ""), ("7.7", "", "46.5"), ("", "0.55", "")]
    assert {len(header), len(plain), len(mixed), len(rival)} == {10}


@pytest.fixture
def study_file(tmp_path):
    recipe = write_tiny_recipe(tmp_path)
    path = tmp_path / "study.yaml"
    arms = {
        "plain": {"published": 50.0},
        "mixed": {"change": {"stages.finetune.objective.mixup": 0.4}, "remark": "more mixing"},
    }
    rival = {"name": "somebody", "top1": 49.0, "source": "a paper"}
    content = {"name": "s", "about": "Does it?", "recipe": str(recipe), "seeds": [0, 1], "arms": arms}
    path.write_text(yaml.safe_dump({**content, "references": [rival]}, sort_keys=False))
    return path


def test_arms_change_the_recipe_and_the_command_line_changes_all(study_file):
    study = load_study(study_file, ["stages.pretrain=null", "seeds=[4]"])
    assert study.seeds == (4,)
    chain = study.chain("mixed", 4)
    assert (chain.name, chain.seed, list(chain.stages)) == ("s-mixed-4", 4, ["intermediate", "finetune"])
    assert chain.stages["finetune"].objective.mixup == 0.4
    assert study.chain("plain", 4).stages["finetune"].objective.mixup == 0.8
    assert list(load_study(study_file, ["arms.mixed=null"]).arms) == ["plain"]
    assert "r-0.5" not in load_study(find_study("nextvit"), ["arms.r-0.5=null"]).arms
    above = load_study(study_file, ["stages.finetune.objective.mixup=0.1"])
    assert above.chain("mixed", 0).stages["finetune"].objective.mixup == 0.1


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"arms": {"a": {"chnage": {}}}}, "unknown key arms.a.chnage; did you mean change"),
        ({"arms": {}}, "arms"),
        ({"seeds": []}, "seeds"),
        ({"seeds": [1, 1]}, "seeds [1, 1] names one twice"),
        ({"change": {"defaults.seed": 3}}, "the recipe's seed is 3 in the run for seed 0, so the runs of all seeds"),
        ({"overrides": ["seed=3"]}, "the recipe's seed is 3 in the run for seed 0, so the runs of all seeds"),
        ({"arms": {"a": {"expected": [2.0, 1.0]}}}, "[2.0, 1.0] is no range"),
        ({"arms": {"a/b": {}}}, "arm 'a/b' may have letters"),
        ({"arms": {"a": {"change": {"stages.pretrain.objective.mask_ratio": 2}}}}, "study s, arm a: "),
        ({"recipe": "nowhere"}, "there is no recipe nowhere"),
        (
            {"change": {"defaults.data.validation": None}},
            "finetune.data.validation is null, so there would be no result",
        ),
    ],
)
def test_a_wrong_study_is_one_sentence(study_file, change, sentence):
    study_file.write_text(yaml.safe_dump({**yaml.safe_load(study_file.read_text()), **change}))

    def first_chain():
        study = load_study(study_file)
        return study.chain(next(iter(study.arms)), 0)

    with pytest.raises(RecipeError) as error:
        first_chain()
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_leaving_out_an_arm_that_there_is_not_is_refused(study_file):
    with pytest.raises(RecipeError, match=r"arms.mixd=null leaves out no arm; the arms are plain, mixed$"):
        load_study(study_file, ["arms.mixd=null"])


def test_a_directory_of_another_study_or_with_a_file_of_a_person_is_refused(study_file, tmp_path):
    study, out = load_study(study_file), tmp_path / "out"
    write_study(study, out / STUDY_FILE)
    other = study.model_copy(update={"name": "other"})
    refuse_another_study(other, out)  # nothing was trained
    (out / "plain" / "seed-0").mkdir(parents=True)
    refuse_another_study(study, out)
    with pytest.raises(StageError, match=r"out holds runs of the study s; choose another directory"):
        refuse_another_study(other, out)
    with pytest.raises(StageError, match=r"holds a study.yaml that no study wrote; choose another directory"):
        refuse_another_study(study, study_file.parent)


def test_two_commands_that_start_at_once_keep_each_others_seeds(study_file, tmp_path):
    for seed in (0, 1):  # neither has trained anything when the other writes the study
        prepare(load_study(study_file, [f"seeds=[{seed}]"]), tmp_path / "out")
    assert open_study(tmp_path / "out").seeds == (1, 0)


def test_a_single_scale_is_not_compared_with_several(tmp_path):
    write_study(load_study(find_study("segmentation")), tmp_path / STUDY_FILE)
    study = open_study(tmp_path)
    assert study.published("fcmae") is None
    result = ArmResult("fcmae", "miou", (50.0,), (0,), 1, None, study.published("fcmae"), "")
    first, *_ = study_rows(study, [result])
    assert first[:5] == ("fcmae", "50.00", "1/1", "52.1 (multi-scale)", "")


def test_the_file_of_a_study_is_replaced_at_once(study_file, tmp_path):
    study, path = load_study(study_file), tmp_path / "out" / STUDY_FILE
    write_study(study, path)
    (tmp_path / "before").hardlink_to(path)
    write_study(study.model_copy(update={"seeds": (7,)}), path)
    assert (load_study(tmp_path / "before").seeds, load_study(path).seeds) == (study.seeds, (7,))


def test_runs_that_a_later_command_leaves_out_stay_in_the_table(study_file, tmp_path):
    path = tmp_path / "out" / STUDY_FILE
    write_study(load_study(study_file), path)
    (path.parent / "plain" / "seed-1").mkdir(parents=True)
    write_study(load_study(study_file, ["arms.plain=null", "seeds=[8]"]), path)
    later = open_study(path.parent)
    assert (list(later.arms), later.seeds, later.published("plain")) == (["mixed", "plain"], (8, 1), 50.0)


def test_the_table_is_made_of_the_results(study_file, tmp_path):
    study, out = load_study(study_file), tmp_path / "out"
    write_study(study, out / STUDY_FILE)
    given = {("plain", 0): 40.0, ("plain", 1): 43.0, ("mixed", 0): 51.5}
    for run in study_runs(study, out):
        stages = open_chain(study.chain(run.arm, run.seed), run.directory)
        value = given.get((run.arm, run.seed))
        for number, stage in enumerate(stages):
            if value is not None:
                result = {"seconds": 60.0 * (number + 1), "metrics": {"top1": value, "loss": 1.0}}
                stage.finish({**result, "weights": "w", "weights_sha256": "0"}, 1)
    again = open_study(out)
    assert again == study
    plain, mixed = arm_results(again, out)
    assert (plain.mean, plain.deviation) == (statistics.fmean([40, 43]), statistics.stdev([40, 43]))
    assert (mixed.mean, mixed.deviation, mixed.results) == (51.5, None, (51.5,))
    assert plain.seconds == 60 + 120 + 180
    lines = study_markdown(again, [plain, mixed]).splitlines()
    assert lines[2] == "| plain | 41.50 ± 2.12 | 2/2 | 50.0 | -8.50 | 6.0 |  |"
    assert lines[3] == "| mixed | 51.50 | 1/2 |  |  | 6.0 | more mixing |"
    assert lines[4] == "| somebody |  |  | 49.0 |  |  | a paper |"
    assert lines[-1] == "| mixed | plain | +11.50 |  | 1 | 1 of 1 |"
    assert json.loads(study_json(again, [plain, mixed]))["arms"][0]["mean"] == 41.5
    assert json.loads(study_json(again, [plain, mixed]))["pairs"][0]["values"] == [11.5]
