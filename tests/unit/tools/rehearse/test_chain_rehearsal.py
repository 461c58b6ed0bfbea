"""`fcmae rehearse`, and what `fcmae submit` makes of a rehearsal."""

import json
import threading

import pytest

from cluster.site import Site
from pipeline.errors import LaunchError
from pipeline.recipe import StageRecipe
from pipeline.rehearsal.stage_rehearsal import rehearse_stage
from tests.engines import stage_recipe
from tools.rehearse import chain_rehearsal
from tools.rehearse.chain_rehearsal import refuse_failing_stages, rehearse_chain
from tools.rehearse.rehearsal_table import rehearsal_json, rehearsal_table
from tools.tables import wide_console


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def recipe(global_batch: int = 1024):
    return stage_recipe("finetune", "fsdp", batch={"global_batch": global_batch, "slot": 2})


def site(memory_gib: float, gpus_per_node: int = 8) -> Site:
    gpu = {"name": "a card", "memory_gib": memory_gib, "bf16_tflops": 1.0, "fp32_tflops": 1.0}
    return Site(nodes=64, gpus_per_node=gpus_per_node, tasks_per_node=8, gpu=gpu)


@pytest.mark.slow
def test_the_first_of_512_ranks_passes_once_and_is_refused_by_a_small_gpu(monkeypatch):
    (result,) = rehearse_chain([recipe()], site(80))
    assert (result["rank"], result["ranks"], result["problem"], result["unknown"]) == (0, 512, "", "")
    assert "passes" in rendered(result)
    assert rehearsal_json([result]).startswith("[")

    def no_process(*arguments, **options):
        raise AssertionError("the result is kept, so no process starts")

    monkeypatch.setattr(chain_rehearsal.subprocess, "run", no_process)
    refuse_failing_stages({"": [recipe()]}, site(80))
    with pytest.raises(LaunchError, match=r"a rank is estimated to need .* and the site's gpu, a card, has 0\.0"):
        refuse_failing_stages({"": [recipe()]}, site(1e-6))


def test_a_host_wait_is_a_note_and_an_odd_file_in_the_cache_is_made_anew(monkeypatch, capsys, tmp_path):
    result = {**chain_rehearsal.UNKNOWN, "stage": "finetune", "engine": "fsdp", "rank": 0, "ranks": 512, "problem": "",
        "unknown": "", "by_formula": False, "slow": "stage finetune: x.py:1 reads a value of the device"}  # fmt: skip
    monkeypatch.setattr(chain_rehearsal, "_rehearsed", lambda request: result)
    refuse_failing_stages({"": [recipe()]}, site(80))
    assert "note: stage finetune: x.py:1 reads a value of the device" in capsys.readouterr().err
    assert "reads a value of the device" in rendered(result)
    (kept,) = tmp_path.rglob("rehearsals/*.json")
    kept.write_text("{}")
    assert rehearse_chain([recipe()], site(80)) == [result]


def rendered(result) -> str:
    console = wide_console()
    with console.capture() as capture:
        console.print(rehearsal_table([result], site(80)))
    return capture.get()


def test_ranks_that_do_not_divide_are_refused_with_the_sentence(monkeypatch):
    def rehearsed_here(request):
        stage = StageRecipe.model_validate_json(request["recipe"])
        return rehearse_stage(stage, **{name: value for name, value in request.items() if name != "recipe"}).facts()

    monkeypatch.setattr(chain_rehearsal, "_rehearsed", rehearsed_here)
    with pytest.raises(LaunchError, match=r"512 processes do not divide the 384 slots.*--no-rehearsal"):
        refuse_failing_stages({"": [recipe(768)]}, site(80))


def test_a_rehearsal_that_breaks_off_is_a_note_and_is_not_kept(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(
        chain_rehearsal, "module_command", lambda module: ["sh", "-c", "echo no fake group here >&2; exit 1"]
    )
    refuse_failing_stages({"": [recipe()]}, site(80))
    assert "note: stage finetune could not be rehearsed: no fake group here" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.json"))
    assert "broke off: no fake group here" in rendered(rehearse_chain([recipe()], site(80))[0])


def test_nothing_is_rehearsed_for_ranks_on_cpus(monkeypatch):
    monkeypatch.setattr(chain_rehearsal, "rehearse_chain", None)
    refuse_failing_stages({"": [recipe()]}, Site(nodes=2))


def test_equal_stages_of_arms_and_seeds_are_rehearsed_once_and_the_arm_that_fails_is_named(monkeypatch):
    played, lock = [], threading.Lock()

    def rehearsed(request):
        made = json.loads(request["recipe"])
        with lock:
            played.append(made["batch"]["global_batch"])
        problem = "too large" if made["batch"]["global_batch"] > 1024 else ""
        facts = {"stage": made["name"], "engine": "fsdp", "rank": 0, "ranks": 512, "problem": problem, "unknown": "",
            "by_formula": False, "slow": "" if problem else "it waits"}  # fmt: skip
        return {**chain_rehearsal.UNKNOWN, **facts}

    monkeypatch.setattr(chain_rehearsal, "_rehearsed", rehearsed)
    arms = {f"plain with seed {seed}: ": [recipe().model_copy(update={"seed": seed})] for seed in range(3)}
    refuse_failing_stages(arms, site(80))
    assert played == [1024]
    with pytest.raises(LaunchError, match=r"^wide with seed 0: too large \(--no-rehearsal"):
        refuse_failing_stages({**arms, "wide with seed 0: ": [recipe(2048)]}, site(80))


def test_notes_of_equal_stages_are_said_once(monkeypatch, capsys):
    result = {**chain_rehearsal.UNKNOWN, "problem": "", "unknown": "no fake group", "stage": "finetune", "slow": ""}
    monkeypatch.setattr(chain_rehearsal, "_rehearsed", lambda request: result)
    refuse_failing_stages({"a: ": [recipe()], "b: ": [recipe(2048)]}, site(80))
    assert capsys.readouterr().err.count("note: a: stage finetune could not be rehearsed: no fake group") == 1
