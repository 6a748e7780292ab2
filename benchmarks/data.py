"""How fast rows and videos become batches: this loader, `qwen-vl-utils`, and decord alone, on the same files.

`pip install -e '.[bench]'`, then `OMP_NUM_THREADS=1 python -m benchmarks.data [FILE ...]` writes
`benchmarks/results/data.json` and prints a table. It renders clips of several sizes and lengths, with a key frame every
eight frames; recorded files, where those are rarer, show more of decoding. Every side is a torch DataLoader with the
same number of workers, one sample a batch, and torch and decord on one thread in each worker. Sides take turns in every
round; medians over rounds, and the spread.

| side | what a worker does for one sample |
|---|---|
| `evs_train` | this project: TrainingStream with an index as of `evs-train check`, the family's processor, collator |
| `evs_train, no index` | the same where no check was run: each video is first decoded once from end to end |
| `qwen-vl-utils` | chat template, `process_vision_info`, the same processor |
| `qwen-vl-utils, its threads` | the same with as many threads as its decord takes by itself |
| `decord and processor` | decord, chat template, processor, and nothing else: the least that this processor allows |
| `decord` | opens the file and fetches the sampled frames: the least that this decoder allows |

Before anything is timed, the sides must agree on every file: the same frames, and the same encoder input but for
rounding. Only evs_train's sides make labels, positions and pruning plans. Processor time (user and system, of workers
and their children) is given beside samples per second, since it says more on a machine that has other work.

`--samples N` measures memory instead: N samples, each of a file of its own, and the resident memory of this process,
the workers and their decoding children, over time; it is written to `benchmarks/results/data_memory.json`.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import decord
import psutil
import torch
from torch.utils.data import DataLoader, Dataset

from benchmarks.environment import environment
from evs_train.collate import Collator
from evs_train.config import ModelSection
from evs_train.data.batches import TrainingStream
from evs_train.data.index import MediaIndex
from evs_train.data.manifest import Sample, read_rows
from evs_train.data.order import DrawOrder
from evs_train.data.probe import probe_all, unknown
from evs_train.data.rows import RowReader
from evs_train.data.sampling import FrameSampling
from evs_train.data.schedule import FixedBatches
from evs_train.data.synthetic import write_dataset
from evs_train.data.video import read_video
from evs_train.data_config import DataSection
from evs_train.models.base import Family
from evs_train.models.loading import load_family
from evs_train.models.tiny import build_tiny
from evs_train.rates import Rates
from evs_train.samplers import build_sampler

RESULTS = Path(__file__).parent / "results"
RENDERED = {"224 px, 2 s": (224, 60), "448 px, 5 s": (448, 150), "640 px, 10 s": (640, 300)}
FPS = 30.0
NUM_FRAMES = 16  # even, as qwen-vl-utils wants it; then both ways of rounding choose the same frames
MAX_PIXELS = NUM_FRAMES * 448 * 448
VIDEO_KWARGS = {"size": {"shortest_edge": NUM_FRAMES * 64 * 64, "longest_edge": MAX_PIXELS}}
QUESTION, ANSWER = "<video>\nDescribe the clip.", "A red circle moves left; a blue square appears late."
PACKAGES = ("evs-train", "qwen-vl-utils", "decord2", "av", "torch", "torchvision", "transformers")
STEP = 1 / 127.5  # of normalised pixels: one step of 256
BASE = "qwen-vl-utils"

Work = Callable[[Sample], Any]


class Plain(Dataset[Any]):
    """Samples in order, each given to a function."""

    def __init__(self, samples: Sequence[Sample], work: Work) -> None:
        self.samples = samples
        self.work = work

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, number: int) -> Any:
        return self.work(self.samples[number])


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description="Speed or memory of the data loader.")
    parser.add_argument("files", nargs="*", type=Path, help="videos to measure beside the rendered clips")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--draws", type=int, default=16, help="samples of a group of files in one round of one side")
    parser.add_argument("--samples", type=int, help="measure memory over this many samples instead")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        family = load_family(
            ModelSection(path=str(build_tiny("qwen3_vl", here / "model"))),
            DataSection(rows=["none"], video_kwargs=VIDEO_KWARGS),
        )
        if args.samples:
            result, name = memory(family, here, args.samples, args.workers), "data_memory.json"
        else:
            result, name = speed(family, here, args), "data.json"
    around = environment(PACKAGES, workers=args.workers, threads_of_a_worker=1)
    result = {"environment": around, **result}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / name).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result["samples"] if args.samples else result["ratios"], indent=2))


def speed(family: Family, here: Path, args: argparse.Namespace) -> dict[str, Any]:
    """All sides in turns over each group of files."""
    groups = {name: rendered(here, name) for name in RENDERED} | ({"given files": args.files} if args.files else {})
    results, ratios = {}, {}
    for number, (name, files) in enumerate(groups.items()):
        folder = here / f"group{number}"
        samples = copies(folder / "a", files, args.draws)
        fresh = copies(folder / "b", files, args.draws)  # files of its own, made new to the index in every round
        differ = agree(family, samples[: len(files)])
        sides = loaders(family, samples, fresh, args.workers)
        results[name] = {
            "samples": len(samples),
            "bytes": sum(os.path.getsize(file) for file in files) // len(files),
            "pixels_differ_by_steps": differ,
            "sides": turns(sides, samples, fresh, args.rounds),
        }
        ratios[name] = ratios_of(results[name]["sides"])
        show(name, results[name])
    return {"num_frames": NUM_FRAMES, "rounds": args.rounds, "groups": results, "ratios": ratios}


def rendered(here: Path, name: str) -> list[Path]:
    """Two clips: one with a still background, one with noise."""
    size, frames = RENDERED[name]
    rows = write_dataset(here / f"clips{size}", num_clips=2, size=size, num_frames=frames, fps=FPS)
    return sorted((rows.parent / "clips").iterdir())


def copies(folder: Path, files: Sequence[Path], count: int) -> Sequence[Sample]:
    """At least `count` rows, each with a copy of its own of one of the files: what is kept of a file helps no other."""
    folder.mkdir(parents=True)
    rows = []
    for number in range(-(-count // len(files)) * len(files)):
        file = files[number % len(files)]
        shutil.copyfile(file, folder / f"{number}{file.suffix}")
        turns = [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}]
        rows.append({"id": str(number), "video": f"{number}{file.suffix}", "conversations": turns})
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    return read_rows([folder / "rows.json"])


def stream_of(family: Family, samples: Sequence[Sample], *, indexed: bool) -> TrainingStream:
    """One pass over the samples, as training reads them."""
    sampling, index = FrameSampling(num_frames=NUM_FRAMES), MediaIndex()
    if indexed:
        wanted = unknown(index, [("video", sample.videos[0]) for sample in samples], sampling)
        assert all(error is None for _, error in probe_all(index, wanted, sampling, 0))
    return stream_over(RowReader(samples, family, sampling, index=index))


def stream_over(reader: RowReader) -> TrainingStream:
    """One pass in micro-batches of one row."""
    count = len(reader.samples)
    return TrainingStream(reader, DrawOrder(count, seed=0), FixedBatches(count, 1, 1), quarantine=False)


def collator_of(family: Family) -> Collator:
    """As in a run with a fixed rate."""
    return Collator(Rates(build_sampler(0.75)), family.pad_token_id, family.merge_media)


def loaders(
    family: Family, samples: Sequence[Sample], fresh: Sequence[Sample], workers: int
) -> dict[str, DataLoader[Any]]:
    """Every side's loader; its workers stay, so that their start is not timed."""
    make = functools.partial(
        DataLoader, num_workers=workers, persistent_workers=workers > 0, collate_fn=first, batch_size=1
    )
    places = {sample.videos[0]: frames_of(sample) for sample in samples}
    size = {sample.videos[0]: resized(family, sample) for sample in samples}
    ours = functools.partial(make, collate_fn=collator_of(family))
    qwen = functools.partial(by_qwen, family, size)
    return {
        "evs_train": ours(stream_of(family, samples, indexed=True)),
        "evs_train, no index": ours(stream_of(family, fresh, indexed=False)),
        BASE: make(Plain(samples, functools.partial(qwen, threads=1))),
        f"{BASE}, its threads": make(Plain(samples, functools.partial(qwen, threads=0))),
        "decord and processor": make(Plain(samples, functools.partial(by_decord, family, places))),
        "decord": make(Plain(samples, functools.partial(decoded, places))),
    }


