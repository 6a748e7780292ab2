"""The process that speaks to W&B: `python -m evs_train.tracking_worker SOCKET`, see `tracking.py`.

It is started in the folder that W&B's files go to, with an environment that holds what W&B needs and nothing else, and
its command line says nothing of the run. W&B is told not to collect what it finds out about the machine: host, user,
program, arguments, git, packages. It knows its folder as /proc/self/cwd, so that its logs do not tell where that is.

Invariant: it ends within `tracking.timeout` and `_HARD_SECONDS` of the run's end, however that came about; what is not
sent by then is on disk, for `wandb sync`. Cost: what wandb takes. A second process, wandb-core, belongs to it.
"""

from __future__ import annotations

import json
import netrc
import os
import queue
import socket
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

_MESSAGE = 4 << 20
_HARD_SECONDS = 50.0
_STEP = "step"
"""The optimizer step, by which W&B draws. Its own count goes on from the last one that it has (seen: `wandb sync`)."""

Message = dict[str, Any]


def main() -> None:
    """Read messages for ever, so that the run's socket does not fill up, and work through them on another thread."""
    connection = socket.socket(fileno=int(sys.argv[1]))
    messages: queue.SimpleQueue[Message] = queue.SimpleQueue()
    begin: Message = json.loads(connection.recv(_MESSAGE) or b"{}")
    if not begin:
        return
    threading.Thread(target=_work, args=(begin, messages, connection), daemon=True).start()
    message: Message = {}
    while "end" not in message:
        received = connection.recv(_MESSAGE)
        message = json.loads(received) if received else {"end": 1}  # the run is gone without a word
        messages.put(message)
    threading.Event().wait(begin["timeout"] + _HARD_SECONDS)  # `_work` ends this process before
    _say(connection, "did not end in time; `wandb sync` sends what is on disk")
    os._exit(1)  # wandb would wait for its own process first


def _work(begin: Message, messages: queue.SimpleQueue[Message], connection: socket.socket) -> None:
    try:
        import wandb  # noqa: PLC0415 (seconds; messages are received meanwhile)

        run = _begun(wandb, begin, connection)
        while "end" not in (message := messages.get()):
            _pass_on(wandb, run, message)
        run.finish(exit_code=message["end"])
        wandb.teardown()
    except Exception as error:  # noqa: BLE001 (whatever it is, it is W&B's, and must be said rather than raised)
        _say(connection, f"tracking has ended: {_reason(error)}; metrics.jsonl goes on")
        os._exit(1)
    os._exit(0)


def _begun(wandb: Any, begin: Message, connection: socket.socket) -> Any:
    """The W&B run, offline where the server does not take it in time. Raises what wandb raises offline."""
    mode = os.environ.get("WANDB_MODE") or ("online" if _has_key() else "offline")
    try:
        run = _init(wandb, begin, mode)
    except Exception as error:  # wandb raises errors of many kinds for the same thing
        if mode == "offline":
            raise
        _say(connection, f"cannot be used and runs offline (`wandb sync` sends it later): {_reason(error)}")
        wandb.teardown()  # wandb-core would not begin a second run of this id
        return _init(wandb, begin, "offline")
    if mode == "online":
        _say(connection, f"run: {run.url}")
    return run


def _init(wandb: Any, begin: Message, mode: str) -> Any:
    settings = wandb.Settings(
        mode=mode,
        root_dir="/proc/self/cwd",
        run_id=begin["id"],
        resume="allow" if begin["resumed"] else None,
        init_timeout=begin["timeout"],
        finish_timeout=begin["timeout"],
        console="off",
        silent=True,
        disable_git=True,
        disable_code=True,
        save_code=False,
        label_disable=True,
        host="",
        username="",
        email="",
        program="",
        x_disable_meta=True,
        x_disable_machine_info=True,
        x_save_requirements=False,
        x_stats_pid=os.getppid(),
    )
    config = json.loads(Path(begin["record"]).read_text(encoding="utf-8"))
    run = wandb.init(
        project=begin["project"], name=begin["name"], tags=begin["tags"] or None, config=config, settings=settings
    )
    run.define_metric("*", step_metric=_STEP)
    return run


def _pass_on(wandb: Any, run: Any, message: Message) -> None:
    step = message["step"]
    if "log" in message:
        run.log({**message["log"], _STEP: step}, step=step)
    elif "pictures" in message:
        pictures = [wandb.Image(file) for file in message["files"]]
        run.log({message["pictures"]: pictures, _STEP: step}, step=step)
    else:
        chart = wandb.plot.line_series(
            message["xs"],
            message["ys"],
            keys=message["keys"],
            title="accuracy against pruning rate",
            xname="pruning rate",
        )
        run.log({message["curves"]: chart, _STEP: step}, step=step)


def _has_key(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether there is a key for the server in use; without one W&B would ask for it."""
    if environment.get("WANDB_API_KEY"):
        return True
    host = urlsplit(environment.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    file = Path(environment.get("NETRC", Path.home() / ".netrc"))
    try:
        return netrc.netrc(file).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _reason(error: Exception) -> str:
    """First line of an error's text."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _say(connection: socket.socket, what: str) -> None:
    try:
        connection.send(what.encode())
    except OSError:
        return  # nobody is left to hear it


if __name__ == "__main__":
    main()
