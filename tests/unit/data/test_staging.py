"""Data files on servers that lose the connection, fall silent, or send other bytes."""

import hashlib
import http.server
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter

import numpy as np
import pytest

from pipeline.data import staging
from pipeline.data.beton import open_beton, sidecar_path
from pipeline.data.beton_writer import BetonWriter
from pipeline.data.cache import Cache
from pipeline.data.staging import cache_directory, describe_beton, fetch_beton
from pipeline.errors import DataError, RetryableError

PIECE = 1 << 20


class Server(http.server.ThreadingHTTPServer):
    """Serves the files of a directory, in pieces, and counts requests; it is silent from byte `serves` on."""

    daemon_threads = True

    def __init__(self, directory):
        super().__init__(("127.0.0.1", 0), Handler)
        self.directory, self.requests, self.serves = directory, Counter(), 10**9
        self.silence, self.lock = threading.Event(), threading.Lock()
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def stop(self):
        self.silence.set()
        self.shutdown()
        self.server_close()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        path = self.server.directory / self.path.lstrip("/")
        if not path.exists():
            self.send_error(404)
            return
        first, last = 0, path.stat().st_size - 1
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            first, last = map(int, wanted.groups())
            with self.server.lock:
                self.server.requests[first] += 1
            if first >= self.server.serves:
                self.server.silence.wait(60)
                return
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(last + 1 - first))
        self.end_headers()
        with path.open("rb") as file:
            file.seek(first)
            self.wfile.write(file.read(last + 1 - first))

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    directory = tmp_path_factory.mktemp("source")
    with BetonWriter(directory / "a.beton", ["x", "y"], 6) as writer:
        for i in range(6):
            writer.add(np.random.default_rng(i).integers(0, 256, (500, 500, 3), np.uint8), i % 2)
    return open_beton(directory / "a.beton")


