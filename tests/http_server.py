"""What the real HTTP servers of tests share: JSON in and out, a free port, and a thread while the ``with`` block runs."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self


class JsonHandler(BaseHTTPRequestHandler):
    """Read and send JSON on a connection that stays open, and log nothing."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # a body goes out at once, and does not wait 40 ms until the header has arrived

    def log_message(self, *_: Any) -> None:
        pass

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers["Content-Length"]))

    def asked(self) -> Any:
        return json.loads(self.body())

    def send(self, body: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        """Send an answer: bytes as they are, anything else as JSON."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64  # of connections that are not accepted yet


class JsonServer:
    """Serve by a handler on loopback while the ``with`` block runs; ``url`` ends in ``under``."""

    def __init__(self, handler: type[JsonHandler], *, under: str = "", port: int = 0) -> None:
        self.http = _Server(("127.0.0.1", port), handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}{under}"

    def __enter__(self) -> Self:
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.http.shutdown()
        self.http.server_close()
