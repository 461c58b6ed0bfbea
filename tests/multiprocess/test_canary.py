"""A secret that a user has put somewhere is found nowhere else: in no file, command line, MLflow store or page.

Where a secret cannot stay secret the command refuses it in one sentence and leaves nothing behind. Secrets in the
environment are for the libraries alone.
"""

import os
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from pipeline.distributed.processes import module_command
from tests.support import fcmae, write_tiny_recipe

CANARY = "canary7f3a9c"
IN_ENVIRONMENT = {
    name: f"{CANARY}-{name.lower()}"
    for name in (
        "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "MLFLOW_TRACKING_USERNAME",
        "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "HF_TOKEN", "AZURE_STORAGE_CONNECTION_STRING",
        "FSSPEC_SFTP_PASSWORD",
    )
}  # fmt: skip
URL = f"https://me:{CANARY}@127.0.0.1:9"
ONE_STAGE = ("stages.pretrain=null", "stages.finetune=null")
RUN = ("run", "tiny.yaml", "--out", "out")
SUBMIT = ("submit", "tiny.yaml", "--out", "out", "--site")


@contextmanager
def watched_command_lines() -> Iterator[list[str]]:
    """Sample the command lines of all processes while the block runs; yields a list of those with the canary.

    This process names it in no command line of its own.
    """
    seen: list[str] = []
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.25):
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    line = path.read_bytes()
                except OSError:
                    continue
                if CANARY.encode() in line:
                    seen.append(line.decode(errors="replace"))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        ended.set()
        thread.join()