def first(batch: Sequence[Any]) -> Any:
    """Collate a batch of one."""
    return batch[0]


def by_qwen(family: Family, size: dict[Any, tuple[int, int]], sample: Sample, *, threads: int) -> Any:
    """As the model's page has it, at our processor's resolution."""
    messages, frames, metadata, options = read_by_qwen(family, size[sample.videos[0]], sample, threads)
    text = family.processor.apply_chat_template(messages, tokenize=False)
    options |= {"video_metadata": metadata, "do_resize": False, "return_tensors": "pt"}
    return dict(family.processor(text=[text], videos=frames, **options))


def read_by_qwen(
    family: Family, size: tuple[int, int], sample: Sample, threads: int
) -> tuple[list[Any], list[Any], list[Any], dict[str, Any]]:
    """Messages, videos, their metadata and the processor's options."""
    from qwen_vl_utils import process_vision_info  # noqa: PLC0415 (an extra; this side alone needs it)

    video = {"video": sample.videos[0], "nframes": NUM_FRAMES, "resized_height": size[0], "resized_width": size[1]}
    messages = [
        {**turn, "content": [{**part, **video} if part["type"] == "video" else part for part in turn["content"]]}
        for turn in sample.messages
    ]
    patch = family.config.vision_config.patch_size
    with decord_threads(threads):
        _, videos, options = process_vision_info(
            messages, image_patch_size=patch, return_video_kwargs=True, return_video_metadata=True
        )
    frames, metadata = zip(*videos, strict=True)
    return messages, list(frames), list(metadata), options


