"""Two nodes on one machine: network namespaces with addresses of their own, joined by a cable (veth).

Where the kernel does not allow namespaces, two addresses of the loopback device stand in: there are still two torchrun
agents that meet by c10d, but each could reach everything of the other's. Files are shared in both cases.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
MULTINODE = ROOT / "launch" / "multinode.sh"


@dataclass
class Node:
    """A place to start processes in: a command that enters it, its address, and a port that is free there."""

    number: int
    address: str
    interface: str
    enter: list[str] = field(default_factory=list)
    port: int = 29577

    def start(self, words: Sequence[str], log: Path, **variables: str) -> subprocess.Popen[bytes]:
        """Start a command there; what it prints is appended to `log`."""
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        single = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PATH": path}
        with log.open("ab") as file:
            return subprocess.Popen(
                [*self.enter, *words],
                cwd=ROOT,
                env={**os.environ, **single, "GLOO_SOCKET_IFNAME": self.interface, **variables},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
            )


def kill(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to a process and to all that descend from it, as when a machine is switched off."""
    try:
        started = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for one in started:
        if one.is_running():
            one.kill()
    process.wait()


class NotAllowedError(Exception):
    """Why there are no namespaces here."""


@contextmanager
def namespaces() -> Iterator[list[Node]]:
    """Two network namespaces and the cable between them; they vanish with the processes that hold them.

    Raises:
        NotAllowedError: with what was refused.
    """
    holders: list[subprocess.Popen[bytes]] = []
    try:
        # The first needs a user namespace, where its user is root; the second is made inside it. For root they do, too.
        holders.append(_hold(["unshare", "--user", "--map-root-user", "--net"]))
        inside = ["nsenter", f"--target={holders[0].pid}", "--user", "--preserve-credentials"]
        holders.append(_hold([*inside, "unshare", "--net"]))
        enter = [["nsenter", f"--target={one.pid}", "--user", "--preserve-credentials", "--net"] for one in holders]
        _do([*enter[0], *f"ip link add evs0 type veth peer name evs0 netns {holders[1].pid}".split()])
        nodes = []
        for number, command in enumerate(enter):
            node = Node(number, f"10.77.0.{number + 1}", "evs0", command)
            for words in (f"addr add {node.address}/24 dev evs0", "link set evs0 up", "link set lo up"):
                _do([*command, "ip", *words.split()])
            nodes.append(node)
        yield nodes
    finally:
        for holder in holders:
            holder.kill()
            holder.wait()


def loopback() -> list[Node]:
    """Two addresses of this machine, and a port that no other test has, as it would in namespaces of its own."""
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    return [Node(number, f"127.0.0.{number + 1}", "lo", port=port) for number in range(2)]


def _hold(words: list[str]) -> subprocess.Popen[bytes]:
    """A process that does nothing in a network namespace of its own."""
    try:
        process = subprocess.Popen([*words, "sleep", "infinity"], stderr=subprocess.PIPE)
    except OSError as error:
        raise NotAllowedError(f"{words[0]}: {error.strerror}") from error
    own = os.readlink("/proc/self/ns/net")
    while process.poll() is None:
        try:
            if os.readlink(f"/proc/{process.pid}/ns/net") != own:
                return process
        except OSError:  # between two of its steps
            pass
        time.sleep(0.01)
    assert process.stderr is not None
    raise NotAllowedError(process.stderr.read().decode().strip())


def _do(words: list[str]) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NotAllowedError(f"{' '.join(words)}: {done.stderr.strip()}")
