"""A whole chain whose run directory is a bucket, and checkpoints that go elsewhere."""

import json
import os
import shutil
import signal
import time

import fsspec
import pytest

from cluster.chain import open_chain
from pipeline.errors import CheckpointError
from pipeline.recipe import load_recipe
from pipeline.stage.directory import Stage
from pipeline.training.saving import checkpoint_home, claim_home
from tests.multiprocess.flaky_s3 import flaky_s3
from tests.multiprocess.test_chain import STAGES, start
from tests.support import fcmae, weights_sha256, write_tiny_recipe


def names_in(bucket: str) -> list[str]:
    return fsspec.filesystem("s3", use_listings_cache=False).find(bucket.removeprefix("s3://"))


def files_of(bucket: str) -> dict[str, bytes]:
    return {path: fsspec.filesystem("s3").cat_file(path) for path in names_in(bucket)}


@pytest.mark.slow
def test_a_run_in_a_bucket_goes_on_from_another_machine(tmp_path, monkeypatch):
    recipe = write_tiny_recipe(tmp_path)
    plain = fcmae("run", recipe, "--out", tmp_path / "plain", "--nproc", 2)
    assert plain.returncode == 0, plain.stderr
    with flaky_s3(monkeypatch) as (_, url):
        monkeypatch.setenv("FCMAE_MIRROR", str(tmp_path / "one"))
        process = start(recipe, f"{url}/run", 2, {"intermediate": 12})
        try:
            deadline = time.monotonic() + 240
            while not any("/intermediate/checkpoints/" in path and path.endswith("COMMIT") for path in names_in(url)):
                assert process.poll() is None, process.said()
                assert time.monotonic() < deadline
                time.sleep(0.5)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        shutil.rmtree(tmp_path / "one")  # with that machine all it had is gone
        monkeypatch.setenv("FCMAE_MIRROR", str(tmp_path / "other"))
        done = fcmae("run", recipe, "--out", f"{url}/run", "--nproc", 2)
        assert done.returncode == 0, done.stderr
        found = files_of(url)
        for name in STAGES:
            path = next(path for path in found if path.endswith(f"run/{name}/result.json"))
            assert json.loads(found[path])["weights_sha256"] == weights_sha256(tmp_path / "plain" / name)
            assert path.replace("result.json", "DONE") in found
            assert path.replace("result.json", "weights.safetensors") in found
        seen = json.loads(fcmae("status", f"{url}/run", "--json").stdout)
        assert [(s["stage"], s["state"]) for s in seen] == [(name, "done") for name in STAGES]
        verified = fcmae("verify", f"{url}/run")
        assert verified.returncode == 0, verified.stdout
        assert verified.stdout.count("weights.safetensors: as DONE says") == len(STAGES)
        attempts = [path for path in found if "/intermediate/attempts/" in path and path.endswith("2.json")]
        assert attempts, "the second machine took the stage"
        secret = os.environ["AWS_SECRET_ACCESS_KEY"].encode()
        here = {str(path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        assert not [path for path, content in {**found, **here}.items() if secret in content]


def test_checkpoints_elsewhere_belong_to_one_run_and_are_not_left_behind(tmp_path):
    recipe = write_tiny_recipe(tmp_path)

    def stage(run: str, place: str) -> Stage:
        changes = [f"defaults.checkpoint.directory={tmp_path}/{place}"]
        return open_chain(load_recipe(recipe, changes), tmp_path / run)[0]

    home = claim_home(stage("one", "a"))
    assert home.path == f"{tmp_path}/a/pretrain" == checkpoint_home(stage("one", "a")).path
    claim_home(stage("one", "a"))
    with pytest.raises(CheckpointError, match="holds the checkpoints of another run"):
        claim_home(stage("two", "a"))
    claim_home(stage("one", "b"))  # nothing was saved yet
    home = claim_home(stage("one", "a"))
    home.publish("EVER_COMMITTED", b"")
    with pytest.raises(CheckpointError, match="move them there, or undo the change"):
        claim_home(stage("one", "b"))
    shutil.rmtree(tmp_path / "b")
    shutil.move(tmp_path / "a", tmp_path / "b")
    claim_home(stage("one", "b"))
