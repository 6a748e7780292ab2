"""Exit codes: one table, in the code and in docs/reliability.md; and processes that leave with theirs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from evs_train import errors
from evs_train.data import quarantine
from evs_train.errors import EXIT_CODES, EvsTrainError

ROOT = Path(__file__).resolve().parents[1]


def test_every_error_has_a_code_of_the_table() -> None:
    kinds = [kind for kind in (*vars(errors).values(), *vars(quarantine).values()) if isinstance(kind, type)]
    codes = {kind.exit_code for kind in kinds if issubclass(kind, EvsTrainError)}
    assert codes == {2, 3, 5, 74, 75}
    assert codes < EXIT_CODES.keys()


def test_the_page_has_this_table() -> None:
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    lines = page.split("## Preemption and exit codes")[1].split("\n## ")[0].splitlines()
    rows = [line for line in lines if line.startswith("| ") and line.split()[1].isdigit()]
    assert rows == [f"| {code} | {meaning} |" for code, meaning in EXIT_CODES.items()]


LEAVING = """
import atexit, os, sys
from evs_train.errors import leave
atexit.register(lambda: print("at exit"))
class Late:
    def __del__(self, write=os.write):  # of what is printed so late nothing is seen
        write(1, b"taken apart")
late = Late()
print("no end of line", end=" ")
leave(int(sys.argv[1]))
"""


def test_a_process_leaves_with_its_code_and_is_not_taken_apart() -> None:
    for code in (0, 75):
        done = subprocess.run(
            [sys.executable, "-c", LEAVING, str(code)], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stdout) == (code, "no end of line at exit\n")


def test_the_usual_way_out_takes_it_apart() -> None:
    """What `leave` is there to leave out."""
    usual = LEAVING.replace("leave(int(sys.argv[1]))", "sys.exit(int(sys.argv[1]))")
    done = subprocess.run([sys.executable, "-c", usual, "0"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "no end of line at exit\ntaken apart"
