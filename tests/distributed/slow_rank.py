"""Two runs in a row with a slow decoder in the second process: `torchrun -m tests.distributed.slow_rank NOTES`.

NOTES/runs.json has the words of both. The child process that decodes gets ready `SECONDS` late there, while the other
process waits. The time-outs of all process groups, in seconds, are written to NOTES/timeouts<RANK>.json at the end.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from torch.distributed import distributed_c10d

from evs_train.uptrain import Run, leave_process_group
from tests.runs import recipe_of

SECONDS = 6

if __name__ == "__main__":
    notes, rank = Path(sys.argv[1]), os.environ["RANK"]
    if rank == "1":
        slow = notes / "python"
        slow.write_text(f'#!/bin/sh\nsleep {SECONDS}\nexec {sys.executable} "$@"\n', encoding="utf-8")
        slow.chmod(0o755)
        sys.executable = str(slow)
    for words in json.loads((notes / "runs.json").read_text(encoding="utf-8")):
        Run(recipe_of(words)).train()
    groups = [group._get_backend(torch.device("cpu")) for group in distributed_c10d._world.pg_map]
    timeouts = [group.options._timeout.total_seconds() for group in groups]
    (notes / f"timeouts{rank}.json").write_text(json.dumps(timeouts), encoding="utf-8")
    leave_process_group(together=True)
    os._exit(0)
