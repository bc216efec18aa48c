"""Pushing: the hub's own client against a hub on loopback, and what is said when there is none to be reached."""

from __future__ import annotations

import base64
import functools
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest

from xlstm_lm.hub.push import check_repository_name, push

TOKEN = "hf_for_this_test"


class LoopbackHub(ThreadingHTTPServer):
    """Takes repositories and commits; `files` is what has arrived."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: list[str] = []
        self.files: dict[str, bytes] = {}
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: LoopbackHub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            self._answer(401, {"error": "Invalid credentials"})
        elif self.path == "/api/repos/create":
            name = json.loads(body)["name"]
            self.server.repositories.append(name)
            self._answer(200, {"url": f"{self.server.endpoint}/somebody/{name}", "id": f"somebody/{name}"})
        elif self.path.endswith("/preupload/main"):
            chosen = {"uploadMode": "regular", "shouldIgnore": False}
            files = [{"path": file["path"], **chosen} for file in json.loads(body)["files"]]
            self._answer(200, {"files": files})
        elif "/commit/main" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self._answer(
                200, {"commitUrl": f"{self.server.endpoint}/somebody/my-model/commit/{'1' * 40}", "commitOid": "1" * 40}
            )
        else:
            self._answer(404, {"error": self.path})

    def do_GET(self) -> None:
        self._answer(404, {"error": self.path})

    def _answer(self, status: int, content: dict) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def export(tmp_path):
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "xlstm_lm"}\n')
    (folder / "model.safetensors").write_bytes(bytes(range(256)))
    return folder


def use_hub(monkeypatch, endpoint: str, token: str | None) -> None:
    monkeypatch.setattr(
        huggingface_hub, "HfApi", functools.partial(huggingface_hub.HfApi, endpoint=endpoint, token=token or False)
    )


def test_everything_arrives(export, monkeypatch):
    with LoopbackHub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        use_hub(monkeypatch, server.endpoint, TOKEN)
        assert push(export, "somebody/my-model") == f"{server.endpoint}/somebody/my-model"
        server.shutdown()
        assert server.repositories == ["my-model"]
        assert server.files == {path.name: path.read_bytes() for path in export.iterdir()}


def test_without_a_token_it_says_how_to_push_later(export, monkeypatch):
    with LoopbackHub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        use_hub(monkeypatch, server.endpoint, None)
        with pytest.raises(ValueError, match="could not be pushed to somebody/my-model") as refused:
            push(export, "somebody/my-model")
        server.shutdown()
    assert "hf auth login" in str(refused.value)
    assert str(refused.value).endswith(f"hf upload somebody/my-model {export}")
    assert len(list(export.iterdir())) == 2


def test_without_a_network_too(export, monkeypatch):
    use_hub(monkeypatch, "http://127.0.0.1:9", TOKEN)
    with pytest.raises(ValueError, match="The export is complete in ") as refused:
        push(export, "somebody/my-model")
    assert str(refused.value).endswith(f"hf upload somebody/my-model {export}")


@pytest.mark.parametrize("name", ["a/b/c", "white space/x", "-x/y"])
def test_names_that_the_hub_does_not_take_are_refused_before_any_work(name):
    with pytest.raises(ValueError, match="Give a name such as somebody/my-model"):
        check_repository_name(name)
