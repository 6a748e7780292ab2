"""A server that answers in OpenAI's form and prunes as an engine does: `python -m tests.evaluate.openai_server DIR`.

DIR is a checkpoint. It prints its port. The first part of the path says how it behaves: /0.75/v1 prunes at .75,
/ignores/v1 serves dense whatever it was told, /untold/v1 counts no tokens, /busy/v1 fails twice before it answers,
/refuses/v1 never does, /odd/v1 answers in another form, /nowhere/v1 is not there.
"""

from __future__ import annotations

import base64
import json
import sys
import tempfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from typing import Any

import torch

from evs_train.generation import PrunedModel

MODEL = PrunedModel.load(sys.argv[1], dtype="float32", device="cpu", data={"fps": 8.0})
LOCK = Lock()
NAME = "tiny"
REQUESTS: list[dict[str, Any]] = []
BUSY = {"left": 2}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/requests":
            self.reply(200, {"requests": REQUESTS})
        elif self.path.endswith("/v1/models") and not self.path.startswith("/nowhere"):
            self.reply(200, {"object": "list", "data": [{"id": NAME, "object": "model"}]})
        else:
            self.reply(404, {"error": "no such path"})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        mode = self.path.split("/")[1]
        if mode == "busy" and BUSY["left"]:
            BUSY["left"] -= 1
            self.reply(503, {"error": "busy"})
        elif mode == "refuses":
            self.reply(400, {"error": {"message": "no videos here"}})
        elif mode == "odd":
            self.reply(200, {"text": "A"})
        else:
            with LOCK:
                self.reply(200, completion(body, mode, self.headers.get("Authorization")))

    def reply(self, code: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_request(self, *args: Any) -> None:
        """Nothing on stderr."""


def completion(body: dict[str, Any], mode: str, authorization: str | None) -> dict[str, Any]:
    rate = float(mode) if mode[0] == "0" else 0.0
    shown = [
        {**part, "video_url": part["video_url"]["url"][:30]} if part["type"] == "video_url" else part
        for message in body["messages"]
        for part in message["content"]
    ]
    REQUESTS.append({**body, "messages": shown, "authorization": authorization})
    with tempfile.TemporaryDirectory() as folder:
        messages = [
            {**message, "content": [local(part, Path(folder)) for part in message["content"]]}
            for message in body["messages"]
        ]
        prompt = MODEL.prompt(messages)
    new = MODEL.generate(prompt, rate, max_new_tokens=body["max_tokens"])
    text = MODEL.family.processor.tokenizer.decode(new, skip_special_tokens=True)
    answer: dict[str, Any] = {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "model": NAME,
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
    }
    if mode != "untold":
        count = MODEL.inputs(prompt, rate)["input_ids"].shape[1]
        answer["usage"] = {"prompt_tokens": count, "completion_tokens": len(new), "total_tokens": count + len(new)}
    return answer


def local(part: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A part whose medium is a file, as `PrunedModel` takes it."""
    if part["type"] == "text":
        return part
    kind = part["type"].removesuffix("_url")
    head, data = part[f"{kind}_url"]["url"].split(",", 1)
    assert head.startswith(f"data:{kind}/"), head
    assert head.endswith(";base64"), head
    path = folder / f"{len(list(folder.iterdir()))}.{head.split('/')[1].split(';')[0]}"
    path.write_bytes(base64.b64decode(data))
    return {"type": kind, kind: str(path)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_address[1], flush=True)
    server.serve_forever()
