"""`fcmae simulate` on a recipe and a site."""

import json
from pathlib import Path

import yaml
from typer.testing import CliRunner

from tests.support import write_tiny_recipe
from tools.cli import app

STORMS = sorted((Path(__file__).parent / "storms").glob("*.json"))


def simulate(*arguments: object):
    return CliRunner().invoke(app, ["simulate", *map(str, arguments)])


def test_a_chain_on_a_site(tmp_path):
    site = tmp_path / "site.yaml"
    gpu = {"name": "tiny", "memory_gib": 10, "bf16_tflops": 1e-4, "fp32_tflops": 1e-4}
    site.write_text(yaml.safe_dump({"nodes": 1, "gpus_per_node": 2, "gpu": gpu, "time_limit_minutes": 60}))
    one_stage = ["stages.intermediate=null", "stages.finetune=null"]
    arguments = [write_tiny_recipe(tmp_path), *one_stage, "--site", site, "--runs", 3]
    arguments += ["--assume", "failures_per_node_day=50"]
    table = simulate(*arguments, "--times", STORMS[0])
    assert table.exit_code == 0, table.output
    assert "useful time / allocated time of the chain" in table.stdout
    assert "given failures_per_node_day = 50" in table.stdout
    assert "given start_seconds" in table.stdout
    assert "ASSUMED preemptions_per_hour = 0" in table.stdout
    figures = json.loads(simulate(*arguments, "--json").stdout)
    assert 0 < figures["useful_share"] < 1
    assert figures != json.loads(simulate(*arguments, "--json", "--seed", 1).stdout)


def test_a_replay():
    answer = simulate("--replay", STORMS[0], "--replay", STORMS[1])
    assert answer.exit_code == 0
    assert answer.stdout.count("%") == 6


def test_missing_arguments_are_one_sentence():
    assert "needs RECIPE and --site" in str(simulate().exception)
