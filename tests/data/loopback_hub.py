"""A Hugging Face hub on loopback with one data set or model, which can fail in the ways of a real one."""

from __future__ import annotations

import hashlib
import json
import socket
import struct
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SILENCE_SECONDS = 0.5
"""Time for which an answer of the fault "silent" does not come."""


class LoopbackHub:
    """Serves `files` of the data set (or model) `name`; use as a context manager."""

    def __init__(self, name: str, files: dict[str, bytes], *, is_model: bool = False) -> None:
        self.name = name
        self.is_model = is_model
        self.files = files
        self.unavailable_until = 0.0
        self.newest = COMMIT
        self.requests: list[str] = []
        self.bytes_served: Counter[str] = Counter()
        """Bytes of each file's content that were sent."""
        self.fault = ""
        """How the next `faults` requests for files fail: reset, cut, silent, or an HTTP status."""
        self.faults = 0
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub.answer(self)

            def do_HEAD(self) -> None:
                hub.answer(self)

            def log_message(self, *arguments: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> LoopbackHub:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path, _, _ = request.path.partition("?")
        self.requests.append(f"{request.command} {path}")
        if time.monotonic() < self.unavailable_until:
            self._send(request, 503, b"busy")
            return
        kind = "models" if self.is_model else "datasets"
        api, download = f"/api/{kind}/{self.name}", f"/{'' if self.is_model else 'datasets/'}{self.name}/resolve/"
        if path.startswith(download):
            name = path.removeprefix(download).partition("/")[2]
            if name in self.files:
                self._send_file(request, name)
                return
        elif path in (api, f"{api}/revision/main", f"{api}/revision/{COMMIT}", f"{api}/revision/{self.newest}"):
            commit = COMMIT if path.endswith(COMMIT) else self.newest
            siblings = [{"rfilename": file} for file in self.files]
            self._send_json(
                request, {"id": self.name, "sha": commit, "siblings": siblings, "tags": [], "private": False}
            )
            return
        elif path.startswith((f"{api}/tree/{COMMIT}", f"{api}/tree/{self.newest}")):
            folder = path.removeprefix(f"{api}/tree/")[len(COMMIT) :].strip("/")
            self._send_json(request, self._tree(folder, recursive="recursive=true" in request.path.lower()))
            return
        known = path.startswith((api, download))
        headers = {"X-Error-Code": "EntryNotFound" if known else "RepoNotFound", "X-Error-Message": "not found"}
        self._send(request, 404, b"{}", headers)

    def _tree(self, folder: str, recursive: bool) -> list[dict[str, Any]]:
        prefix = f"{folder}/" if folder else ""
        entries = {}
        for name, content in self.files.items():
            if name.startswith(prefix):
                parts = name.removeprefix(prefix).split("/")
                for depth in range(1, len(parts)):
                    path = prefix + "/".join(parts[:depth])
                    if recursive or depth == 1:
                        entries[path] = {"type": "directory", "path": path, "oid": COMMIT, "size": 0}
                if recursive or len(parts) == 1:
                    entries[name] = {"type": "file", "path": name, "oid": COMMIT, "size": len(content)}
        return list(entries.values())

    def _send_json(self, request: BaseHTTPRequestHandler, value: Any) -> None:
        self._send(request, 200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _fails(self, request: BaseHTTPRequestHandler, content: bytes) -> bool:
        """Whether this request for a file is to fail; if it is, it has failed."""
        if not self.faults:
            return False
        self.faults -= 1
        if self.fault.isdigit():
            self._send(request, int(self.fault), b"busy", {"Retry-After": "1"})
            return True
        request.close_connection = True
        if self.fault == "reset":
            request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            request.connection.close()
        elif self.fault == "silent":
            time.sleep(SILENCE_SECONDS)
        else:
            assert self.fault == "cut"
            begin, end = _range_of(request, content)
            request.send_response(206)
            request.send_header("Content-Range", f"bytes {begin}-{end - 1}/{len(content)}")
            request.send_header("Content-Length", str(end - begin))
            request.end_headers()
            request.wfile.write(content[begin : (begin + end) // 2])
        return True

    def _send_file(self, request: BaseHTTPRequestHandler, name: str) -> None:
        content = self.files[name]
        if self._fails(request, content):
            return
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        begin, end = _range_of(request, content)
        if request.command == "GET":
            self.bytes_served[name] += end - begin
        if request.headers.get("Range") is None:
            self._send(request, 200, content, headers)
            return
        headers["Content-Range"] = f"bytes {begin}-{end - 1}/{len(content)}"
        self._send(request, 206, content[begin:end], headers)

    @staticmethod
    def _send(request: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        request.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            request.send_header(key, value)
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(body)


def _range_of(request: BaseHTTPRequestHandler, content: bytes) -> tuple[int, int]:
    """Begin and end of the bytes that a request for a file wants."""
    first, _, last = request.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
    return int(first), min(int(last or len(content)), len(content) - 1) + 1
