"""The utilisation of GPUs: the operations of a step, counted in another process, and the peaks of GPUs."""

import time
from pathlib import Path

import pytest
import torch
from rich.console import Console

from cluster.show.status import StageFollower
from cluster.show.status_table import run_table
from pipeline.cost.gpu_peaks import peak_flops
from pipeline.cost.step_flops import flops_per_image
from pipeline.cost.trace import trace_step
from pipeline.distributed.world import World
from pipeline.engines import StepReport
from pipeline.stage.attempts import Attempts
from pipeline.stage.directory import Stage
from pipeline.tracking.forwarder import metrics_of
from pipeline.tracking.journal import read_events
from pipeline.tracking.step_log import StepLog
from pipeline.tracking.utilisation import Utilisation, counted_utilisation
from tests.support import make_tiny_run, open_journal

PEAK = 1e9


@pytest.mark.parametrize(
    ("gpu", "precision", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA H200", "fp32", 67),
        ("NVIDIA A100-SXM4-80GB", "bf16_parameters", 312),
        ("NVIDIA L40S", "bf16", 362),
    ],
)
def test_peaks_by_the_names_that_torch_gives(gpu, precision, tflops):
    assert peak_flops(gpu, precision) == tflops * 1e12


@pytest.mark.parametrize(
    ("gpu", "precision"),
    [("NVIDIA L400", "bf16"), ("NVIDIA H100", "fp64"), ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16"), ("", "bf16")],
)
def test_an_unknown_peak_is_none(gpu, precision):
    assert peak_flops(gpu, precision) is None


@pytest.fixture
def stage(tmp_path) -> Path:
    return make_tiny_run(tmp_path) / "pretrain"


def wait(used: Utilisation) -> None:
    deadline = time.monotonic() + 120
    while used._counting.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_operations_are_those_of_the_trace(stage):
    recipe = Stage(stage).recipe
    assert flops_per_image(recipe) == pytest.approx(2 * trace_step(recipe, "cuda").training_macs)
    again = recipe.model_copy(update={"model": recipe.model.model_copy(update={"checkpointing": True})})
    assert trace_step(again, "cuda").training_macs > trace_step(recipe, "cuda").training_macs
    assert flops_per_image(again) == flops_per_image(recipe)


def test_from_the_counted_step_to_journal_status_and_mlflow(stage):
    flops = 1234567.5
    Attempts(stage, None).claim(1)
    report = StepReport(*(torch.tensor(value) for value in (1.0, 2.0, True)))
    notes: list[str] = []
    used = Utilisation(["echo", str(flops)], PEAK, notes.append)
    with open_journal(stage) as journal:
        log = StepLog(journal, World.alone().sum, 1, 32, utilisation=used)
        log.write("attempt", step=0, total_steps=9, global_batch=32)
        wait(used)
        for step in (1, 2):  # the first step's time is no speed
            log.add(step, report, 0.1)
            log.flush()
    assert notes == []
    event = read_events(stage / "journal.jsonl")[-1]
    assert event["utilisation"] == pytest.approx(event["images_per_second"] * flops / PEAK, rel=1e-3, abs=1e-4)
    assert ("utilisation", event["utilisation"]) in metrics_of(event)[1]
    follower = StageFollower(stage)
    follower.poll()
    status = follower.status()
    assert status.utilisation == pytest.approx(event["utilisation"])
    console = Console(width=200)
    with console.capture() as text:
        console.print(run_table([status]))
    assert "of peak" in text.get()


def test_a_count_that_fails_is_a_note(tmp_path):
    notes: list[str] = []
    used = Utilisation(["cat", str(tmp_path / "absent")], PEAK, notes.append)
    wait(used)
    assert used.of(100.0) is None is used.of(100.0)
    (note,) = notes
    assert note.startswith(f"counting the step's operations failed (cat: {tmp_path}/absent: No such file")
    used.close()


def test_nothing_is_counted_on_a_cpu(stage):
    with open_journal(stage) as journal, counted_utilisation(Stage(stage), World.alone(), journal) as used:
        assert used is None
    assert read_events(stage / "journal.jsonl") == []