def files_with_the_canary(*folders: Path) -> list[str]:
    """All files below the folders with the canary in their bytes or their name."""
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert files
    return [str(path) for path in files if CANARY in str(path) or CANARY.encode() in path.read_bytes()]


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A directory to work in, beside it a home and a directory of temporary files."""
    for name in ("place", "home", "temporary"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home" / "cache"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.chdir(tmp_path / "place")
    write_tiny_recipe(tmp_path / "place")
    return tmp_path


@pytest.mark.slow
def test_secrets_of_the_environment_stay_there(place):
    recipe, run = place / "place" / "tiny.yaml", place / "place" / "out"
    recipe.write_text(f"# once it was {URL}\n{recipe.read_text()}")
    for name in ("data/train.beton", "data/train.beton.json"):
        (place / "place" / name).chmod(0o644)
    with watched_command_lines() as seen:
        ran = fcmae(
            *RUN, *ONE_STAGE, "stages.intermediate.tracking.mlflow=true",
            "stages.intermediate.schedule.epochs=1", **IN_ENVIRONMENT,
        )  # fmt: skip
        assert ran.returncode == 0, ran.stderr
        # A stage waits a minute for its forwarder, which may be too short on a busy machine; a second logs the rest.
        command = module_command("pipeline.tracking.forwarder", run / "intermediate")
        subprocess.run(command, stdin=subprocess.DEVNULL, env={**os.environ, **IN_ENVIRONMENT}, check=True)
        written = fcmae("report", "out", **IN_ENVIRONMENT)
        assert written.returncode == 0, written.stderr
    recipe.unlink()  # where the canary was put
    assert (run / "mlflow.db").exists()
    assert (run / "report.html").exists()
    assert "https://***@127.0.0.1:9" in (run / "origin.json").read_text()
    assert files_with_the_canary(place) == []
    assert seen == []
    assert CANARY not in ran.stdout + ran.stderr


# Where a user can put a secret: the arguments, a file beside the recipe and what it holds, a variable.
REFUSED = {
    "MLflow, on the command line": ((*RUN, f"stages.pretrain.tracking.mlflow_uri={URL}"), {}),
    "MLflow, in the recipe": ((*RUN,), {"tiny.yaml": {"defaults": {"tracking": {"mlflow_uri": URL}}}}),
    "MLflow's database": ((*RUN,), {"tiny.yaml": {"defaults": {"tracking": {"mlflow_uri": f"mysql://a:{CANARY}@h/d"}}}}),
    "data, in the recipe": ((*RUN,), {"tiny.yaml": {"defaults": {"data": {"train": f"s3://a:{CANARY}@b/x.beton"}}}}),
    "data, presigned": ((*RUN, f"stages.pretrain.data.train=https://h/x.beton?X-Amz-Signature={CANARY}"), {}),
    "data, by a variable": ((*RUN, "stages.pretrain.data.train=$PLACE/train.beton"), {}),
    "data, resolved by OmegaConf": ((*RUN, "defaults.data.train=${oc.env:PLACE}/train.beton"), {}),
    "weights": ((*RUN,), {"tiny.yaml": {"init": f"sftp://me:{CANARY}@host/weights.safetensors"}}),
    "checkpoints": ((*RUN, f"stages.pretrain.checkpoint.directory=s3://a:{CANARY}@bucket/checkpoints"), {}),
    "DeepSpeed": ((*RUN,), {"tiny.yaml": {"defaults": {"engine": {"deepspeed": {"comet": {"api_key": CANARY}}}}}}),
    "the run": (("run", "tiny.yaml", "--out", f"s3://a:{CANARY}@bucket/run"), {}),
    "a run to look at": (("status", f"s3://a:{CANARY}@bucket/run"), {}),
    "the site's environment": ((*SUBMIT, "site.yaml"), {"site.yaml": {"environment": {"HF_TOKEN": CANARY}}}),
    "the site's root": ((*SUBMIT, "site.yaml"), {"site.yaml": {"run_root": "$PLACE/runs"}}),
    "the site's image": (
        (*SUBMIT, "site.yaml"),
        {"site.yaml": {"container": {"kind": "apptainer", "image": f"docker://me:{CANARY}@host/image"}}},
    ),
    "an option of sbatch": ((*SUBMIT, "site.yaml"), {"site.yaml": {"sbatch": {"export": f"ALL,A_TOKEN={CANARY}"}}}),
    "a source": (("prepare", f"https://host/x.tar?token={CANARY}", "out.beton"), {}),
    "labels": (("prepare", "data", "out.beton", "--labels", f"{URL}/labels.csv"), {}),
    "photographs": (("pretrain", f"s3://a:{CANARY}@bucket/photos", "--out", "out"), {}),
    "starting weights": (("finetune", "data", "--out", "out", "--from", f"{URL}/w.pth"), {}),
    "weights to convert": (("convert", f"{URL}/w.pth", "out.safetensors"), {}),
    "weights to evaluate": (("evaluate", f"{URL}/w.pth", "--data", "data/validation.beton"), {}),
    "a study": (
        ("study", "run", "study.yaml", "--out", "out"),
        {"study.yaml": {"name": "s", "about": "a", "recipe": "tiny.yaml", "arms": {"a": {
            "change": {"defaults.tracking.mlflow_uri": URL}}}}},
    ),
}  # fmt: skip


def merged(base: object, change: object) -> object:
    if not (isinstance(base, dict) and isinstance(change, dict)):
        return change
    return {**base, **{key: merged(base.get(key), value) for key, value in change.items()}}


def test_a_secret_that_would_be_copied_is_refused_and_nothing_is_written(place):
    recipe = yaml.safe_load((place / "place" / "tiny.yaml").read_text())
    for name, (arguments, files) in REFUSED.items():
        (place / "place" / "tiny.yaml").write_text(yaml.safe_dump(recipe))
        for file, content in files.items():
            base = recipe if file == "tiny.yaml" else {}
            (place / "place" / file).write_text(yaml.safe_dump(merged(base, content)))
        refused = fcmae(*arguments, PLACE=URL)
        assert refused.returncode == 1, (name, refused.stdout, refused.stderr)
        (sentence,) = refused.stderr.splitlines()
        assert "export" in sentence, (name, sentence)
        assert CANARY not in refused.stdout + refused.stderr, name
        for file in files:
            (place / "place" / file).unlink()
        assert files_with_the_canary(place) == [], name
        assert not [path for path in (place / "place").iterdir() if path.name.startswith("out")], name
