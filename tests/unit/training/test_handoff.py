"""A stage starts from foreign weights, or from a model with another normalisation; every tensor is accounted for."""

import shutil

import pytest
import torch

from pipeline.distributed.world import World
from pipeline.engines import create_engine
from pipeline.errors import CheckpointError, RecipeError, StageError
from pipeline.models import create_model
from pipeline.models.fcmae import FCMAE
from pipeline.models.segmenter import HeadOptions, create_segmenter
from pipeline.objectives import create_objective
from pipeline.recipe import load_recipe, write_recipe
from pipeline.stage.directory import Done, Stage
from pipeline.training import handoff
from pipeline.weights.safetensors_file import write_weights
from tests.support import write_tiny_recipe
from tools.recipes.library import find_recipe
from tools.weights.convert import convert
from tools.weights.model import build_model

CLASSES = ("a", "b", "c", "d")
FOUR_STAGES = [  # timm builds no others
    "defaults.model.depths=[1,1,1,1]", "defaults.model.dims=[8,16,24,32]", "defaults.model.stem_stride=4",
    "defaults.data.image_size=64", "stages.finetune.data.image_size=64",
]  # fmt: skip
FILES = {"official": "weights.pth", "timm": "weights.safetensors", "transformers": "weights.bin"}


@pytest.fixture
def begin(tmp_path, world):
    """Make a stage by name, with its engine and objective, at its initial weights."""

    def make(name, *overrides):
        recipe = load_recipe(write_tiny_recipe(tmp_path), [*FOUR_STAGES, *overrides]).stages[name]
        shutil.rmtree(tmp_path / "run" / name, ignore_errors=True)
        stage = Stage.create(tmp_path / "run" / name, recipe)
        objective = create_objective(recipe, seed=5)
        return stage, create_engine(objective.build_model, recipe, world), objective

    return make


@pytest.fixture
def pretrained(begin, tmp_path):
    """A file of FCMAE weights, and its tensors; no tensor has the initial value of any model."""
    stage, engine, _ = begin("pretrain")
    with torch.no_grad():
        for number, tensor in enumerate(engine.items().values()):
            tensor.add_(0.001 * (number + 1))
    handoff.hand_on(stage, engine, 1, CLASSES)
    path = (stage.directory / "weights.safetensors").rename(tmp_path / "pretrained.safetensors")
    return path, {name: tensor.clone() for name, tensor in engine.items().items()}


@pytest.mark.parametrize("layout", ["ours", "official", "timm", "transformers"])
def test_an_encoder_from_any_layout_starts_a_classifier(begin, pretrained, tmp_path, layout):
    path, expected = pretrained
    if layout != "ours":
        path, ours = tmp_path / FILES[layout], path
        convert(ours, path, layout, head="drop")
    stage, engine, objective = begin("intermediate", "stages.pretrain=null", f"init={path}")
    before = {name: tensor.clone() for name, tensor in engine.items().items()}
    received = handoff.receive(stage, engine, objective, CLASSES)
    assert stage.recipe.previous is None
    fresh = {name for name in before if name.startswith(("norm.", "head."))}
    assert set(received.transfer.initialised) == fresh
    for name, tensor in engine.items().items():
        assert torch.equal(tensor, before[name] if name in fresh else expected[f"encoder.{name}"]), name


def test_an_encoder_goes_back_into_pre_training_with_a_new_decoder(begin, pretrained, tmp_path):
    path, expected = pretrained
    encoder = tmp_path / "encoder.pth"
    convert(path, encoder, "official", head="drop")
    stage, engine, objective = begin("pretrain", f"init={encoder}")
    before = {name: tensor.clone() for name, tensor in engine.items().items()}
    received = handoff.receive(stage, engine, objective, CLASSES)
    for name, tensor in engine.items().items():
        loaded = name.startswith("encoder.")
        assert torch.equal(tensor, expected[name] if loaded else before[name])
        assert (name in received.transfer.initialised) != loaded


def test_other_weights_under_the_same_name_are_refused(begin, pretrained, tmp_path):
    path = tmp_path / "weights.safetensors"
    convert(pretrained[0], path, "timm", head="drop")
    stage, engine, objective = begin("intermediate", f"init={path}", "stages.pretrain=null")
    first = handoff.receive(stage, engine, objective, CLASSES)
    assert handoff.receive(stage, engine, objective, CLASSES).sha256 == first.sha256
    shutil.copy(pretrained[0], path)  # the same encoder in another file is another file
    with pytest.raises(CheckpointError, match=r"started with init.weights of sha256 .* give it the same weights"):
        handoff.receive(stage, engine, objective, CLASSES)


def test_weights_of_another_shape_are_one_sentence(begin, pretrained):
    path, _ = pretrained
    change = ["stages.intermediate.model.dims=[8,32,24,32]", "stages.pretrain=null", f"init={path}"]
    stage, engine, objective = begin("intermediate", *change)
    with pytest.raises(CheckpointError, match=r"is \(16,\) in the weights and \(32,\) in the model"):
        handoff.receive(stage, engine, objective, CLASSES)


