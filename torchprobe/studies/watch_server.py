"""A page on this machine that follows runs while they go on. It listens on 127.0.0.1 only, and serves two addresses: no path is a file."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

from torchprobe.common.files import to_json
from torchprobe.rendering.page import Page, render
from torchprobe.studies.watch import Watch

HOST = "127.0.0.1"
_LONGEST = 200  # characters of a field or a pattern
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)


def watch_page(watch: Watch) -> str:
    """The page, without numbers: its script fetches them."""
    names = ", ".join(run.name for run in watch.runs)
    return render(Page("watch", names, "Every closed window of each layer. The page follows the files."), "watch.html.jinja")


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, watch: Watch, port: int) -> None:
        self.watch, self.page, self.lock = watch, watch_page(watch).encode(), threading.Lock()
        super().__init__((HOST, port), _Handler)

    def handle_error(self, request: object, client_address: object) -> None:
        """A reader that goes before its answer has arrived, such as a closed tab, is no error."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = 30  # seconds for a request to arrive
    server_version, sys_version = "torchprobe", ""

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def _answer(self, body: bool) -> None:
        port = self.server.server_address[1]
        # A page elsewhere may let its own name point to this machine; the browser then tells that name.
        if self.headers.get("Host", "") not in (f"{HOST}:{port}", f"localhost:{port}"):
            return self._send(HTTPStatus.FORBIDDEN, b"this page is for this machine only\n", "text/plain", body)
        try:
            address = urlsplit(self.path)
        except ValueError:
            return self._send(HTTPStatus.BAD_REQUEST, b"no address\n", "text/plain", body)
        if address.path == "/":
            return self._send(HTTPStatus.OK, self.server.page, "text/html", body)
        if address.path != "/data.json":
            return self._send(HTTPStatus.NOT_FOUND, b"not found\n", "text/plain", body)
        query = parse_qs(address.query)
        chosen, pattern = (query.get(name, [""])[-1][:_LONGEST] for name in ("field", "layers"))
        try:
            with self.server.lock:
                self.server.watch.refresh()
                data = self.server.watch.data(chosen, pattern)
        except ValueError as error:
            return self._send(HTTPStatus.BAD_REQUEST, f"{error}\n".encode(), "text/plain", body)
        return self._send(HTTPStatus.OK, to_json(data).encode(), "application/json", body)

    def _send(self, status: HTTPStatus, content: bytes, kind: str, body: bool) -> None:
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Security-Policy", _POLICY)
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing: the terminal belongs to the person who watches."""


@contextmanager
def serving(watch: Watch, port: int = 0) -> Iterator[str]:
    """Serves the page during the block, in another thread; its address.

    Args:
        port: 0 takes one that is free.

    Raises:
        OSError: the port is in use.
        ModuleNotFoundError: jinja2 or matplotlib is missing.
    """
    try:
        server = _Server(watch, port)
    except OSError as error:
        raise OSError(error.errno, f"port {port} of {HOST} cannot be used ({error.strerror}); choose another one with --port") from error
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
    thread.start()
    try:
        yield f"http://{HOST}:{server.server_address[1]}/"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
