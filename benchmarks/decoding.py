"""What decoding in a child process costs: the same clips decoded in this process and in the child, in turns.

`OMP_NUM_THREADS=1 python benchmarks/decoding.py [FILE ...]` prints JSON; without files it renders two clips. Times are
the best of the rounds, in milliseconds per clip, and the mean of processor time (of both processes), whose clock ticks
every 10 ms in the child. Each sums all pixels, so that none stays unread. `verify` is off: it costs the same in both.
"""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
import time
from pathlib import Path

from evs_train.data.decode import read_video as read_here
from evs_train.data.decoded import Sink
from evs_train.data.decoding import DECODER, DEFAULTS
from evs_train.data.sampling import FrameSampling
from evs_train.data.synthetic import write_dataset
from evs_train.data.video import read_video

ROUNDS = 30
SAMPLINGS = {"8 frames": FrameSampling(num_frames=8), "2 per second": FrameSampling(fps=2.0)}


def main() -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(name) for name in sys.argv[1:]] or _rendered(Path(folder))
        result: dict[str, object] = {"start": _start(files[0]), "clips": {}}
        result["clips"] = {f"{file}, {name}": _clip(file, one) for file in files for name, one in SAMPLINGS.items()}
    print(json.dumps(result, indent=2))


def _rendered(folder: Path) -> list[Path]:
    rows = [
        write_dataset(folder / "small", num_clips=1, size=96),
        write_dataset(folder / "large", num_clips=1, size=480, num_frames=120),
    ]
    return [path.parent / "clips/000000.mp4" for path in rows]


def _start(file: Path) -> dict[str, float]:
    """Seconds until a new child has decoded its first clip, and what it then occupies."""
    begun = time.perf_counter()
    read_video(file, FrameSampling(num_frames=1), verify=False)
    seconds = time.perf_counter() - begun
    status = dict(line.split(":", 1) for line in Path(f"/proc/{DECODER.pid}/status").read_text().splitlines())
    return {"seconds": round(seconds, 3), "rss_mb": round(int(status["VmRSS"].split()[0]) / 1024)}


def _here(file: Path, sampling: FrameSampling) -> int:
    options = {"verify": False, "suits_decord": False, "decoding": DEFAULTS, "sink": Sink()}
    return int(read_here(str(file), sampling, **options).frames.sum())


def _in_child(file: Path, sampling: FrameSampling) -> int:
    return int(read_video(file, sampling, verify=False).frames.sum())


def _cpu() -> float:
    """Seconds of processor time of this process and its child so far."""
    fields = Path(f"/proc/{DECODER.pid}/stat").read_text().rsplit(") ", 1)[1].split()
    return time.process_time() + (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _clip(file: Path, sampling: FrameSampling) -> dict[str, object]:
    calls = {"in_process": _here, "child": _in_child}
    best, cpu = dict.fromkeys(calls, math.inf), dict.fromkeys(calls, 0.0)
    for _ in range(ROUNDS):
        for name, call in calls.items():
            cpu_before, begun = _cpu(), time.perf_counter()
            call(file, sampling)
            best[name] = min(best[name], 1000 * (time.perf_counter() - begun))
            cpu[name] += 1000 * (_cpu() - cpu_before) / ROUNDS
    return {
        "shape": list(read_video(file, sampling, verify=False).frames.shape),
        **{f"{name}_ms": round(ms, 2) for name, ms in best.items()},
        "overhead_percent": round(100 * (best["child"] / best["in_process"] - 1), 1),
        **{f"{name}_cpu_ms": round(ms, 2) for name, ms in cpu.items()},
        "child_samples_per_second": round(1000 / best["child"], 1),
    }


if __name__ == "__main__":
    main()
