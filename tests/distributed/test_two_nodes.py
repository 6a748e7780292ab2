"""Two nodes, each with its own torchrun, started by launch/multinode.sh: they train as one node with two processes.

The nodes are network namespaces where the kernel allows that, and addresses of the loopback device otherwise.
"""

from __future__ import annotations

import json
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from evs_train.commit import Checkpoints
from evs_train.restore import num_generators
from tests.distributed import slow_rank
from tests.nodes import MULTINODE, Node, NotAllowedError, kill, loopback, namespaces
from tests.runs import arguments, metrics, torchrun

# The time-outs are those of a machine that has ten times as much to do as it can.
pytestmark = pytest.mark.timeout(900)

STEPS = 16
SAVE_EVERY = 4
MINUTES = 2.5
SAME = ("step", "loss", "grad_norm", "learning_rate", "evs/rate", "evs/video_tokens_after", "evs/supervised_tokens")


@pytest.fixture(scope="module")
def nodes() -> Iterator[list[Node]]:
    try:
        with namespaces() as allowed:
            yield allowed
    except NotAllowedError:
        yield loopback()


@pytest.fixture(scope="module")
def words_of(tiny_checkpoint: Callable[[str], Path], mixed_rows: Path) -> Callable[..., list[str]]:
    def words(output: Path, deepspeed: str | None, **options: Any) -> list[str]:
        settings: dict[str, Any] = {
            "deepspeed": deepspeed,
            "train__steps": STEPS,
            "train__batch_size": 1,
            "evs__rate": {"kind": "uniform", "min": 0.2, "max": 0.8},
            **options,
        }
        return arguments(tiny_checkpoint("qwen3_vl"), mixed_rows, output, **settings)

    return words


def start(node: Node, nodes: list[Node], words: list[str], log: Path, **variables: str) -> subprocess.Popen[bytes]:
    settings = {
        "NNODES": "2",
        "NODE_RANK": str(node.number),
        "HEAD": nodes[0].address,
        "PORT": str(nodes[0].port),
        "NPROC": "1",
        "RDZV_CONF": "keep_alive_interval=1",  # a lost node is known after three of these seconds
    }
    return node.start([str(MULTINODE), *words], log, **settings | variables)


def curve(output: Path) -> list[dict[str, Any]]:
    return [{name: line[name] for name in SAME} for line in metrics(output)]


def both_end(processes: list[subprocess.Popen[bytes]], log: Path, seconds: float) -> list[int]:
    """Exit codes, once both are done."""
    try:
        deadline = time.monotonic() + seconds
        return [process.wait(max(deadline - time.monotonic(), 0.1)) for process in processes]
    except subprocess.TimeoutExpired:
        raise AssertionError(f"not done after {seconds:g} s:\n{log.read_text()[-6000:]}") from None
    finally:
        for process in processes:
            kill(process)


def test_the_nodes_are_apart() -> None:
    """What the other tests run on; skipped where they run on the loopback device."""
    try:
        with namespaces() as nodes:
            listing = "python3 -c 'import socket; s = socket.create_server((\"0.0.0.0\", 29578)); s.accept()'"
            server = subprocess.Popen([*nodes[0].enter, "sh", "-c", listing])
            asking = "import socket, sys; socket.create_connection((sys.argv[1], 29578), 5)"

            def reached(address: str) -> bool:
                words = [*nodes[1].enter, "python3", "-c", asking, address]
                return subprocess.run(words, capture_output=True, check=False).returncode == 0

            try:
                assert not reached("127.0.0.1")
                deadline = time.monotonic() + 20
                while not reached(nodes[0].address):
                    assert time.monotonic() < deadline
            finally:
                kill(server)
    except NotAllowedError as error:
        pytest.skip(f"no network namespaces here: {error}")