@contextmanager
def decord_threads(threads: int) -> Iterator[None]:
    """decord with so many threads for callers that do not say how many (0: as many as it likes)."""
    original = decord.VideoReader
    decord.VideoReader = functools.partial(original, num_threads=threads)
    try:
        yield
    finally:
        decord.VideoReader = original


def by_decord(family: Family, places: dict[Any, list[int]], sample: Sample) -> Any:
    """Decode and process."""
    reader = decord.VideoReader(sample.videos[0], num_threads=1)
    frames = torch.from_numpy(reader.get_batch(places[sample.videos[0]]).asnumpy()).permute(0, 3, 1, 2)
    metadata = {
        "fps": reader.get_avg_fps(),
        "frames_indices": places[sample.videos[0]],
        "total_num_frames": len(reader),
    }
    text = family.processor.apply_chat_template(list(sample.messages), tokenize=False)
    options = {"video_metadata": [metadata], "do_sample_frames": False, **VIDEO_KWARGS}
    return dict(family.processor(text=[text], videos=[frames], return_tensors="pt", videos_kwargs=options))


def decoded(places: dict[Any, list[int]], sample: Sample) -> None:
    """Decode, and hand nothing on."""
    decord.VideoReader(sample.videos[0], num_threads=1).get_batch(places[sample.videos[0]]).asnumpy()


def frames_of(sample: Sample) -> list[int]:
    """The frames that this project samples."""
    return read_video(sample.videos[0], FrameSampling(num_frames=NUM_FRAMES), verify=False).frame_indices


def resized(family: Family, sample: Sample) -> tuple[int, int]:
    """Height and width that the processor gives a clip."""
    clip = read_video(sample.videos[0], FrameSampling(num_frames=NUM_FRAMES), verify=False)
    text = family.processor.video_token
    _, rows, columns = family.prepare(text, [clip], []).media["video_grid_thw"][0].tolist()
    patch = family.config.vision_config.patch_size
    return rows * patch, columns * patch


def agree(family: Family, samples: Sequence[Sample]) -> dict[str, float]:
    """All sides read the same frames into the same ids and pixels; how far pixels differ from ours, in steps of 256.

    qwen-vl-utils resizes in floating point, our processor in integers that are cut off between rows and columns: single
    pixels beside sharp edges differ by some steps. Other frames would differ all over.
    """
    reader, differ = stream_of(family, samples, indexed=False).reader, {"qwen_largest": 0.0, "qwen_mean": 0.0}
    for number, sample in enumerate(samples):
        example = reader.read(number)
        path, size, places = sample.videos[0], resized(family, sample), frames_of(sample)
        (metadata,) = read_by_qwen(family, size, sample, 1)[2]
        assert list(metadata["frames_indices"]) == places, path
        theirs = by_qwen(family, {path: size}, sample, threads=1)
        least = by_decord(family, {path: places}, sample)
        for other in (theirs, least):
            assert torch.equal(other["input_ids"][0], example.input_ids), path
            assert torch.equal(other["video_grid_thw"], example.media["video_grid_thw"]), path
        assert torch.equal(least["pixel_values_videos"], example.media["pixel_values_videos"]), path
        apart = (theirs["pixel_values_videos"] - example.media["pixel_values_videos"]).abs() / STEP
        differ["qwen_largest"] = max(differ["qwen_largest"], round(float(apart.max()), 2))
        differ["qwen_mean"] = max(differ["qwen_mean"], round(float(apart.mean()), 4))
        assert apart.mean() < 0.25, path
        assert (apart > 1.5).float().mean() < 0.01, path
    return differ


