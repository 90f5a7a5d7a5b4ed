"""A packed checkpoint behind vLLM's HTTP server."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import engine
import torch

from mxmoe_steps import load_quantized


def test_a_request(demo: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", demo, "--port", str(port)]
    command += ["--host", "127.0.0.1", "--dtype", "float32", "--max-model-len", "256", "--enforce-eager"]
    log = tmp_path / "log"
    with log.open("w") as out:
        server = subprocess.Popen(command, env=os.environ | engine.SETTINGS, stdout=out, stderr=subprocess.STDOUT)
        try:
            prompt = [5, 6, 7, 8]
            request = {"model": str(demo), "prompt": prompt, "max_tokens": 12, "temperature": 0}
            answer = ask(f"http://127.0.0.1:{port}", request, server)
        finally:
            server.terminate()
            server.wait(60)
    assert answer is not None, log.read_text()
    settings = {"max_new_tokens": 12, "do_sample": False}
    made = load_quantized(str(demo), dtype="float32").generate(torch.tensor([prompt]), **settings)[0, len(prompt) :]
    from transformers import AutoTokenizer

    assert answer["choices"][0]["text"] == AutoTokenizer.from_pretrained(demo).decode(made, skip_special_tokens=True)


def ask(server: str, request: dict, process: subprocess.Popen) -> dict | None:
    """The server's answer, once it is up."""
    sent = urllib.request.Request(
        f"{server}/v1/completions", json.dumps(request).encode(), {"Content-Type": "application/json"}
    )
    for _ in range(240):
        if process.poll() is not None:
            return None
        try:
            with urllib.request.urlopen(sent, timeout=60) as answer:
                return json.load(answer)
        except urllib.error.URLError:
            time.sleep(0.5)
    return None
