"""A real object store on this machine for tests: moto's S3 server in its own process, and a way to disturb it."""

from __future__ import annotations

import http.client
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tests.parallel.job import free_port

BUCKET = "bucket"
_CODES = {403: "AccessDenied", 500: "InternalError", 503: "SlowDown"}
_NOBODY = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}


class Store:
    """An S3 server with one bucket. `port`: where clients connect; `variables`: what they need in their environment."""

    def __init__(self) -> None:
        self.port = free_port()
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]
        self._said = tempfile.TemporaryFile()
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=self._said)
        deadline = time.monotonic() + 60
        while self.ask("PUT", f"/{BUCKET}") != 200:
            assert time.monotonic() < deadline and self._process.poll() is None
            time.sleep(0.1)

    def ask(self, method: str, path: str) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request(method, path)
            return connection.getresponse().status
        except OSError:
            return 0
        finally:
            connection.close()

    def variables(self, port: int | None = None) -> dict[str, str]:
        return _NOBODY | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port or self.port}"}

    def close(self) -> None:
        """Ends the server. If it had ended before, tests failed because of that, so its last output is printed."""
        if (status := self._process.poll()) is not None:
            self._said.seek(max(self._said.seek(0, os.SEEK_END) - 4000, 0))
            print(f"the store's server ended by itself, with status {status}: {self._said.read().decode()}", flush=True)
        self._process.kill()
        self._process.wait()
        self._said.close()


@contextmanager
def using(variables: dict[str, str]) -> Iterator[None]:
    """Makes this process use another store for a while."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


class Disturbed:
    """Stands between clients and a store. `fault` is called for each request, with its method, path and number (from
    1). It returns a status to send instead of the store's answer, "torn" to send half of the answer, "cut" to close the
    connection, or None to change nothing.

    Attributes:
        asked: (method, path) of every request.
        faults: how many requests were disturbed.
    """

    def __init__(self, store: Store, fault: Callable[[str, str, int], int | str | None]):
        self.asked: list[tuple[str, str]] = []
        self.faults = 0
        outer, guard = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def handle_one(self) -> None:
                body = self._body()
                with guard:
                    outer.asked.append((self.command, self.path))
                    what = fault(self.command, self.path, len(outer.asked))
                    outer.faults += what is not None
                if isinstance(what, int):
                    self._send(what, [], f"<Error><Code>{_CODES.get(what, what)}</Code></Error>".encode())
                    return
                status, headers, data = outer.forward(store, self.command, self.path, dict(self.headers), body)
                if what == "cut":
                    self.close_connection = True
                    return
                self._send(status, headers, data, torn=what == "torn" and self.command == "GET")

            def _body(self) -> bytes:
                if "chunked" in self.headers.get("Transfer-Encoding", ""):
                    parts = []
                    while size := int(self.rfile.readline().split(b";")[0], 16):
                        parts.append(self.rfile.read(size))
                        self.rfile.readline()
                    self.rfile.readline()
                    return b"".join(parts)
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))

            def _send(self, status: int, headers: list[tuple[str, str]], data: bytes, torn: bool = False) -> None:
                self.send_response(status)
                length = len(data)
                for name, value in headers:
                    if name.lower() == "content-length" and self.command == "HEAD":
                        length = int(value)
                    elif name.lower() not in ("content-length", "transfer-encoding", "connection", "server", "date"):
                        self.send_header(name, value)
                self.send_header("Content-Length", str(length // 2 if torn else length))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data[: len(data) // 2] if torn else data)

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_one

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @staticmethod
    def forward(
        store: Store, method: str, path: str, headers: dict[str, str], body: bytes
    ) -> tuple[int, list[tuple[str, str]], bytes]:
        headers = {name: value for name, value in headers.items() if name.lower() not in ("transfer-encoding",)}
        headers["Content-Length"] = str(len(body))
        connection = http.client.HTTPConnection("127.0.0.1", store.port, timeout=60)
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            connection.close()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def objects(url: str) -> dict[str, bytes]:
    """All objects below a folder, by name."""
    from ar_unified.storage import stores

    return {name: stores.read(f"{url}/{name}") for name in sorted(stores.found_under(url))}


def put_folder(folder: Path, url: str) -> str:
    """Copies a folder into the store, file by file."""
    from ar_unified.storage import stores

    for path in sorted(folder.rglob("*")):
        if path.is_file():
            stores.write(f"{url}/{path.relative_to(folder).as_posix()}", path.read_bytes())
    return url
