"""A run whose data lies in an object store: a local S3 server, read by two ranks of one machine."""

import json
import signal
import subprocess
import time
import uuid
from importlib.util import find_spec

import pytest

from pipeline.stage.directory import Stage
from pipeline.stage.outcome import OutcomeKind
from pipeline.tracking import journal
from tests.support import FCMAE, fcmae_anew, tiny_data, write_tiny_recipe
from tests.unit.data.test_staging import Server

pytestmark = pytest.mark.skipif(not find_spec("moto"), reason="needs moto")


@pytest.fixture
def s3(monkeypatch):
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.get_host_and_port()[1]}",
        "AWS_ACCESS_KEY_ID": "nobody",
        "AWS_SECRET_ACCESS_KEY": "nothing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    yield f"bucket-{uuid.uuid4().hex[:8]}"  # servers of one process have their buckets in common
    server.stop()


def s3_run(bucket, directory, *overrides):
    """A one-epoch stage on two ranks, its data in the store alone.

    With interpreters of its own: a rank that is forked from a launcher which has used s3fs waits for its threads.
    """
    import fsspec

    tiny_data(directory / "data", train=64, validation=16)
    recipe = write_tiny_recipe(directory, ["stages.intermediate=null", "stages.finetune=null"])
    store = fsspec.filesystem("s3", skip_instance_cache=True)  # each test has a server of its own
    store.mkdir(bucket)
    store.put(f"{directory}/data/", f"{bucket}/data/", recursive=True)
    (directory / "data").rename(directory / "away")
    urls = [f"stages.pretrain.data.{name}=s3://{bucket}/data/{name}.beton" for name in ("train", "validation")]
    command = ("run", recipe, "--out", directory / "run", "--nproc", 2, "stages.pretrain.schedule.epochs=1", *urls)
    return fcmae_anew(*command, *overrides, FCMAE_SCRATCH=str(directory / "cache"))


@pytest.mark.slow
def test_staged_verified_and_trained_on(s3, tmp_path):
    done = s3_run(s3, tmp_path)
    assert done.returncode == 0, done.stderr
    stage = Stage(tmp_path / "run" / "pretrain")
    assert stage.attempts.last_outcome().kind is OutcomeKind.DONE
    assert stage.recipe.data.train == f"s3://{s3}/data/train.beton"
    cached = {path.name for path in (tmp_path / "cache" / "fcmae").iterdir() if path.is_dir()}
    hashes = json.loads((stage.directory / "data.json").read_text())
    assert cached == {f"{name}-{sha256[:16]}" for name, sha256 in hashes.items()}
    steps = [e for e in journal.read_events(stage.directory / "journal.jsonl") if e["kind"] == "step"]
    assert len(steps) == 2
    assert min(step["data_wait_seconds"] for step in steps) >= 0


@pytest.mark.slow
def test_what_fails_on_a_rank_is_one_sentence(s3, tmp_path):
    full = s3_run(s3, tmp_path, "stages.pretrain.data.cache_bytes=1000")
    assert full.returncode == 1
    assert full.stderr.count("\n") == 1
    assert "but data.cache_bytes is 1000; raise it" in full.stderr


@pytest.mark.slow
def test_a_stop_while_data_is_fetched_is_a_stop(tmp_path):
    recipe = write_tiny_recipe(tmp_path, ["stages.intermediate=null", "stages.finetune=null"])
    server = Server(tmp_path / "data")
    server.serves = 0  # it will never send the images
    overrides = [f"stages.pretrain.data.train={server.url}/train.beton", f"stages.pretrain.data.cache_dir={tmp_path}/c"]
    command = [*FCMAE, "run", recipe, "--out", tmp_path / "run", "--nproc", "2", *overrides]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 400
        while not server.requests:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=100)
    server.stop()
    assert process.returncode == 75, said
    assert Stage(tmp_path / "run" / "pretrain").attempts.last_outcome().reason == "stopped by SIGTERM"
