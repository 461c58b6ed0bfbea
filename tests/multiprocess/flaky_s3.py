"""A local S3 behind a proxy that drops requests: some before they arrive, some after, some with an error."""

import contextlib
import http.client
import random
import socket
import uuid
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest


class Proxy(ThreadingHTTPServer):
    """Passes requests on to `port`, but for a `share` of them."""

    daemon_threads = True

    def __init__(self, port: int, share: float, seed: int):
        super().__init__(("127.0.0.1", 0), Handler)
        self.port, self.share, self.dropped, self.chance = port, share, 0, random.Random(seed)

    def handle_error(self, request: object, client_address: object) -> None: ...


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def _pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.server.chance.choice(["error", "before", "after"]) if self._unlucky() else ""
        if fault == "before":
            return self._hang_up()
        if fault == "error":
            return self._answer(503, {}, b"")
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=30)
        connection.request(self.command, self.path, body, dict(self.headers))
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        if fault == "after":
            return self._hang_up()
        self._answer(answer.status, dict(answer.getheaders()), content)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _pass_on  # noqa: N815

    def _unlucky(self) -> bool:
        unlucky = self.server.chance.random() < self.server.share
        self.server.dropped += unlucky
        return unlucky

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _answer(self, status: int, headers: dict[str, str], content: bytes) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in ("content-length", "connection", "transfer-encoding"):
                self.send_header(name, value)
        length = headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(content))
        self.send_header("Content-Length", length)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None: ...


@contextlib.contextmanager
def flaky_s3(patch: pytest.MonkeyPatch, share: float = 0.0, seed: int = 0) -> Iterator[tuple[Proxy, str]]:
    """The proxy, and the URL of an empty bucket behind it, known to this process and its children by environment."""
    import threading

    import fsspec
    from moto.server import ThreadedMotoServer

    s3 = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    s3.start()
    _, port = s3.get_host_and_port()
    proxy = Proxy(port, 0.0, seed)
    thread = threading.Thread(target=proxy.serve_forever, daemon=True)
    thread.start()
    patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.server_address[1]}")
    patch.setenv("AWS_ACCESS_KEY_ID", "key-that-is-nowhere")
    patch.setenv("AWS_SECRET_ACCESS_KEY", "secret-that-must-be-nowhere")
    patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    bucket = f"bucket-{uuid.uuid4().hex[:8]}"
    fsspec.filesystem("s3").mkdir(bucket)
    proxy.share = share
    try:
        yield proxy, f"s3://{bucket}"
    finally:
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        proxy.shutdown()
        s3.stop()