@pytest.fixture
def server(source, monkeypatch):
    monkeypatch.setattr(staging, "CHUNK_BYTES", PIECE)
    running = Server(source.path.parent)
    yield running
    running.stop()


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_path_is_read_where_it_lies(source, tmp_path):
    assert fetch_beton(str(source.path), Cache(tmp_path / "cache"), 5) == source
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("protocol", ["http", "file"])
def test_a_url_is_copied_once_and_checked(source, server, tmp_path, protocol):
    url = f"{server.url}/a.beton" if protocol == "http" else f"file://{source.path}"
    for _ in range(2):
        with Cache(tmp_path) as cache:
            beton = fetch_beton(url, cache, 10)
            assert beton.path.parent.parent == tmp_path
            assert beton.model_copy(update={"path": source.path}) == source
            assert sha256(beton.path) == source.sha256
    assert set(server.requests.values()) <= {1}
    assert len(server.requests) == (-(-source.size_bytes // PIECE) if protocol == "http" else 0)


def test_a_side_car_is_enough_to_describe(source, server):
    assert describe_beton(f"{server.url}/a.beton", 5).sha256 == source.sha256
    assert not server.requests


def test_a_server_that_falls_silent_and_then_speaks_again(source, server, tmp_path):
    server.serves = 5 * PIECE
    with (
        Cache(tmp_path) as cache,
        pytest.raises(RetryableError, match=r"a\.beton: the server has sent nothing for 3 s"),
    ):
        fetch_beton(f"{server.url}/a.beton", cache, 3)
    (partial,) = tmp_path.glob("*.partial/a.beton")
    kept = partial.stat().st_size
    assert kept == 5 * PIECE < source.size_bytes
    server.serves, before = 10**9, dict(server.requests)
    with Cache(tmp_path) as cache:
        assert sha256(fetch_beton(f"{server.url}/a.beton", cache, 60).path) == source.sha256
    again = {place for place, count in server.requests.items() if count > before.get(place, 0)}
    assert again == set(range(kept, source.size_bytes, PIECE))


def test_a_lost_connection(server, tmp_path):
    server.stop()
    with Cache(tmp_path) as cache, pytest.raises(RetryableError, match=r"the connection to .*a\.beton\.json was lost"):
        fetch_beton(f"{server.url}/a.beton", cache, 10)


def test_what_is_not_there_and_cannot_be_there(server, tmp_path):
    with Cache(tmp_path) as cache:
        with pytest.raises(DataError, match=r"/b\.beton\.json does not exist; correct the path"):
            fetch_beton(f"{server.url}/b.beton", cache, 10)
        with pytest.raises(DataError, match=r"data from nothing://x/b.beton cannot be read: Protocol not known"):
            fetch_beton("nothing://x/b.beton", cache, 10)
    assert not list(tmp_path.iterdir())


def test_other_bytes_than_the_side_car_says(source, tmp_path):
    directory = tmp_path / "source"
    directory.mkdir()
    content = bytearray(source.path.read_bytes())
    content[-PIECE] ^= 1
    (directory / "a.beton").write_bytes(content)
    sidecar_path(directory / "a.beton").write_bytes(sidecar_path(source.path).read_bytes())
    with Cache(tmp_path / "cache") as cache:
        with pytest.raises(DataError, match=r"a\.beton differ from its side-car"):
            fetch_beton(f"file://{directory}/a.beton", cache, 10)
        assert not list((tmp_path / "cache").glob("*/a.beton"))


def test_a_spoilt_beginning_is_not_blamed_on_the_source(source, tmp_path):
    partial = tmp_path / f"a-{source.sha256[:16]}.partial"
    partial.mkdir()
    (partial / "a.beton").write_bytes(bytes(PIECE))
    with Cache(tmp_path) as cache:
        assert sha256(fetch_beton(f"file://{source.path}", cache, 10).path) == source.sha256


def test_a_damaged_copy_is_fetched_again(source, tmp_path, capsys):
    with Cache(tmp_path) as cache:
        path = fetch_beton(f"file://{source.path}", cache, 10).path
    with path.open("r+b") as file:
        file.truncate(source.size_bytes - 1)
    with Cache(tmp_path) as cache:
        assert sha256(fetch_beton(f"file://{source.path}", cache, 10).path) == source.sha256
    assert "is truncated" in capsys.readouterr().err


PROCESS = """
import sys
from pipeline.data import staging
from pipeline.data.cache import Cache
staging.CHUNK_BYTES = 1 << 20
with Cache(sys.argv[2]) as cache:
    print(staging.fetch_beton(sys.argv[1], cache, 30).path, flush=True)
"""


def process(url, directory):
    return subprocess.Popen([sys.executable, "-c", PROCESS, url, str(directory)], stdout=subprocess.PIPE, text=True)


def test_two_processes_at_once_copy_once(source, server, tmp_path):
    processes = [process(f"{server.url}/a.beton", tmp_path) for _ in range(2)]
    paths = [p.communicate(timeout=240)[0].strip() for p in processes]
    assert paths[0] == paths[1]
    assert len(server.requests) == -(-source.size_bytes // PIECE)
    assert set(server.requests.values()) == {1}


def test_killed_in_the_middle_of_a_copy(source, server, tmp_path):
    server.serves = 6 * PIECE
    killed = process(f"{server.url}/a.beton", tmp_path)
    while not any(path.stat().st_size > PIECE for path in tmp_path.glob("*.partial/a.beton")):
        assert killed.poll() is None, "the process ended by itself"
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert not list(tmp_path.glob(f"a-{source.sha256[:16]}"))
    server.serves, server.requests = 10**9, Counter()
    with Cache(tmp_path) as cache:
        assert sha256(fetch_beton(f"{server.url}/a.beton", cache, 60).path) == source.sha256
    assert 0 not in server.requests, "the beginning was copied already"


def test_where_copies_go(monkeypatch, tmp_path):
    monkeypatch.delenv("FCMAE_SCRATCH", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory(None) == f"{tmp_path}/fcmae"
    monkeypatch.setenv("FCMAE_SCRATCH", "/scratch")
    assert cache_directory(None) == "/scratch/fcmae"
    assert cache_directory("/mine") == "/mine"


def test_a_full_disk(source, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk]).returncode:
        pytest.skip("a small disk needs root and mount")
    try:
        with (
            Cache(disk) as cache,
            pytest.raises(RetryableError, match=r"a-\w+ needs \d+ bytes, \d+ more than .*disk has"),
        ):
            fetch_beton(f"file://{source.path}", cache, 10)
    finally:
        subprocess.run(["umount", "-l", disk], check=True)
