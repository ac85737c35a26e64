"""A real S3 server over HTTP (moto's) for tests, and a proxy before it that fails as object stores do."""

import contextlib
import http.client
import os
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from unittest import mock

import boto3
from moto.server import ThreadedMotoServer

BUCKET = "footage"
FAULTS = ("error 500", "time-out", "cut request", "cut reply", "lost reply")
_ERROR = b"<?xml version='1.0'?><Error><Code>InternalError</Code><Message>We broke.</Message></Error>"


class _Handler(BaseHTTPRequestHandler):
    """Passes a request on, or fails it as the server's `fault` says."""

    server: "FaultyProxy"
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None: ...

    def _serve(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        fault = self.server.next_fault(self.command, self.path)
        if fault == "cut request":
            self.rfile.read(length // 2)
            return self._hang_up()
        body = self.rfile.read(length)
        if fault == "error 500":
            return self._reply(500, {"Content-Type": "application/xml"}, _ERROR)
        if fault == "time-out":
            time.sleep(self.server.stall_s)
            return self._hang_up()
        upstream = http.client.HTTPConnection(*self.server.upstream, timeout=60)
        headers = {name: value for name, value in self.headers.items() if name.lower() != "connection"}
        upstream.request(self.command, self.path, body=body or None, headers=headers)
        answer = upstream.getresponse()
        content = answer.read()
        upstream.close()
        if fault == "lost reply" or (fault == "cut reply" and len(content) < 2):
            return self._hang_up()
        if fault == "cut reply":
            self._head(answer.status, dict(answer.getheaders()), len(content))
            self.wfile.write(content[: len(content) // 2])
            return self._hang_up()
        size = int(answer.getheader("Content-Length") or 0) if self.command == "HEAD" else len(content)
        self._head(answer.status, dict(answer.getheaders()), size)
        self.wfile.write(content)

    def _head(self, status: int, headers: dict[str, str], size: int) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in ("content-length", "transfer-encoding", "connection", "date", "server"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(size))
        self.end_headers()

    def _reply(self, status: int, headers: dict[str, str], content: bytes) -> None:
        self._head(status, headers, len(content))
        self.wfile.write(content)

    def _hang_up(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _serve  # noqa: N815


class FaultyProxy(ThreadingHTTPServer):
    """Before an S3 server: each request fails with a chance `rate` from a seed, or as `script` says."""

    daemon_threads = True

    def __init__(self, upstream: tuple[str, int], seed: int = 0, rate: float = 0.0, stall_s: float = 25.0):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream, self.rate, self.stall_s = upstream, rate, stall_s
        self.script: list[tuple[str, str, str]] = []  # (method, part of the path, fault), each used once
        self.happened: Counter[str] = Counter()
        self.requests: Counter[tuple[str, str]] = Counter()  # of (method, path)
        self._random, self._lock = random.Random(seed), threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def next_fault(self, method: str, path: str) -> str | None:
        with self._lock:
            self.requests[method, path.split("?")[0]] += 1
            fault = None
            for entry in self.script:
                if entry[0] == method and entry[1] in path:
                    self.script.remove(entry)
                    fault = entry[2]
                    break
            if fault is None and self._random.random() < self.rate:
                # A time-out costs its wait: none by chance after the first.
                weights = (4, 0 if self.happened["time-out"] else 1, 4, 4, 4)
                fault = self._random.choices(FAULTS, weights)[0]
            if fault:
                self.happened[fault] += 1
                self.happened[f"{fault} {method}"] += 1
            return fault


def environment(url: str) -> dict[str, str]:
    """What a job needs to reach a store."""
    return {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }


@contextlib.contextmanager
def running_store() -> Iterator[tuple[str, int]]:
    """(host, port) of a fresh S3 server with one bucket."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    client(f"http://{host}:{port}").create_bucket(Bucket=BUCKET)
    try:
        yield host, port
    finally:
        server.stop()


def client(url: str):
    keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test", "region_name": "us-east-1"}
    return boto3.client("s3", endpoint_url=url, **keys)


@contextlib.contextmanager
def reached_through(url: str) -> Iterator[None]:
    """This process's environment names the store at `url`."""
    with mock.patch.dict(os.environ, environment(url)):
        yield
