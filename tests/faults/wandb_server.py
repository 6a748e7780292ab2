"""A local server that stands in for W&B's: it answers as much of its API as a run needs, or misbehaves."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Server:
    """Answers until `silent` is set; `seen` holds the bodies of all requests, `history` what one run has logged.

    As W&B's does, it takes lines of a history where the client says that they belong, over those that are there, and
    says how many there are when a run is resumed (read: wandb/wandb, core/internal/filestream and runbranch/resume.go).
    """

    def __init__(self, status: int = 200) -> None:
        self.silent = threading.Event()
        self.seen: list[bytes] = []
        self.history: list[dict[str, Any]] = []
        self.over = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length") or 0))
                server.seen.append(self.path.encode() + b" " + str(self.headers).encode() + body)
                if server.silent.is_set():
                    server.over.wait(60)
                    return
                answer = json.dumps(server.take(self.path, body)).encode()
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            do_GET = do_PUT = do_POST

            def log_message(self, *args: object) -> None: ...

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    @contextmanager
    def running(self) -> Iterator[Server]:
        thread = threading.Thread(target=self._http.serve_forever, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.over.set()
            self._http.shutdown()
            self._http.server_close()

    def take(self, path: str, body: bytes) -> dict[str, Any]:
        """What wandb-core 0.31 needs of W&B's API to begin, to resume, to log and to end a run."""
        count = len(self.history)
        if path.endswith("file_stream"):
            sent = json.loads(body).get("files", {}).get("wandb-history.jsonl", {"offset": 0, "content": []})
            lines = [json.loads(line) for line in sent["content"]]
            self.history[sent["offset"] : sent["offset"] + len(lines)] = lines
            return {}
        if b"UpsertBucket" in body:
            asked = json.loads(body)["variables"]
            project = {"name": "p", "entity": {"name": "e"}}
            bucket = {"id": "aWQ=", "name": asked["name"], "displayName": "run", "project": project}
            return {"data": {"upsertBucket": {"bucket": bucket | {"historyLineCount": count}, "inserted": count == 0}}}
        if b"RunResumeStatus" in body:
            counts = {"historyLineCount": count, "eventsLineCount": 0, "logLineCount": 0}
            tails = {"historyTail": json.dumps([json.dumps(line) for line in self.history[-1:]]), "eventsTail": "[]"}
            kept = {"summaryMetrics": "{}", "config": "{}", "wandbConfig": '{"t": 1}', "tags": [], "notes": ""}
            bucket = {"id": "aWQ=", "name": "n", "displayName": "run", **counts, **tails, **kept} if count else None
            return {"data": {"model": {"id": "x", "name": "p", "entity": {"id": "e", "name": "e"}, "bucket": bucket}}}
        if b"CreateRunFiles" in body:
            return {"data": {"createRunFiles": {"runID": "x", "uploadHeaders": [], "files": []}}}
        return {"data": {}}


@contextmanager
def mute_port() -> Iterator[str]:
    """Address of a port that takes connections and never answers."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(64)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


def closed_port() -> str:
    """Address of a port that refuses connections."""
    with socket.socket() as once:
        once.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{once.getsockname()[1]}"
