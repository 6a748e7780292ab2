"""Published benchmarks, read from the folders that they are unpacked to, with their authors' prompts.

| layout | questions | videos | read |
|---|---|---|---|
| `videomme` | videomme/*.parquet | data/VIDEOID.mp4 (.MP4, .mkv) | BradyFU/Video-MME, README.md; lmms-eval, videomme |
| `mvbench` | json/TASK.json | video/FOLDER/..., `_MVBENCH` | OpenGVLab/Ask-Anything, video_chat2/mvbench.ipynb |
| `tempcompass` | questions/TASK.json | videos/ID.mp4 | llyx97/TempCompass, run_qwen2_vl.py, eval_*.py, questions/ |
| `longvideobench` | lvb_val.json | videos/VIDEO_PATH | longvideobench/LongVideoBench, longvideobench_dataset.py |
| `mlvu` | json/N_TASK.json | video/N_TASK/... | JUNJIE99/MLVU, videochat2/choice_bench.py; FlagEvalMM, mlvu |
| `egoschema` | questions.json, subset_answers.json | videos/Q_UID.mp4 | egoschema/EgoSchema, README.md; lmms-eval, egoschema |

None of the data sets themselves was seen, only the code and pages named. All are asked without subtitles. What is not
asked: questions without a published answer (the rest of EgoSchema, LongVideoBench's test split), and those that another
model would have to judge (TempCompass' captions, MLVU's sub-scenes and summaries).

Invariant: a question's text is what the authors' own evaluation asks, where its options stand in it, too. Cost: the
files of questions are read once, and each video is looked up.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from evs_train.data.formats import kind_of
from evs_train.data.manifest import Problem
from evs_train.data.media import MediaFinder
from evs_train.data.readers import read_file
from evs_train.data.sources import frame_files
from evs_train.errors import DataError
from evs_train.evaluate.data import LETTER_REQUEST, LETTERS, Asked, Question, assemble, lettered, refuse, rows_of
from evs_train.evaluate.options import EvalOptions, Layout

Found = Iterator[tuple[Asked | Problem, MediaFinder]]

_OPTIONS = "({}) {}"  # as MVBench and MLVU write them
_MVBENCH_SYSTEM = (
    "Carefully watch the video and pay attention to the cause and sequence of events, the detail and movement of "
    "objects, and the action and pose of persons. Based on your observations, select the best option that accurately "
    "addresses the question."
)
_MLVU_SYSTEM = (
    "Carefully watch this video and pay attention to every detail. Based on your observations, select the best option "
    "that accurately addresses the question."
)
_VIDEOMME_REQUEST = (
    "Select the best answer to the following multiple-choice question based on the video. "
    "Respond with only the letter (A, B, C, or D) of the correct option."
)

# Of each file of questions the folder of its videos. The frames of tvqa are three a second.
_MVBENCH = {
    "action_sequence": "star/Charades_v1_480",
    "action_prediction": "star/Charades_v1_480",
    "action_antonym": "ssv2_video",
    "fine_grained_action": "Moments_in_Time_Raw/videos",
    "unexpected_action": "FunQA_test/test",
    "object_existence": "clevrer/video_validation",
    "object_interaction": "star/Charades_v1_480",
    "object_shuffle": "perception/videos",
    "moving_direction": "clevrer/video_validation",
    "action_localization": "sta/sta_video",
    "scene_transition": "scene_qa/video",
    "action_count": "perception/videos",
    "moving_count": "clevrer/video_validation",
    "moving_attribute": "clevrer/video_validation",
    "state_change": "perception/videos",
    "fine_grained_pose": "nturgbd",
    "character_order": "perception/videos",
    "egocentric_navigation": "vlnqa",
    "episodic_reasoning": "tvqa/frames_fps3_hq",
    "counterfactual_inference": "clevrer/video_validation",
}
_MVBENCH_FRAMES_FPS = 3.0
_TEMPCOMPASS = {
    "multi-choice": "\nPlease directly give the best option:",
    "yes_no": "\nPlease answer yes or no:",
    "caption_matching": "\nPlease directly give the best option:",
}
_MLVU = ("1_plotQA", "2_needle", "3_ego", "4_count", "5_order", "6_anomaly_reco", "7_topic_reasoning")


def read_questions(options: EvalOptions) -> tuple[list[Question], dict[str, str]]:
    """What is asked, and what had to be left out of it, by where it stands.

    Raises:
        DataError, MediaError: naming up to 20 of the questions that cannot be asked, unless they may be left out.
    """
    questions, problems = assemble(LAYOUTS[options.layout](options))
    if options.on_error == "raise" or not questions:
        refuse(problems)
    if not questions:
        raise DataError(f"{options.data[0]}: no question is there")
    return questions[: options.limit], {problem.message: problem.message for problem in problems}


def _rows(options: EvalOptions) -> Found:
    return rows_of(options.rows_section(), spoken=options.choices == "texts")


def _videomme(options: EvalOptions) -> Found:
    root = _folder(options)
    for path in sorted((root / "videomme").glob("*.parquet")):
        for number, row in read_file(path):
            name = _text(row, "videoID", path, number)
            names = [name + suffix for suffix in (".mp4", ".MP4", ".mkv")]
            video = next((one for one in names if (root / "data" / one).is_file()), names[0])
            choices = [_text({"option": one}, "option", path, number) for one in _list(row, "options", path, number)]
            lines = [_VIDEOMME_REQUEST, _text(row, "question", path, number), *choices, "The best answer is:"]
            types = [_text(row, key, path, number) for key in ("task_type", "duration")]
            yield (
                _asked(
                    f"{path} row {number}",
                    _text(row, "question_id", path, number),
                    video,
                    "\n".join(lines),
                    LETTERS[: len(choices)],
                    _text(row, "answer", path, number),
                    types,
                ),
                MediaFinder(str(root / "data")),
            )


def _mvbench(options: EvalOptions) -> Found:
    root = _folder(options)
    for path in sorted((root / "json").glob("*.json")):
        if path.stem not in _MVBENCH:
            raise DataError(f"{path}: no task of MVBench", f"its tasks are {', '.join(_MVBENCH)}")
        folder = root / "video" / _MVBENCH[path.stem]
        for number, row in read_file(path):
            video: Any = _text(row, "video", path, number)
            if (folder / video).is_dir():
                video = [f"{video}/{Path(frame).name}" for frame in frame_files(folder / video)]
            segment = (float(row["start"]), float(row["end"])) if "start" in row and "end" in row else None
            finder = MediaFinder(str(folder), frames_fps=_MVBENCH_FRAMES_FPS)
            yield _bracketed(path, number, row, video, path.stem, _MVBENCH_SYSTEM, segment), finder


def _mlvu(options: EvalOptions) -> Found:
    root = _folder(options)
    for task in _MLVU:
        path = root / "json" / f"{task}.json"
        if path.is_file():
            for number, row in read_file(path):
                video, kind = (_text(row, key, path, number) for key in ("video", "question_type"))
                finder = MediaFinder(str(root / "video" / task))
                yield _bracketed(path, number, row, video, kind, _MLVU_SYSTEM, None), finder


def _bracketed(
    path: Path, number: Any, row: Any, video: Any, kind: str, system: str, segment: tuple[float, float] | None
) -> Asked | Problem:
    """A question of MVBench or MLVU, whose answers open with "Best option:(" and go on with a letter."""
    candidates = [str(one) for one in _list(row, "candidates", path, number)]
    answer = str(row.get("answer"))
    if answer not in candidates:
        return DataError(f"{path} row {number}: the answer {answer!r} is none of its candidates")
    question = _text(row, "question", path, number)
    text = f"{system}\nQuestion: {question}\nOptions:\n{lettered(candidates, _OPTIONS)}\nOnly give the best option."
    letters = LETTERS[: len(candidates)]
    right = letters[candidates.index(answer)]
    where = f"{path} row {number}"
    return _asked(
        where, f"{path.stem}:{number}", video, text, letters, right, [kind], prefix="Best option:(", segment=segment
    )


def _tempcompass(options: EvalOptions) -> Found:
    root = _folder(options)
    finder = MediaFinder(str(root / "videos"))
    for task, request in _TEMPCOMPASS.items():
        path = root / "questions" / f"{task}.json"
        for video, aspects in _json(path, dict).items() if path.is_file() else ():
            for aspect, asked in aspects.items():
                for number, row in enumerate(asked, start=1):
                    where = f"{path} {video} {aspect} {number}"
                    text, answer = (
                        _text(row, key, path, f"{video} {aspect} {number}") for key in ("question", "answer")
                    )
                    names = _named_options(task, text)
                    right = next((name for name in names if re.match(rf"{re.escape(name)}\b", answer)), answer)
                    yield (
                        _asked(
                            where, f"{task}:{video}:{aspect}:{number}", f"{video}.mp4", text + request, names, right,
                            [task, aspect],
                        ),
                        finder,
                    )  # fmt: skip


def _named_options(task: str, question: str) -> tuple[str, ...]:
    """What the options of a question of TempCompass are called: A, B; Caption A, Option 1, Sentence B; yes, no."""
    if task == "yes_no":
        return "yes", "no"
    ending = r"\." if task == "multi-choice" else ":"
    names = re.findall(rf"^((?:\w+ )?[A-Z0-9]){ending}", question, flags=re.MULTILINE)
    return tuple(names)


def _longvideobench(options: EvalOptions) -> Found:
    root = _folder(options)
    path = root / "lvb_val.json"
    for number, row in read_file(path):
        candidates = [str(one) for one in _list(row, "candidates", path, number)]
        question = _text(row, "question", path, number)
        correct = row.get("correct_choice")
        right = LETTERS[correct] if isinstance(correct, int) and 0 <= correct < len(candidates) else str(correct)
        types = [_text(row, "question_category", path, number), f"{row.get('duration_group')} s"]
        yield (
            _asked(
                f"{path} row {number}",
                _text(row, "id", path, number),
                _text(row, "video_path", path, number),
                f"Question: {question}\n{lettered(candidates)}\n{LETTER_REQUEST}",
                LETTERS[: len(candidates)],
                right,
                types,
            ),
            MediaFinder(str(root / "videos")),
        )


def _egoschema(options: EvalOptions) -> Found:
    root = _folder(options)
    answers = _json(root / "subset_answers.json", dict)
    path = root / "questions.json"
    for number, row in read_file(path):
        uid = _text(row, "q_uid", path, number)
        if uid in answers:
            candidates = [_text(row, f"option {place}", path, number) for place in range(5)]
            yield (
                _asked(
                    f"{path} row {number}",
                    uid,
                    f"{uid}.mp4",
                    f"{_text(row, 'question', path, number)}\n{lettered(candidates)}\n{LETTER_REQUEST}",
                    LETTERS[:5],
                    LETTERS[int(answers[uid])],
                    [],
                ),
                MediaFinder(str(root / "videos")),
            )


LAYOUTS: dict[Layout, Callable[[EvalOptions], Found]] = {
    "rows": _rows,
    "videomme": _videomme,
    "mvbench": _mvbench,
    "tempcompass": _tempcompass,
    "longvideobench": _longvideobench,
    "mlvu": _mlvu,
    "egoschema": _egoschema,
}
"""Reader of each layout by its name, which `layout` takes."""


def _asked(
    source: str,
    question_id: str,
    video: Any,
    text: str,
    choices: Any,
    right: str,
    types: list[str],
    prefix: str = "",
    segment: tuple[float, float] | None = None,
) -> Asked:
    turn = {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": text}]}
    return Asked(
        id=question_id,
        source=source,
        messages=(turn,),
        videos=(video,),
        answers=(right,),
        choices=tuple(choices),
        types=tuple(types),
        prefix=prefix,
        segment=segment,
    )


def _folder(options: EvalOptions) -> Path:
    folder = Path(options.data[0])
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder", f"layout={options.layout} reads the folder that it was unpacked to")
    return folder


def _json(path: Path, kind: type) -> Any:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}", "is it the folder of this benchmark?") from error
    except ValueError as error:
        raise DataError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, kind):
        raise DataError(f"{path}: holds {kind_of(value)}, not the questions of this benchmark")
    return value


def _text(row: Any, key: str, path: Path, number: Any) -> str:
    if not isinstance(row, dict) or not isinstance(row.get(key), str):
        found = kind_of(row.get(key)) if isinstance(row, dict) else kind_of(row)
        raise DataError(f'{path} row {number}: "{key}" is {found}', "is it the file of this benchmark?")
    return str(row[key])


def _list(row: Any, key: str, path: Path, number: Any) -> list[Any]:
    if not isinstance(row, dict) or not isinstance(row.get(key), list):
        raise DataError(f'{path} row {number}: "{key}" is no list', "is it the file of this benchmark?")
    return list(row[key])
