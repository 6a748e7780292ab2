"""launch/uptrain.py with a slow decoder in its second process: `torchrun -m tests.distributed.slow_rank NOTES WORDS`.

The child process that decodes gets ready `SECONDS` late there, while the other process waits. The time-outs of all
process groups, in seconds, are written to NOTES/timeouts.json when training is done.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from torch.distributed import distributed_c10d

from evs_train import uptrain
from launch.uptrain import main

SECONDS = 6

if __name__ == "__main__":
    notes, words = Path(sys.argv[1]), sys.argv[2:]
    if os.environ["RANK"] == "1":
        slow = notes / "python"
        slow.write_text(f'#!/bin/sh\nsleep {SECONDS}\nexec {sys.executable} "$@"\n', encoding="utf-8")
        slow.chmod(0o755)
        sys.executable = str(slow)
    leave = uptrain.leave_process_group

    def noted(*, together: bool = False) -> None:
        if os.environ["RANK"] == "0":
            groups = [group._get_backend(torch.device("cpu")) for group in distributed_c10d._world.pg_map]
            timeouts = [group.options._timeout.total_seconds() for group in groups]
            (notes / "timeouts.json").write_text(json.dumps(timeouts), encoding="utf-8")
        leave(together=together)

    uptrain.leave_process_group = noted
    sys.exit(main(words))
