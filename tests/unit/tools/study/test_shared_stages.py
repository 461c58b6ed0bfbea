"""Equal stages of several runs: one run owns each, the others link to it, whatever happened to the owner."""

import json
import multiprocessing
import shutil
from pathlib import Path

import pytest

from cluster.chain import open_chain
from cluster.site import Site
from cluster.slurm.script import JobScript
from cluster.slurm.submit import cancel_jobs, live_jobs, plan_jobs
from pipeline.data.beton import open_beton
from pipeline.errors import RecipeError
from pipeline.recipe import load_recipe
from pipeline.recipe.sections import GateSettings
from pipeline.recipe.settings_base import operational
from pipeline.stage.directory import Stage
from pipeline.storage.file_names import DATA_FILE, DONE_FILE, SHARED_FILE
from tests.support import tiny_data, write_tiny_recipe
from tools.study import shared_stages
from tools.study.shared_stages import CLAIMS_FOLDER, SharedStages, owner_of, stage_key

STAGES = ("pretrain", "intermediate", "finetune")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return write_tiny_recipe(tmp_path_factory.mktemp("shared"))


@pytest.fixture
def study(tmp_path):
    (tmp_path / "study").mkdir()
    return tmp_path / "study"


def opened(study: Path, arm: str, recipe: Path, *overrides: str) -> Path:
    """The run directory of an arm, opened as a command of its own would."""
    run = study / arm
    stages = SharedStages(study).open_run(load_recipe(recipe, overrides), run)
    assert [stage.recipe.name for stage in stages] == list(STAGES)
    assert [stage.directory for stage in stages] == [(run / name).resolve() for name in STAGES]
    assert all(before == after.previous().directory for before, after in zip(
        [stage.directory for stage in stages], stages[1:], strict=False) if not owner_of(run / after.recipe.name)
    )  # fmt: skip
    return run


def owners(run: Path) -> list[str | None]:
    """The arm that owns each stage of a run; None is the run itself."""
    return [owner.name if (owner := owner_of(run / name)) else None for name in STAGES]


def begin(stage: Path) -> None:
    """Leave a stage as it is after a first attempt that saved and was stopped."""
    (stage / "journal.jsonl").write_text(json.dumps({"kind": "step", "step": 1, "attempt": 1, "loss": 1.0}) + "\n")


def test_what_is_equal_is_shared_and_what_follows_another_stage_is_not(study, recipe):
    first = opened(study, "first", recipe)
    assert owners(first) == [None] * 3
    assert owners(opened(study, "same", recipe)) == ["first"] * 3
    assert owners(opened(study, "mixed", recipe, "stages.finetune.objective.mixup=0.1")) == ["first", "first", None]
    assert owners(opened(study, "middle", recipe, "stages.intermediate.objective.mixup=0.1")) == ["first", None, None]
    for change in ("seed=4", "stages.pretrain.engine.kind=fsdp", "stages.pretrain.gate.stop=true"):
        assert owners(opened(study, change.replace(".", "-"), recipe, change)) == [None] * 3, change
    assert owners(opened(study, "first", recipe)) == [None] * 3
    begin(first / "pretrain")
    more = opened(study, "same", recipe, "stages.pretrain.checkpoint.every_steps=3")
    assert owners(more) == ["first"] * 3
    assert Stage(first / "pretrain").recipe.checkpoint.every_steps == 3, "operational changes reach the owner's stage"


def test_a_default_that_a_later_version_changes_makes_another_stage(recipe):
    class LaterGate(GateSettings):
        published_within: float = operational(0.7)

    stage = load_recipe(recipe).stages["pretrain"]
    later = stage.model_copy(update={"gate": LaterGate()})
    assert stage_key(stage, {}, None) != stage_key(later, {}, None)
    assert stage_key(stage, {}, None) == stage_key(stage.model_copy(update={"gate": GateSettings()}), {}, None)


def test_values_that_a_fingerprint_leaves_out_make_another_stage(recipe):
    def keys(*changes):
        stages = load_recipe(recipe, ["stages.pretrain.data.normalize=measured", *changes]).stages
        return [stage_key(stages[name], {}, "before") for name in ("pretrain", "intermediate")]

    plain = keys()
    assert keys("stages.pretrain.objective.encoder_backend=masked")[0] != plain[0], "arms may compare encoders"
    assert keys("stages.intermediate.data.normalize=imagenet")[1] != plain[1], "null is what was measured before"


