"""An export behind `transformers serve`, asked by the openai client."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time

import pytest
import transformers
import transformers.utils

from tests.hub.fetched import installed
from tests.hub.lively import STOCK, make_trained
from xlstm_lm import hub

transformers.utils.is_xlstm_available = lambda: False

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"
)
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello é"}]
NEW_TOKENS = 24
SERVER = """
import transformers.utils
transformers.utils.is_xlstm_available = lambda: False  # else it would run the xlstm package's kernels
from transformers.cli.transformers import main
main()
"""
CLIENT = """
import json, sys, openai
address, model, messages = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
client = openai.OpenAI(base_url=address, api_key="none", max_retries=0)
asked = dict(model=model, messages=messages, max_tokens=int(sys.argv[4]), temperature=0)
whole = client.chat.completions.create(**asked)
pieces = [chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**asked, stream=True)
          if chunk.choices]
print(json.dumps({"whole": whole.choices[0].message.content, "reason": whole.choices[0].finish_reason,
                  "tokens": whole.usage.completion_tokens, "pieces": pieces}))
"""


def wait_until_open(port: int, server: subprocess.Popen) -> None:
    """Return when the server answers, has ended, or has had three minutes."""
    for _ in range(900):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        if server.poll() is not None:
            return
        time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, STOCK], ids=["xlstm_lm", "transformers"])
def test_chat_completions_whole_and_streamed(tmp_path, changes):
    packages = installed("openai", "uvicorn", "fastapi")
    folder = tmp_path / "export"
    hub.save_export(make_trained(tmp_path / "source", **changes), folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    prompt = tokenizer.apply_chat_template(MESSAGES, tokenize=True, return_tensors="pt", return_dict=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    expected = model.generate(**prompt, max_new_tokens=NEW_TOKENS, do_sample=False)[0, prompt.input_ids.shape[1] :]
    assert len(expected) == NEW_TOKENS
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "PYTHONPATH": str(packages),
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "CUDA_VISIBLE_DEVICES": "",
    }
    place = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    serve = [sys.executable, "-c", SERVER, "serve", str(folder), "--trust-remote-code", *place]
    client = [sys.executable, "-c", CLIENT, f"http://127.0.0.1:{port}/v1", str(folder)]
    with (tmp_path / "server.log").open("w") as log:
        server = subprocess.Popen(serve, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=tmp_path)
        try:
            wait_until_open(port, server)
            finished = subprocess.run(
                [*client, json.dumps(MESSAGES), str(NEW_TOKENS)],
                capture_output=True,
                text=True,
                env=environment,
                timeout=300,
            )
        finally:
            server.terminate()
            server.wait(timeout=60)
    assert finished.returncode == 0, finished.stderr[-2000:] + (tmp_path / "server.log").read_text()[-3000:]
    answer = json.loads(finished.stdout)
    text = tokenizer.decode(expected, skip_special_tokens=True)
    assert answer["whole"] == text
    # The last bytes may be the beginning of a character, which the stream holds back.
    assert "".join(answer["pieces"]).rstrip("\ufffd") == text.rstrip("\ufffd")
    assert len(answer["pieces"]) > 2
    assert (answer["reason"], answer["tokens"]) == ("length", NEW_TOKENS)
