"""A stage whose compiled code is wrong on one rank trains by plain torch on all ranks, and says so once."""

import pytest

from pipeline.engines.plain_comparison import TOLERANCE
from pipeline.stage.outcome import OutcomeKind
from tests.multiprocess.test_health import events
from tests.processes import run_stage
from tests.support import make_tiny_run

COMPILED = ["stages.pretrain=null", "stages.intermediate=null", "stages.finetune.schedule.epochs=1"]


@pytest.mark.parametrize(
    ("engine", "fault"),
    [
        ("ddp", 0.01),
        pytest.param("fsdp", 0.01, marks=pytest.mark.slow),
        pytest.param("ddp", 1e-9, marks=pytest.mark.slow),
    ],
)
def test_all_ranks_fall_back_if_one_computes_wrongly(tmp_path, engine, fault):
    kind = [f"defaults.engine={{kind: {engine}, compile: true}}"]
    stage = make_tiny_run(tmp_path, COMPILED + kind) / "finetune"
    assert run_stage(stage, 2, {"miscompile": fault, "rank": 1}).kind is OutcomeKind.DONE
    found = events(stage)
    [check] = [event for event in found if event["kind"] == "code_check"]
    warnings = [event["message"] for event in found if event.get("level") == "warning"]
    wrong = fault > 1e-3
    assert (check["compiled"], check["fallback"], check["tolerance"]) == (True, wrong, TOLERANCE)
    assert (check["largest_error"] > TOLERANCE) == wrong
    if wrong:
        assert check["rank"] == 1
        [warning] = warnings
        assert warning.startswith("the compiled blocks differ from plain torch on rank 1: the error of ")
    else:
        assert warnings == []
    [started] = [event for event in found if event["kind"] == "started"]
    assert "compare" in started["laps"]