def test_a_stage_that_this_user_may_not_write_is_shared_once_it_is_done(study, recipe, monkeypatch):
    first = opened(study, "first", recipe)
    monkeypatch.setattr(shared_stages, "may_write", lambda stage: stage.parent != first)  # root may write everywhere
    assert owners(opened(study, "early", recipe)) == [None] * 3
    Stage(first / "pretrain").finish({"metrics": {"loss": 1.0}, "weights": "w", "weights_sha256": "0"}, 1)
    assert owners(opened(study, "late", recipe)) == ["first", None, None]


def test_data_count_by_content_and_not_by_path(study, recipe, tmp_path):
    opened(study, "first", recipe)
    shutil.copytree(recipe.parent / "data", tmp_path / "moved")
    tiny_data(tmp_path / "other", train=160)
    moved, other = ([f"defaults.data.{n}={tmp_path / d / f'{n}.beton'}" for n in ("train", "validation")]
                    for d in ("moved", "other"))  # fmt: skip
    assert owners(opened(study, "moved", recipe, *moved)) == ["first"] * 3
    assert owners(opened(study, "other", recipe, *other)) == [None] * 3


def test_studies_in_one_folder_share_and_others_do_not(study, recipe, tmp_path):
    opened(study, "first", recipe)
    (tmp_path / "second").mkdir()
    (tmp_path / "elsewhere" / "study").mkdir(parents=True)
    assert owners(opened(tmp_path / "second", "arm", recipe)) == ["first"] * 3
    assert owners(opened(tmp_path / "elsewhere" / "study", "arm", recipe)) == [None] * 3


def test_a_folder_moves_with_its_links(study, recipe, tmp_path):
    opened(study, "first", recipe)
    opened(study, "same", recipe)
    shutil.move(study, tmp_path / "renamed")
    assert Stage(tmp_path / "renamed" / "same" / "pretrain").directory == tmp_path / "renamed" / "first" / "pretrain"


def _open_at_once(barrier, study, arm, recipe):
    barrier.wait()
    opened(study, arm, recipe)


def test_of_many_commands_at_once_one_owns_each_stage(study, recipe):
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(8)
    commands = [context.Process(target=_open_at_once, args=(barrier, study, f"arm-{i}", recipe)) for i in range(8)]
    for command in commands:
        command.start()
    for command in commands:
        command.join(400)
    assert [command.exitcode for command in commands] == [0] * 8
    for name in STAGES:
        directories = {(study / f"arm-{i}" / name).resolve() for i in range(8)}
        assert len(directories) == 1, f"{name} has {len(directories)} owners"
        assert (directories.pop() / SHARED_FILE).exists()
    assert len(list((study.parent / CLAIMS_FOLDER).iterdir())) == 3


def test_a_deleted_owner_is_replaced(study, recipe):
    first = opened(study, "first", recipe)
    same = opened(study, "same", recipe)
    shutil.rmtree(first)
    assert owners(opened(study, "same", recipe)) == [None] * 3
    assert owners(opened(study, "first", recipe)) == ["same"] * 3
    assert {claim.name[-2:] for claim in (study.parent / CLAIMS_FOLDER).iterdir()} == {"-1", "-2"}
    assert not (same / "pretrain").is_symlink()


def test_an_owner_that_changed_before_it_began_is_replaced(study, recipe):
    opened(study, "first", recipe)
    opened(study, "same", recipe)
    assert owners(opened(study, "first", recipe, "seed=8")) == [None] * 3
    assert owners(opened(study, "same", recipe)) == [None] * 3
    assert Stage(study / "same" / "pretrain").recipe.seed == 3
    assert Stage(study / "first" / "pretrain").recipe.seed == 8


def test_an_owner_that_began_with_another_recipe_is_left(study, recipe):
    first, same = opened(study, "first", recipe), opened(study, "same", recipe)
    opened(study, "first", recipe, "seed=8")
    begin(first / "pretrain")
    assert owner_of(same / "pretrain") == first.resolve()
    assert owners(opened(study, "same", recipe)) == [None] * 3
    assert [Stage(arm / "pretrain").recipe.seed for arm in (first, same)] == [8, 3]