def test_weights_of_another_number_of_channels_are_one_sentence_or_adapted(begin, pretrained):
    path, expected = pretrained
    grey = ["stages.pretrain=null", f"init={path}", "defaults.model.in_channels=1"]
    stage, engine, objective = begin("intermediate", *grey)
    with pytest.raises(CheckpointError, match=r"images of 3 channels, and the model takes 1; .* init.channels sum, or"):
        handoff.receive(stage, engine, objective, CLASSES)
    stage, engine, objective = begin("intermediate", *grey, "stages.intermediate.init.channels=sum")
    handoff.receive(stage, engine, objective, CLASSES)
    stem = "downsample_layers.0.0.weight"
    assert torch.equal(engine.items()[stem], expected[f"encoder.{stem}"].sum(1, keepdim=True))


def test_a_kept_head_is_of_the_same_classes_in_the_same_order(begin, tmp_path):
    stage, engine, _ = begin("intermediate", "stages.pretrain=null")
    handoff.hand_on(stage, engine, 1, CLASSES)
    path = (stage.directory / "weights.safetensors").rename(tmp_path / "classifier.safetensors")
    stage, engine, objective = begin(
        "intermediate", "stages.pretrain=null", f"init={path}", "stages.intermediate.init.head=keep"
    )
    assert not handoff.receive(stage, engine, objective, CLASSES).transfer.initialised
    for classes, says in ((("a", "c", "b", "d"), "class 1 'b' and the data have 'c'"), (CLASSES[:3], "4 .* have 3;")):
        with pytest.raises(CheckpointError, match=rf"keep, but the head of .* has {says}.* set init.head to map"):
            handoff.receive(stage, engine, objective, classes)
    drawn = begin("intermediate", "stages.pretrain=null", f"init={path}")
    assert handoff.receive(*drawn, CLASSES[::-1]).transfer.initialised


def test_a_head_cannot_be_mapped_from_weights_without_class_names(begin, pretrained):
    path, _ = pretrained
    change = ["stages.pretrain=null", f"init={path}", "stages.intermediate.init.head=map"]
    stage, engine, objective = begin("intermediate", *change)
    with pytest.raises(CheckpointError, match="does not name its classes"):
        handoff.receive(stage, engine, objective, CLASSES)


@pytest.mark.parametrize("new", ["none", "ln"])
def test_grn_is_exchanged_only_when_asked_for(begin, pretrained, new):
    path, expected = pretrained
    change = [f"stages.intermediate.model.response={new}", "stages.pretrain=null", f"init={path}"]
    stage, engine, objective = begin("intermediate", *change)
    with pytest.raises(CheckpointError, match=r"grn\.(beta|gamma)"):
        handoff.receive(stage, engine, objective, CLASSES)
    stage, engine, objective = begin("intermediate", *change, "stages.intermediate.init.response=new")
    received = handoff.receive(stage, engine, objective, CLASSES)
    assert {name for name in received.transfer.dropped if ".grn." in name and "decoder" not in name} == {
        name.removeprefix("encoder.") for name in expected if ".grn." in name and "decoder" not in name
    }
    assert any(".response." in name for name in received.transfer.initialised) == (new == "ln")
    kept = "stages.0.0.pwconv1.weight"
    assert torch.equal(engine.items()[kept], expected[f"encoder.{kept}"])


def test_a_path_with_a_variable_that_is_not_set_is_one_sentence(tmp_path, monkeypatch):
    from cluster.chain import resolve_paths

    monkeypatch.delenv("NOWHERE", raising=False)
    monkeypatch.setenv("SOMEWHERE", str(tmp_path))
    stage = load_recipe(write_tiny_recipe(tmp_path), ["defaults.data.train=$SOMEWHERE/train.beton"]).stages["finetune"]
    assert resolve_paths(stage).data.train == f"{tmp_path}/train.beton"
    stage = load_recipe(write_tiny_recipe(tmp_path), ["defaults.data.train=$NOWHERE/train.beton"]).stages["finetune"]
    with pytest.raises(RecipeError, match=r"\$NOWHERE is not set; export it, or give stages.finetune.data.train=PATH"):
        resolve_paths(stage)


def test_a_run_or_stage_stands_for_its_weights_once_it_is_finished(tmp_path):
    from cluster.chain import check_weights, resolve_paths

    run, other = tmp_path / "runs" / "nextvit", tmp_path / "other"
    write_recipe(load_recipe(write_tiny_recipe(tmp_path)), ensured(run) / "recipe.yaml")

    def resolved(place):
        change = ["stages.pretrain=null", f"init={place}"]
        return resolve_paths(load_recipe(write_tiny_recipe(tmp_path), change).stages["intermediate"])

    for name in ("pretrain", "intermediate"):  # the last stage is missing
        (ensured(run / name) / "DONE").write_text('{"weights": "w.safetensors", "weights_sha256": "0", "step": 1}')
    with pytest.raises(CheckpointError, match=f"{run} is a directory, and neither a finished stage nor a run whose"):
        check_weights(resolved(run), other)
    assert resolved(run / "pretrain").init.weights == f"{run}/pretrain/w.safetensors"
    (run / "pretrain" / "DONE").rename(ensured(run / "finetune") / "DONE")
    assert resolved(run).init.weights == f"{run}/finetune/w.safetensors"


