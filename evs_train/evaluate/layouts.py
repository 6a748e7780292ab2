"""Published benchmarks, read from the folders that they are unpacked to, with their authors' prompts.

| layout | questions | videos | read |
|---|---|---|---|
| `videomme` | videomme/*.parquet | data/VIDEOID.mp4 (.MP4, .mkv) | BradyFU/Video-MME, README.md; lmms-eval, videomme |
| `mvbench` | json/TASK.json | video/FOLDER/..., `_MVBENCH` | OpenGVLab/Ask-Anything, video_chat2/mvbench.ipynb |
| `tempcompass` | questions/TASK.json | videos/ID.mp4 | llyx97/TempCompass, run_qwen2_vl.py, eval_*.py, questions/ |
| `longvideobench` | lvb_val.json | videos/VIDEO_PATH | longvideobench/LongVideoBench, longvideobench_dataset.py |
| `mlvu` | json/N_TASK.json | video/N_TASK/... | JUNJIE99/MLVU, videochat2/choice_bench.py; FlagEvalMM, mlvu |
| `egoschema` | questions.json, subset_answers.json | videos/Q_UID.mp4 | egoschema/EgoSchema, README.md; lmms-eval |

None of the data sets themselves was seen, only the code and pages named. All are asked without subtitles. What is not
asked: questions without a published answer (the rest of EgoSchema, LongVideoBench's test split), and those that another
model would have to judge (TempCompass' captions, MLVU's sub-scenes and summaries).

Invariant: a question's text is what the authors' own evaluation asks, where its options stand in it, too. Cost: the
files of questions are read once, and each video is looked up.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from evs_train.config import Layout
from evs_train.data.manifest import Problem
from evs_train.data.media import MediaFinder
from evs_train.data.sources import frame_files
from evs_train.errors import DataError
from evs_train.evaluate.data import LETTER_REQUEST, LETTERS, Asked, Question, assemble, lettered, refuse, rows_of
from evs_train.evaluate.options import EvalOptions
from evs_train.evaluate.published import PublishedRow, json_object, rows_of_file

Found = Iterator[tuple[Asked | Problem, MediaFinder]]

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
        raise DataError(f"{options.data[0]}: no question is there", "docs/eval.md says what each layout expects")
    return questions[: options.limit], {problem.message: problem.message for problem in problems}


def _rows(options: EvalOptions) -> Found:
    return rows_of(options.rows_section(), spoken=options.choices == "texts")


def _videomme(options: EvalOptions) -> Found:
    root = _folder(options)
    for path in sorted((root / "videomme").glob("*.parquet")):
        for row in rows_of_file(path):
            names = [row.text("videoID") + suffix for suffix in (".mp4", ".MP4", ".mkv")]
            video = next((one for one in names if (root / "data" / one).is_file()), names[0])
            choices = row.texts("options")  # with their letters
            asked = row.asked(
                row.text("question_id"),
                video,
                "\n".join([_VIDEOMME_REQUEST, row.text("question"), *choices, "The best answer is:"]),
                choices=LETTERS[: len(choices)],
                right=row.text("answer"),
                types=[row.text("task_type"), row.text("duration")],
            )
            yield asked, MediaFinder(str(root / "data"))


def _mvbench(options: EvalOptions) -> Found:
    root = _folder(options)
    for path in sorted((root / "json").glob("*.json")):
        if path.stem not in _MVBENCH:
            raise DataError(f"{path}: no task of MVBench", f"its tasks are {', '.join(_MVBENCH)}")
        folder = root / "video" / _MVBENCH[path.stem]
        finder = MediaFinder(str(folder), frames_fps=_MVBENCH_FRAMES_FPS)
        for row in rows_of_file(path):
            video: Any = row.text("video")
            if (folder / video).is_dir():
                video = [f"{video}/{Path(frame).name}" for frame in frame_files(folder / video)]
            bounds = [float(row.values[key]) for key in ("start", "end") if row.values.get(key) is not None]
            segment = (bounds[0], bounds[1]) if len(bounds) == 2 else None
            yield _bracketed(row, video, path.stem, _MVBENCH_SYSTEM, segment), finder


def _mlvu(options: EvalOptions) -> Found:
    root = _folder(options)
    for path in sorted((root / "json").glob("*.json")):
        if path.stem in _MLVU:
            finder = MediaFinder(str(root / "video" / path.stem))
            for row in rows_of_file(path):
                yield _bracketed(row, row.text("video"), row.text("question_type"), _MLVU_SYSTEM), finder


def _bracketed(
    row: PublishedRow, video: Any, kind: str, system: str, segment: tuple[float, float] | None = None
) -> Asked | Problem:
    """A question of MVBench or MLVU: options as (A) one, and an answer that opens with "Best option:("."""
    candidates, answer = row.texts("candidates"), str(row.values.get("answer"))
    if answer not in candidates:
        return DataError(f"{row.where}: the answer {answer!r} is none of its candidates")
    shown = lettered(candidates, "({}) {}")
    text = f"{system}\nQuestion: {row.text('question')}\nOptions:\n{shown}\nOnly give the best option."
    return row.asked(
        f"{row.path.stem}:{row.number}",
        video,
        text,
        choices=LETTERS[: len(candidates)],
        right=LETTERS[candidates.index(answer)],
        types=[kind],
        prefix="Best option:(",
        segment=segment,
    )


def _tempcompass(options: EvalOptions) -> Found:
    root = _folder(options)
    finder = MediaFinder(str(root / "videos"))
    for task, request in _TEMPCOMPASS.items():
        path = root / "questions" / f"{task}.json"
        for video, aspects in json_object(path).items() if path.is_file() else ():
            for aspect, rows in aspects.items():
                for number, values in enumerate(rows, start=1):
                    row = PublishedRow(path, f"{video} {aspect} {number}", values)
                    choices = _named_options(task, row.text("question"))
                    answer = row.text("answer")
                    asked = row.asked(
                        f"{task}:{video}:{aspect}:{number}",
                        f"{video}.mp4",
                        row.text("question") + request,
                        choices=choices,
                        right=next((one for one in choices if re.match(rf"{re.escape(one)}\b", answer)), answer),
                        types=[task, aspect],
                    )
                    yield asked, finder


def _named_options(task: str, question: str) -> tuple[str, ...]:
    """What the options of a question of TempCompass are called: A, B; Caption A, Option 1, Sentence B; yes, no."""
    if task == "yes_no":
        return "yes", "no"
    ending = r"\." if task == "multi-choice" else ":"
    return tuple(re.findall(rf"^((?:\w+ )?[A-Z0-9]){ending}", question, flags=re.MULTILINE))


def _longvideobench(options: EvalOptions) -> Found:
    root = _folder(options)
    finder = MediaFinder(str(root / "videos"))
    for row in rows_of_file(root / "lvb_val.json"):
        candidates, correct = row.texts("candidates"), row.values.get("correct_choice")
        asked = row.asked(
            row.text("id"),
            row.text("video_path"),
            f"Question: {row.text('question')}\n{lettered(candidates)}\n{LETTER_REQUEST}",
            choices=LETTERS[: len(candidates)],
            right=LETTERS[correct] if isinstance(correct, int) and 0 <= correct < len(LETTERS) else str(correct),
            types=[row.text("question_category"), f"up to {row.values.get('duration_group')} s"],
        )
        yield asked, finder


def _egoschema(options: EvalOptions) -> Found:
    root = _folder(options)
    finder = MediaFinder(str(root / "videos"))
    answers = json_object(root / "subset_answers.json")
    for row in rows_of_file(root / "questions.json"):
        uid = row.text("q_uid")
        if uid in answers:
            candidates = [row.text(f"option {place}") for place in range(5)]
            asked = row.asked(
                uid,
                f"{uid}.mp4",
                f"{row.text('question')}\n{lettered(candidates)}\n{LETTER_REQUEST}",
                choices=LETTERS[:5],
                right=LETTERS[int(answers[uid])],
            )
            yield asked, finder


def _folder(options: EvalOptions) -> Path:
    folder = Path(options.data[0])
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder", f"layout={options.layout} reads the folder that it was unpacked to")
    return folder


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