@pytest.fixture(scope="module")
def one_node(words_of: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes on one node left, of which one has a slow decoder: the references `ddp` and `zero2`."""
    folder = tmp_path_factory.mktemp("one")
    modes = {"ddp": None, "zero2": "zero2"}
    runs = [words_of(folder / name, mode, train__timeout_minutes=MINUTES) for name, mode in modes.items()]
    (folder / "runs.json").write_text(json.dumps(runs), encoding="utf-8")
    done = torchrun([str(folder)], 2, program=("-m", "tests.distributed.slow_rank"))
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def test_a_slow_video_on_one_rank_delays_the_others_and_no_more(one_node: Path) -> None:
    """All groups wait as long as the recipe says, DeepSpeed's, too."""
    assert max(line["time/data"] for line in metrics(one_node / "ddp")) > slow_rank.SECONDS - 1
    for rank in range(2):
        timeouts = json.loads((one_node / f"timeouts{rank}.json").read_text())
        assert len(timeouts) >= 2, "DeepSpeed has no group of its own"
        assert set(timeouts) == {60 * MINUTES}


def until_logged(output: Path, num_steps: int, processes: list[subprocess.Popen[bytes]], log: Path) -> None:
    """Wait for so many steps. All processes are ended where they do not come, or come too late to be stopped."""
    deadline = time.monotonic() + 400
    try:
        while not (output / "metrics.jsonl").exists() or len(metrics(output)) < num_steps:
            assert all(process.poll() is None for process in processes), log.read_text()[-6000:]
            assert time.monotonic() < deadline, log.read_text()[-6000:]
            time.sleep(0.02)
    except BaseException:
        for process in processes:
            kill(process)
        raise


def test_nodes_that_are_told_to_end_save_and_go_on(
    nodes: list[Node], words_of: Callable[..., list[str]], one_node: Path, tmp_path: Path
) -> None:
    """SIGTERM to each multinode.sh, as Slurm does it; then the same command. The losses are those of one node."""
    output, log = tmp_path / "run", tmp_path / "log"
    words = words_of(output, None, train__save_every=None)
    told = [start(node, nodes, words, log) for node in nodes]
    until_logged(output, 2, told, log)
    for process in told:
        process.terminate()
    assert both_end(told, log, 400) == [75, 75], log.read_text()[-6000:]
    (saved,) = output.glob("checkpoint-*")
    step = metrics(output)[-1]["step"]
    assert step < STEPS, "told too late"
    assert saved.name == f"checkpoint-{step}"
    assert Checkpoints(output).newest_whole().path == saved
    assert num_generators(saved) == len(nodes), "a rank has not saved"
    assert log.read_text().count(f"error: told to end by a signal; step {step} is saved in {output}") == 1
    again = [start(node, nodes, words, log) for node in nodes]
    assert both_end(again, log, 400) == [0, 0], log.read_text()[-6000:]
    assert curve(output) == curve(one_node / "ddp")
    assert not (output / "older").exists(), "it began anew"


def test_a_node_that_is_killed_and_started_again_resumes(
    nodes: list[Node], words_of: Callable[..., list[str]], one_node: Path, tmp_path: Path
) -> None:
    """The other node's torchrun lives on and starts its process again; the losses are those of a run without a kill."""
    output, log = tmp_path / "run", tmp_path / "log"
    words = words_of(output, "zero2", train__save_every=SAVE_EVERY)
    survivor, lost = (start(node, nodes, words, log) for node in nodes)
    until_logged(output, SAVE_EVERY + 1, [survivor, lost], log)
    kill(lost)
    killed = time.time()
    assert len(metrics(output)) < STEPS, "killed too late"
    again = start(nodes[1], nodes, words, log)
    assert both_end([survivor, again], log, 400) == [0, 0], log.read_text()[-6000:]
    assert curve(output) == curve(one_node / "zero2")
    trained_again = [line["step"] for line in metrics(output) if line["time"] > killed]
    assert trained_again[0] > SAVE_EVERY, "it began anew"
    assert not (output / "older").exists()


def test_without_node_0_the_others_end(nodes: list[Node], words_of: Callable[..., list[str]], tmp_path: Path) -> None:
    """It hosts the meeting point. What starts all again then sees a code that is neither 0 nor 75."""
    output, log = tmp_path / "run", tmp_path / "log"
    lost, other = (start(node, nodes, words_of(output, None), log) for node in nodes)
    until_logged(output, 1, [lost, other], log)
    kill(lost)
    (code,) = both_end([other], log, 400)
    assert code == 1, log.read_text()[-6000:]


def test_folders_that_are_not_the_same_are_refused(nodes: list[Node], tmp_path: Path) -> None:
    """As with a folder on each node's own disk: every process says who does not see what process 0 wrote."""
    meeting = "--rdzv-backend c10d --rdzv-id folders --rdzv-endpoint {}:{} --rdzv-conf is_host={} --local-addr {}"
    processes, logs = [], []
    for node, name in zip(nodes, (nodes[0].address, "~1"), strict=True):
        options = meeting.format(nodes[0].address, nodes[0].port, int(node.number == 0), name).split()
        program = ["-m", "tests.distributed.folder_worker", str(tmp_path / f"disk{node.number}" / "run")]
        logs.append(tmp_path / f"log{node.number}")
        processes.append(node.start(["torchrun", "--nnodes", "2", *options, *program], logs[-1]))
    assert both_end(processes, logs[0], 120) == [1, 1]
    for log in logs:
        text = log.read_text()
        assert f"error: process 1 on {socket.gethostname()}: output_dir: {tmp_path / 'disk1' / 'run'} is not" in text
        assert "process 0 on" not in text.split(": output_dir")[0], text
        assert "exitcode  : 2" in text
    assert not list(tmp_path.glob("disk*/run/*"))