def test_changing_a_run_that_never_began_removes_its_links_and_nothing_of_the_owner(study, recipe):
    first, same = opened(study, "first", recipe), opened(study, "same", recipe)
    before = {path: path.read_bytes() for path in first.rglob("*") if path.is_file()}
    assert owners(opened(study, "same", recipe, "seed=8")) == [None] * 3
    assert {path: path.read_bytes() for path in first.rglob("*") if path.is_file()} == before
    assert Stage(same / "pretrain").recipe.seed == 8


def test_what_has_begun_stays_where_it_is(study, recipe):
    first, same = opened(study, "first", recipe), opened(study, "same", recipe)
    begin(first / "pretrain")
    assert owners(opened(study, "same", recipe, "stages.pretrain.engine.kind=fsdp"))[0] == "first"
    with pytest.raises(RecipeError, match="started with another recipe"):
        opened(study, "same", recipe, "seed=8")
    assert owner_of(same / "pretrain") == first.resolve()


def test_runs_of_earlier_versions_keep_their_stages_and_others_link_to_them(study, recipe):
    chain = load_recipe(recipe)
    hashes = {name: open_beton(recipe.parent / "data" / f"{name}.beton").sha256 for name in ("train", "validation")}
    for arm, data in (("old-1", hashes), ("old-2", hashes), ("old-data", {**hashes, "train": "0" * 64})):
        open_chain(chain, study / arm)
        begin(study / arm / "pretrain")
        (study / arm / "pretrain" / DATA_FILE).write_text(json.dumps(data))
    for arm in ("old-data", "old-1", "old-2"):
        assert owners(opened(study, arm, recipe))[0] is None
    assert owners(opened(study, "new", recipe))[0] == "old-1"


def test_foreign_weights_count_by_content(study, recipe, tmp_path):
    def start(name: str, content: bytes) -> str:
        path = tmp_path / name
        path.write_bytes(content)
        return f"stages.pretrain.init={{start: file, weights: {path}}}"

    opened(study, "a", recipe, start("a.pth", b"one"))
    assert owners(opened(study, "b", recipe, start("b.pth", b"one")))[0] == "a"
    assert owners(opened(study, "c", recipe, start("c.pth", b"two")))[0] is None
    assert owners(opened(study, "d", recipe))[0] is None


def test_jobs_of_a_shared_stage_are_the_owners(study, recipe, monkeypatch):
    first, same = opened(study, "first", recipe), opened(study, "same", recipe, "stages.finetune.objective.mixup=0.1")
    planned = plan_jobs(load_recipe(same / "recipe.yaml"), same, Site(), ask_slurm=False)
    assert [stage.directory.parent.name for stage in planned] == ["first", "first", "same"]
    (first / "pretrain" / DONE_FILE).write_text(json.dumps({"weights": "w", "weights_sha256": "0", "step": 1}))
    planned = plan_jobs(load_recipe(same / "recipe.yaml"), same, Site(), ask_slurm=False)
    assert [stage.done for stage in planned] == [True, False, False]
    listed = []
    monkeypatch.setattr("cluster.slurm.client.query_jobs", lambda stages: listed.append(list(stages)) or [])
    cancel_jobs(same, list(STAGES))
    assert listed == [[same.resolve() / "finetune"]], "the owner's jobs go on"
    live_jobs(same, list(STAGES))
    assert listed[1:] == [[first / "pretrain", first / "intermediate", same / "finetune"]]
    assert live_jobs(same, []) == []
    assert listed[2:] == [], "without a stage Slurm would list everybody's jobs"


def test_a_container_sees_the_owner_of_the_stage_before(study, recipe):
    first, same = opened(study, "first", recipe), opened(study, "same", recipe, "stages.finetune.objective.mixup=0.1")
    site = Site.model_validate({"container": {"kind": "apptainer", "image": "/x.sif", "python": "python3"}})
    text = JobScript(same / "finetune", site, same / "code").text()
    assert f"--bind={same}:{same}" in text
    assert f"--bind={first}:{first}" in text


def test_a_folder_that_may_not_be_written_is_no_obstacle(study, recipe, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: study in Path(path).parents)
    opened(study, "first", recipe)
    assert owners(opened(study, "same", recipe)) == ["first"] * 3
    assert (study / CLAIMS_FOLDER).is_dir()