def ensured(folder):
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def test_a_classifier_starts_from_a_segmenters_backbone_alone(begin, tmp_path):
    head = HeadOptions(3, channels=8, auxiliary_channels=0)
    segmenter = create_segmenter("convnextv2", head, depths=(1, 1, 1, 1), dims=(8, 16, 24, 32), seed=9).state_dict()
    whole, backbone = tmp_path / "segmenter.pth", tmp_path / "backbone.safetensors"
    torch.save({"state_dict": segmenter}, whole)
    stage, engine, objective = begin("intermediate", "stages.pretrain=null", f"init={whole}")
    with pytest.raises(CheckpointError, match=r"holds a model for segmentation; `fcmae convert .* --head drop` writes"):
        handoff.receive(stage, engine, objective, CLASSES)
    convert(whole, backbone, "official", head="drop")
    stage, engine, objective = begin("intermediate", "stages.pretrain=null", f"init={backbone}")
    received = handoff.receive(stage, engine, objective, CLASSES)
    for name in received.transfer.loaded:
        assert torch.equal(engine.items()[name], segmenter[f"backbone.{name}"])
    with pytest.raises(CheckpointError, match="holds a model for segmentation"):
        build_model(segmenter)


def test_rank_zero_says_whether_the_stage_before_is_done(begin, monkeypatch):
    """Another node may not see its marker yet, as over NFS, where a look at an absent file is remembered."""
    before, engine, _ = begin("pretrain")
    weights = handoff.hand_on(before, engine, 1, CLASSES)
    stage, engine, objective = begin("intermediate")
    with pytest.raises(StageError, match="starts from pretrain, which is not done"):
        handoff.receive(stage, engine, objective, CLASSES)
    done = Done(weights["weights"], weights["weights_sha256"], 1)
    monkeypatch.setattr(World, "on_main", lambda world, work: done)
    assert handoff.receive(stage, engine, objective, CLASSES).sha256 == done.weights_sha256


@pytest.mark.parametrize(
    ("changes", "fits"),
    [
        (["finetune.init.head=keep"], True),
        (["finetune.init.head=keep", "finetune.objective.classes=3"], False),
        (["finetune.init.head=map", "finetune.objective.classes=3"], True),
        (["finetune.model.response=ln", "finetune.init.response=new"], True),
        (["finetune.model.response=ln"], False),
        (["finetune.model.in_channels=1", "finetune.init.channels=sum"], True),
    ],
)
def test_a_handoff_is_checked_before_there_are_weights(tmp_path, changes, fits):
    stages = load_recipe(write_tiny_recipe(tmp_path), [f"stages.{change}" for change in changes]).stages
    handoff.check_handoff(stages["pretrain"], stages["intermediate"])
    if fits:
        handoff.check_handoff(stages["intermediate"], stages["finetune"])
        return
    with pytest.raises(RecipeError, match=r"finetune could not start from the weights of stage intermediate: .* and "):
        handoff.check_handoff(stages["intermediate"], stages["finetune"])


def test_weights_of_another_model_are_named_when_the_run_starts(tmp_path):
    """A run that was to train a Tiny from the weights of an Atto failed on its ranks, naming a bias of 40 channels."""
    from cluster.chain import check_weights

    atto = FCMAE(create_model("convnextv2_atto", num_classes=0), decoder_dim=16, decoder_depth=1).state_dict()
    ours, foreign = tmp_path / "ours.safetensors", tmp_path / "atto.pt"
    write_weights(ours, atto, {"objective": "fcmae"})
    convert(ours, foreign, "official", head="drop")

    def check(weights, *overrides):
        stage = load_recipe(find_recipe("segment-own"), [f"init={weights}", *overrides]).stages["segment"]
        check_weights(stage, tmp_path / "run")

    for path in (ours, foreign):
        with pytest.raises(CheckpointError) as refused:
            check(path)
        assert str(refused.value).endswith(
            f"{path} holds weights of convnextv2_atto, and the stage's model is convnextv2_tiny; set"
            " stages.segment.model.name=convnextv2_atto, or start from other weights"
        )
        check(path, "stages.segment.model.name=convnextv2_atto")
    with pytest.raises(CheckpointError, match="weights have no head for segmentation"):
        check(ours, "stages.segment.init.head=keep")
    ours.write_bytes(ours.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="is cut short or damaged"):
        check(ours)