def turns(
    sides: dict[str, DataLoader[Any]], samples: Sequence[Sample], fresh: Sequence[Sample], rounds: int
) -> dict[str, dict[str, float]]:
    """Pass over each side's samples once a round, in an order that turns. The first round warms up, uncounted."""
    times, cpu = {name: list[float]() for name in sides}, {name: list[float]() for name in sides}
    names, megabytes = list(sides), sum(os.path.getsize(str(sample.videos[0])) for sample in samples) / 1e6
    for number in range(rounds + 1):
        for sample in fresh:
            os.utime(str(sample.videos[0]))
        for name in names[number % len(names) :] + names[: number % len(names)]:
            used, begun = processor_seconds(), time.perf_counter()
            count = sum(1 for _ in sides[name])
            times[name].append(time.perf_counter() - begun)
            cpu[name].append(processor_seconds() - used)
            assert count == len(samples), name
    result = {}
    for name in names:
        seconds, used = times[name][1:], statistics.median(cpu[name][1:])
        result[name] = {
            "samples_per_second": round(len(samples) / statistics.median(seconds), 2),
            "slowest": round(len(samples) / max(seconds), 2),
            "fastest": round(len(samples) / min(seconds), 2),
            "mb_per_second": round(megabytes / statistics.median(seconds), 2),
            "cpu_ms_per_sample": round(1000 * used / len(samples), 2),
        }
    return result


def processor_seconds() -> float:
    """Of this process's children and theirs, so far; whoever is idle adds nothing."""
    used = [process.cpu_times() for process in psutil.Process().children(recursive=True)]
    return sum(one.user + one.system for one in used)


def ratios_of(sides: dict[str, dict[str, float]]) -> dict[str, float]:
    """This project against the others, by samples per second and by processor time; more than 1 is better."""
    speed = {name: side["samples_per_second"] for name, side in sides.items()}
    cpu = {name: side["cpu_ms_per_sample"] for name, side in sides.items()}
    ours, faster = "evs_train", max((name for name in sides if name.startswith(BASE)), key=lambda name: speed[name])
    return {
        "over_qwen_vl_utils": round(speed[ours] / speed[BASE], 2),
        "over_the_faster_qwen_vl_utils": round(speed[ours] / speed[faster], 2),
        "of_decord_and_processor": round(speed[ours] / speed["decord and processor"], 2),
        "of_decord": round(speed[ours] / speed["decord"], 2),
        "share_of_decoding_in_decord_and_processor": round(cpu["decord"] / cpu["decord and processor"], 2),
        "cpu_over_qwen_vl_utils": round(cpu[BASE] / cpu[ours], 2),
        "cpu_of_decord_and_processor": round(cpu["decord and processor"] / cpu[ours], 2),
    }


def show(name: str, group: dict[str, Any]) -> None:
    """One group as a table."""
    print(f"\n{name}: {group['samples']} samples of {group['bytes'] / 1e6:.2f} MB in the mean")
    print(f"{'side':32}{'samples/s':>11}{'(spread)':>18}{'MB/s':>9}{'CPU ms':>9}")
    for side, of in group["sides"].items():
        spread = f"({of['slowest']:.1f} to {of['fastest']:.1f})"
        numbers = f"{of['samples_per_second']:>11.1f}{spread:>18}{of['mb_per_second']:>9.2f}"
        print(f"{side:32}{numbers}{of['cpu_ms_per_sample']:>9.1f}")


def memory(family: Family, here: Path, count: int, workers: int) -> dict[str, Any]:
    """Resident memory while `count` samples are read, each from a file of its own (links to a few rendered clips)."""
    rows = write_dataset(here / "clips", num_clips=8, size=96)
    clips = sorted((rows.parent / "clips").iterdir())
    (here / "links").mkdir()
    listed = []
    for number in range(count):
        os.link(clips[number % len(clips)], here / "links" / f"{number}.mp4")
        talk = [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}]
        listed.append({"id": str(number), "video": f"{number}.mp4", "conversations": talk})
    (here / "links" / "rows.json").write_text(json.dumps(listed), encoding="utf-8")
    samples = read_rows([here / "links" / "rows.json"])
    collate, stream = collator_of(family), stream_over(RowReader(samples, family, FrameSampling(num_frames=8)))
    seen, begun = [], time.perf_counter()
    for number, _ in enumerate(DataLoader(stream, batch_size=1, num_workers=workers, collate_fn=collate)):
        if number % 100 == 99:
            seen.append({"samples": number + 1, **resident_megabytes()})
    means = {
        which: {part: round(statistics.mean(one[part] for one in some), 1) for part in seen[0] if part != "samples"}
        for which, some in (("first_thousand", seen[:10]), ("last_thousand", seen[-10:]))
    }
    return {"samples": {"count": count, "seconds": round(time.perf_counter() - begun), **means}, "over_time": seen}


def resident_megabytes() -> dict[str, float]:
    """Of this process, of all workers, and of all their decoding children; shared pages count in each."""
    me = psutil.Process()
    workers = me.children()
    decoders = [child for worker in workers for child in worker.children()]
    parts: dict[str, Iterable[psutil.Process]] = {"this_process": [me], "workers": workers, "decoders": decoders}
    return {part: round(sum(one.memory_info().rss for one in some) / 2**20, 1) for part, some in parts.items()}


if __name__ == "__main__":
    sys.exit(main())
