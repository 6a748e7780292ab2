"""A process that asks whether FOLDER is the others', too: `torchrun -m tests.distributed.folder_worker FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path

from evs_train import processes
from evs_train.errors import EvsTrainError, leave, report

if __name__ == "__main__":
    processes.SEEN_WITHIN_SECONDS = 1.0
    processes.connect_on_cpu(minutes=1.0)
    try:
        processes.share_folder(Path(sys.argv[1]))
    except EvsTrainError as error:
        leave(report(error))
    print("shared")
    leave(0)
