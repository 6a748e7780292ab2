"""Metrics, pictures and curves to W&B, through a process of its own: training never waits for it and never fails by it.

That process (`tracking_worker.py`) imports wandb, is given the path of the run's record and then one message for each
log, and can be killed. A message is sent without waiting. If the process does not keep up, it is dropped; if the
process is gone, tracking has ended. Either is said once, on stderr; `metrics.jsonl` has everything.

Invariant: what goes wrong with W&B costs messages to W&B and, at the end of a run, at most `tracking.timeout` seconds
and `GRACE_SECONDS`. A run keeps its W&B id in its folder, so that a resumed one goes on under it.
Cost: a process with about 200 MB of memory; some tens of microseconds a log. Only the first process of a run tracks.
What it cannot do: say whether what was sent has reached the server.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from evs_train.config import TrackingSection
from evs_train.redaction import redact

ID_FILE = "wandb_id"
GRACE_SECONDS = 60.0
"""Beyond `tracking.timeout`, for the process to start (it imports wandb) and to end."""
_BUFFER = 4 << 20
_CACHE = "/proc/self/cwd/wandb/cache"
"""Where wandb-core keeps its log; a link to it lies in the run's folder, and must not tell where the home folder is."""
_PASSED_ON = re.compile(
    r"WANDB_(?!SERVICE$|DIR$).*|NETRC|HOME|PATH|PYTHONPATH|LANG|LC_.*|TMPDIR|XDG_.*|VIRTUAL_ENV|LD_LIBRARY_PATH|USER"
    r"|SSL_CERT_(?:FILE|DIR)|REQUESTS_CA_BUNDLE|(?:https?|all|no)_proxy",
    re.IGNORECASE,
)
"""Variables of the environment that W&B needs. Others, which it might record, it does not see."""


class Tracker:
    """One run in W&B. It does nothing before `running`, or where the recipe says `tracking.wandb: false`.

    Args:
        section: of the recipe.
        name: of the run where the section has none.
        output: the run's folder, in which `wandb/` and the run's id lie.
    """

    def __init__(self, section: TrackingSection, name: str, output: Path) -> None:
        self.section, self.name, self.output = section, section.name or name, output
        self._child: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._dropped = 0

    @contextmanager
    def running(self, record: Path, *, resumed: bool) -> Iterator[None]:
        """Track what is done within; an error that leaves it marks the W&B run as failed.

        Args:
            record: file of what is shown as the W&B run's configuration; it must hold no secrets.
            resumed: go on with the W&B run whose id is in the run's folder.
        """
        if self.section.wandb and os.environ.get("WANDB_MODE") != "disabled":
            self._begin(record, resumed)
        try:
            yield
        except BaseException:
            self._end(1)
            raise
        self._end(0)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Metrics of a step; several logs of one step are joined."""
        self._send({"log": dict(values), "step": step})

    def pictures(self, name: str, files: Sequence[Path], step: int) -> None:
        """Image files, which must stay where they are."""
        self._send({"pictures": name, "files": [str(file.absolute()) for file in files], "step": step})

    def curves(self, name: str, curves: Mapping[int, Mapping[float, float]], step: int) -> None:
        """A chart of curves, by the step at which each was drawn."""
        xs = list(next(iter(curves.values())))
        ys = [list(curves[one].values()) for one in sorted(curves)]
        self._send(
            {"curves": name, "xs": xs, "ys": ys, "keys": [f"step {one}" for one in sorted(curves)], "step": step}
        )

    def _begin(self, record: Path, resumed: bool) -> None:
        folder = Path(os.environ.get("WANDB_DIR") or self.output)
        id_file = self.output / ID_FILE
        known = id_file.read_text(encoding="ascii").strip() if resumed and id_file.is_file() else None
        run_id = known or os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
        begin = {
            "id": run_id,
            "resumed": known is not None,
            "name": redact(self.name),
            "project": os.environ.get("WANDB_PROJECT") or self.section.project,
            "tags": None if os.environ.get("WANDB_TAGS") else redact(self.section.tags),
            "record": str(record.absolute()),
            "timeout": self.section.timeout,
        }
        mine, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        mine.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
        mine.setblocking(False)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            id_file.write_text(run_id + "\n", encoding="ascii")
            self._child = subprocess.Popen(  # noqa: S603 (our own module)
                [sys.executable, "-m", "evs_train.tracking_worker", str(its.fileno())],
                cwd=folder,
                env=_environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[its.fileno()],
                start_new_session=True,  # an interrupt is for the run, which then ends tracking
            )
        except OSError as error:
            mine.close()
            _say(f"is not used: {error}")
        else:
            self._socket = mine
            self._send(begin)
        finally:
            its.close()

    def _send(self, message: Mapping[str, Any]) -> None:
        if self._socket is None:
            return
        self._hear()
        try:
            self._socket.send(json.dumps(message).encode())
        except BlockingIOError:
            self._dropped += 1
            if self._dropped == 1:
                _say("does not keep up: some logs go to metrics.jsonl alone")
        except OSError as error:  # the process is gone, or the message is larger than any that can be sent
            self._give_up(f"tracking has ended: {error.strerror}; metrics.jsonl goes on")

    def _hear(self) -> None:
        """Pass on what the process has to say."""
        assert self._socket is not None
        with suppress(BlockingIOError, ConnectionError):
            while said := self._socket.recv(1 << 16):
                _say(said.decode())

    def _end(self, exit_code: int) -> None:
        if self._child is None or self._socket is None:
            return
        self._send({"end": exit_code})
        if self._socket is None:  # sending has found it gone
            return
        seconds = self.section.timeout + GRACE_SECONDS
        try:
            self._child.wait(seconds)
        except subprocess.TimeoutExpired:
            self._give_up(f"did not end within {seconds:g} s; `wandb sync` sends what is left in {self.output}/wandb")
        else:
            self._give_up(None)

    def _give_up(self, why: str | None) -> None:
        """No more tracking; the process ends, if it has not yet."""
        assert self._socket is not None
        assert self._child is not None
        self._hear()
        if why is not None:
            _say(why)
        self._socket.close()
        self._socket = None
        self._child.kill()
        self._child.wait(GRACE_SECONDS)


def _environment() -> dict[str, str]:
    passed_on = {name: value for name, value in os.environ.items() if _PASSED_ON.fullmatch(name)}
    return {
        **passed_on,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "WANDB_ERROR_REPORTING": "false",
        "WANDB_CACHE_DIR": _CACHE,
    }


def _say(what: str) -> None:
    print(f"W&B {redact(what)}", file=sys.stderr)
