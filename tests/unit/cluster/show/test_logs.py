"""What `fcmae logs` prints of the files of ranks."""

import os
import subprocess
import threading
import time
from pathlib import Path

import pytest
import yaml

from cluster.show.logs import print_logs
from pipeline.errors import LaunchError
from pipeline.storage.bounded_files import read_file
from tests.support import FCMAE, make_tiny_run

DEADLINE_SECONDS = 300


@pytest.mark.parametrize("content", [None, ""])
def test_silence_is_told_too(tmp_path, capsys, content):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"stages": {"pretrain": {}}}))
    (tmp_path / "pretrain" / "logs").mkdir(parents=True)
    if content is not None:
        (tmp_path / "pretrain" / "logs" / "rank-0.log").write_text(content)
    print_logs(tmp_path, None, 0, 100, follow=False)
    assert capsys.readouterr().out == "rank 0 has not printed anything yet\n"
    (tmp_path / "pretrain" / "DONE").touch()
    print_logs(tmp_path, None, 0, 100, follow=False)
    assert (
        capsys.readouterr().out == f"rank 0 has printed nothing, and the run is done: see `fcmae report {tmp_path}`\n"
    )


def test_logs_of_a_rank_in_the_order_they_were_written(tmp_path, capsys):
    run = make_tiny_run(tmp_path)
    for place, text, age in (
        ("pretrain/slurm/10_0_log.out", "first\nsecond\n", 30), ("pretrain/slurm/9_0_log.out", "zero\n", 60),
        ("pretrain/slurm/10_1_log.out", "other\n", 0), ("finetune/logs/rank-0.log", "local\n", 0),
    ):  # fmt: skip
        path = run / place
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        os.utime(path, (time.time() - age,) * 2)
    print_logs(run, None, 0, 1, follow=False)
    assert capsys.readouterr().out.splitlines() == [
        "==> pretrain/slurm/9_0_log.out <==", "zero", "==> pretrain/slurm/10_0_log.out <==", "second",
        "==> finetune/logs/rank-0.log <==", "local",
    ]  # fmt: skip
    print_logs(run, "pretrain", 1, 5, follow=False)
    assert capsys.readouterr().out.splitlines()[1:] == ["other"]
    with pytest.raises(LaunchError, match="there is no stage nope"):
        print_logs(run, "nope", 0, 5, follow=False)


def test_follow_reads_only_what_is_new(tmp_path, capsys, monkeypatch):
    """The log of weeks lies on a file system that all ranks share."""
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"stages": {"pretrain": {}}}))
    log = tmp_path / "pretrain" / "logs" / "rank-0.log"
    append(log, "old\n" * 1000)
    additions, read = ["first\n", "second\n"], []

    def read_and_count(path: Path, *arguments: object, **options: object) -> bytes:
        read.append(read_file(path, *arguments, **options))
        return read[-1]

    def sleep(seconds: float) -> None:
        if additions:
            append(log, additions.pop(0))
        else:
            (tmp_path / "pretrain" / "DONE").touch()

    monkeypatch.setattr("cluster.show.logs.read_file", read_and_count)
    monkeypatch.setattr(time, "sleep", sleep)
    print_logs(tmp_path, None, 0, 1, follow=True)
    assert capsys.readouterr().out == "==> pretrain/logs/rank-0.log <==\nold\nfirst\nsecond\n"
    assert b"".join(read) == log.read_bytes()


def append(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(text)


def test_follow_shows_what_is_added_until_the_stage_is_done(tmp_path):
    """As a person sees it: lines come while their file grows, each once, and the command ends by itself."""
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"stages": {"pretrain": {}, "finetune": {}}}))
    stage = tmp_path / "pretrain"
    first, second = stage / "slurm" / "7_0_log.out", stage / "slurm" / "8_0_log.out"
    append(first, "old\none\n")
    append(tmp_path / "finetune" / "logs" / "rank-0.log", "of another stage\n")
    command = [*FCMAE, "logs", tmp_path, "pretrain", "--lines", "1", "--follow"]
    logs = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = threading.Timer(DEADLINE_SECONDS, logs.kill)  # whoever waits for a line then finds the end
    deadline.start()
    try:

        def said(text: str) -> None:
            got = b""
            while got.decode() != text:
                assert text.startswith(got.decode()), (got, text)
                byte = logs.stdout.read(1)
                assert byte, f"it ended after {got!r}"
                got += byte

        said("==> pretrain/slurm/7_0_log.out <==\none\n")
        append(first, "two, half")
        said("two, half")
        append(first, " and whole\n")
        said(" and whole\n")
        append(stage / "slurm" / "8_1_log.out", "of another rank\n")
        append(second, "the job that came after\n")  # the job was submitted anew: another file
        said("==> pretrain/slurm/8_0_log.out <==\nthe job that came after\n")
        assert logs.poll() is None
        append(second, "last words\n")
        (stage / "DONE").touch()  # that the other stage is not done does not matter
        said("last words\n")
        assert logs.stdout.read() == b""
        assert logs.wait() == 0
    finally:
        deadline.cancel()
        logs.kill()
        logs.wait()
        logs.stdout.close()
