"""A Hugging Face hub on loopback with one data set or model, which can be told to answer 503 for a while."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class LoopbackHub:
    """Serves `files` of the data set (or model) `name`; use as a context manager."""

    def __init__(self, name: str, files: dict[str, bytes], *, is_model: bool = False) -> None:
        self.name = name
        self.is_model = is_model
        self.files = files
        self.unavailable_until = 0.0
        self.newest = COMMIT
        self.requests: list[str] = []
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
                self._send_file(request, self.files[name])
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

    def _send_file(self, request: BaseHTTPRequestHandler, content: bytes) -> None:
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        wanted = request.headers.get("Range")
        if wanted is None:
            self._send(request, 200, content, headers)
            return
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        begin, end = int(first), min(int(last or len(content)), len(content) - 1)
        headers["Content-Range"] = f"bytes {begin}-{end}/{len(content)}"
        self._send(request, 206, content[begin : end + 1], headers)

    @staticmethod
    def _send(request: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        request.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            request.send_header(key, value)
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(body)
