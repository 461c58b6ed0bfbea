"""The latency bench measures our models, timm's, and the arms of a study, beside the published latencies."""

import pytest
import torch

from pipeline.errors import UserError
from tests.oracles import oracle
from tools.bench.export_latency import (
    COLUMNS,
    MODELS,
    MOST_DIFFERENCE,
    ExportedModel,
    named_models,
    published_latencies,
)
from tools.recipes.library import find_recipe, find_study
from tools.study.definition import load_study


def test_a_study_gives_a_model_for_each_arm():
    study = load_study(find_study("nextvit-blocks"))
    arms = list(named_models("study:nextvit-blocks"))
    assert [arm.name for arm in arms] == list(study.arms)
    for arm in arms:
        with torch.device("meta"):
            parameters = sum(p.numel() for p in arm.create(224).parameters())
        assert parameters / 1e6 == pytest.approx(study.arms[arm.name].figures.parameters, abs=0.1)


def test_published_latencies_are_of_models_that_can_be_measured():
    timm = oracle("timm", always_in_ci=True)
    known = published_latencies()
    assert known["nextvit_small", 224]["tensorrt"] == 7.7
    for name, size in known:
        if name.startswith("timm:"):
            assert timm.is_model(name.removeprefix("timm:")), name
        elif name.startswith("nextvit"):
            published = find_recipe(name.replace("nextvit_", "nextvit/") + ("-384" if size == 384 else ""))
            assert f"top1: {known[name, size]['top1']}" in published.read_text()
    for name in (name.removeprefix("timm:") for name in MODELS if name.startswith("timm:")):
        assert timm.is_model(name), name


def test_a_network_that_enlarges_rounding_may_differ_by_a_hundredth_at_most():
    model = ExportedModel.__new__(ExportedModel)
    model.name, model.rounding = "odd", 1.0
    model.difference = MOST_DIFFERENCE
    model.check_difference()
    for model.difference in (0.0101, float("nan")):
        with pytest.raises(UserError, match="odd in onnxruntime differs from torch"):
            model.check_difference()


@pytest.mark.slow
@pytest.mark.parametrize("words", ["nextvit_small block=local_attention", "timm:twins_svt_small", "timm:resnet10t"])
def test_onnxruntime_computes_what_torch_does(words, tmp_path):
    oracle("timm", always_in_ci=True)
    (candidate,) = named_models(words)
    model = ExportedModel(candidate, 64, 1, tmp_path)  # refuses a difference
    row = model.row(1, {"onnxruntime": 0.002, "torch": 0.003}, {"onnxruntime": 0.001}, 1)
    assert len(row) == len(COLUMNS)
    assert row[COLUMNS.index("x the first")] == "2.00"
