"""Rows of data files to samples: who says what, and which media files belong to it.

Read are JSON lists and JSONL, of LLaVA/Qwen rows (`conversations`) or OpenAI-style rows (`messages`): see `read_rows`.
Invariant: in every `Sample` the media parts of its messages, in reading order, are exactly its `videos` and `images`,
and all these files exist. Whatever breaks it is reported, all rows at once, before anything is trained.

Cost: all rows are held in memory and every media file is looked up (not opened) once.

Not here: decoding, templates and tokens, downloading, shuffling or mixing, and judging what the text says.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evs_train.errors import DataError, EvsTrainError, MediaError

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
CONVERSATION_KEYS = {"conversations": ("from", "value"), "messages": ("role", "content")}
MEDIA = ("video", "image")
SHOWN_ROWS = 20
_PLACEHOLDER = re.compile(r"\n?<(video|image)>\n?")

Part = dict[str, str]
Problem = DataError | MediaError


@dataclass(frozen=True)
class Sample:
    """One conversation.

    Args:
        id: the row's "id", or "<file name>:<row number>".
        source: the row for messages, as in "path/to/file.json row 12".
        messages: chat in Hugging Face form; `content` is always a list of {"type": "text", "text": ...},
            {"type": "video"} and {"type": "image"} in reading order.
        videos: one path for each video part, in reading order.
        images: one path for each image part, in reading order.
    """

    id: str
    source: str
    messages: tuple[dict[str, Any], ...]
    videos: tuple[str, ...]
    images: tuple[str, ...]


def read_rows(paths: Sequence[str | Path], media_root: str | Path | None = None) -> list[Sample]:
    """Read data files into samples, in order.

    A row is {"id"?, "video"/"videos"?, "image"/"images"?, "conversations": [{"from", "value"}, ...]} or the same with
    "messages": [{"role", "content"}, ...]. Text holds one `<video>` or `<image>` for each file named in the row; one
    newline on either side of it goes. `content` may be a list of parts that name their files: {"type": "video",
    "video": path} or {"type": "video_url", "video_url": {"url": path}}, likewise for images. Relative paths start at
    `media_root`, or else at the folder of the data file.

    Args:
        paths: .json (a list of rows) or .jsonl (a row on each line) files.
        media_root: folder that relative media paths start at.

    Raises:
        DataError: naming file and row (from 1; in JSONL the line) of up to 20 of the bad rows, and how many there are.
        MediaError: the same, when missing media files are all there is to report.
    """
    samples: list[Sample] = []
    problems: list[Problem] = []
    for path in map(Path, paths):
        root = path.parent if media_root is None else Path(media_root)
        try:
            for number, row in _rows(path):
                source = f"{path} row {number}"
                try:
                    samples.append(_sample(row, path.name, number, source, root))
                except (DataError, MediaError) as error:
                    problems.append(type(error)(f"{source}: {error.message}", error.hint))
        except DataError as error:
            problems.append(error)
    if problems:
        raise _summary(problems)
    return samples


def read_prompt(messages: Sequence[dict[str, Any]], media_root: str | Path = ".") -> Sample:
    """A conversation that waits for its answer, as a sample: OpenAI-style messages that name their media files.

    Raises:
        DataError, MediaError: as `read_rows`, or the last turn is not the user's.
    """
    return _sample({"messages": list(messages)}, "prompt", 1, "the prompt", Path(media_root), prompt=True)


def fingerprint(samples: Iterable[Sample]) -> str:
    """SHA-256 (hex) of what a run is trained on, independent of where it lies.

    Hashed is, for each sample in order, one line of JSON (ASCII, sorted keys, no spaces, ended by a newline): the list
    of id, messages, videos and images, where each media file stands as [file name without folders, size in bytes]. So
    the order, any change of text, and a media file of another name or size change it; another folder, or a file whose
    content changed but not its size, does not.

    Raises:
        MediaError: a media file is gone.
    """
    digest = hashlib.sha256()
    for sample in samples:
        try:
            files = (sample.videos, sample.images)
            media = [[[os.path.basename(path), os.path.getsize(path)] for path in kind] for kind in files]
        except OSError as error:
            raise MediaError(f"{sample.source}: {error.filename}: cannot be read: {error.strerror}") from error
        line = json.dumps([sample.id, sample.messages, *media], sort_keys=True, separators=(",", ":"))
        digest.update(line.encode("ascii") + b"\n")
    return digest.hexdigest()


def _summary(problems: list[Problem]) -> EvsTrainError:
    if len(problems) == 1:
        return problems[0]
    kind = MediaError if all(isinstance(problem, MediaError) for problem in problems) else DataError
    lines = [f"  {problem}" for problem in problems[:SHOWN_ROWS]]
    if len(problems) > SHOWN_ROWS:
        lines.append(f"  ... and {len(problems) - SHOWN_ROWS} more")
    return kind("\n".join([f"{len(problems)} bad rows or files:", *lines]), "correct or remove them")


def _json_list(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        hint = "one row on each line? Then name the file .jsonl"
        raise DataError(f"{path}: not JSON: {error.msg} at line {error.lineno} column {error.colno}", hint) from error
    if not isinstance(rows, list):
        raise DataError(f"{path}: holds {_kind(rows)}, not a list of rows", "put the rows in [...]")
    yield from enumerate(rows, start=1)


def _json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    # Only "\n" ends a row: JSON strings may hold other line separators, at which splitlines() would cut.
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                hint = "each line must be one JSON object"
                yield number, DataError(f"not JSON: {error.msg} at column {error.colno}", hint)


READERS: dict[str, Callable[[Path], Iterator[tuple[int, Any]]]] = {".json": _json_list, ".jsonl": _json_lines}
"""Reader of each file format, by suffix: yields the number of each row, and the row or what is wrong with it."""


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    if path.suffix.lower() not in READERS:
        raise DataError(f"{path}: unknown kind of data file", f"known are {', '.join(READERS)}")
    count = 0
    try:
        for numbered in READERS[path.suffix.lower()](path):
            yield numbered
            count += 1
    except OSError as error:
        hint = "check the path in data.rows"
        raise DataError(f"{path}: data file cannot be read: {error.strerror}", hint) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte {error.start})", "save the file as UTF-8") from error
    if count == 0:
        raise DataError(f"{path}: holds no rows")


def _sample(row: Any, file_name: str, number: int, source: str, root: Path, *, prompt: bool = False) -> Sample:
    if isinstance(row, DataError):
        raise row
    row = _object(row, "the row")
    key = _conversation_key(row)
    turns = row[key]
    if not isinstance(turns, list) or not turns:
        raise DataError(f'"{key}" is {"empty" if turns == [] else _kind(turns)}', "it must be a list of turns")
    slots: dict[str, list[str | None]] = {kind: [] for kind in MEDIA}
    messages = tuple(_message(turn, index, *CONVERSATION_KEYS[key], slots) for index, turn in enumerate(turns, start=1))
    if not prompt and not any(message["role"] == "assistant" for message in messages):
        raise DataError("no assistant turn", "without an answer there is nothing to learn from; remove the row")
    if prompt and messages[-1]["role"] != "user":
        raise DataError(f"the last turn is the {messages[-1]['role']}'s", "a prompt ends with the user's turn")
    media = {kind: tuple(_fill(kind, slots[kind], _listed(row, kind), root)) for kind in MEDIA}
    row_id = row.get("id")
    return Sample(
        id=f"{file_name}:{number}" if row_id is None else str(row_id),
        source=source,
        messages=messages,
        videos=media["video"],
        images=media["image"],
    )


def _conversation_key(row: dict[str, Any]) -> str:
    found = [key for key in CONVERSATION_KEYS if key in row]
    if len(found) == 2:
        raise DataError('both "conversations" and "messages" are there', "keep one")
    return found[0] if found else _missing(row, tuple(CONVERSATION_KEYS), "the row")


def _message(
    turn: Any, index: int, role_key: str, content_key: str, slots: dict[str, list[str | None]]
) -> dict[str, Any]:
    """One turn in Hugging Face form; appends to `slots` the path of each media part, None where the row names it."""
    where = f"turn {index}"
    turn = _object(turn, where)
    for key in (role_key, content_key):
        if key not in turn:
            _missing(turn, (key,), where)
    role, content = ROLES.get(str(turn[role_key])), turn[content_key]
    if role is None:
        raise DataError(f'{where}: unknown role {turn[role_key]!r} in "{role_key}"', f"known are {', '.join(ROLES)}")
    if not isinstance(content, str | list):
        raise DataError(f'{where}: "{content_key}" is {_kind(content)}', "it must be text or a list of parts")
    parts: list[Part] = []
    for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
        for kind, value in _parts(_object(part, f"{where}: a part"), where):
            if kind in MEDIA:
                slots[kind].append(value)
                parts.append({"type": kind})
            elif value:
                parts.append({"type": "text", "text": value})
    if role != "user" and any(part["type"] in MEDIA for part in parts):
        raise DataError(f"{where}: video or image in a turn of the {role}", "media belong in turns of the user")
    return {"role": role, "content": parts}


def _parts(part: dict[str, Any], where: str) -> Iterator[tuple[str, Any]]:
    """(kind, text or path or None) of one part of a turn; a text with placeholders becomes several."""
    kind = part.get("type")
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise DataError(f'{where}: a part of type "text" without a "text"')
        pieces = _PLACEHOLDER.split(part["text"])  # text, kind, text, kind, ..., text
        for text, placeholder in zip(pieces[::2], [*pieces[1::2], None], strict=True):
            yield "text", text
            if placeholder is not None:
                yield placeholder, None
    elif kind in MEDIA:
        yield kind, part.get(kind)
    elif kind in ("video_url", "image_url"):
        url = part.get(kind)
        yield kind.removesuffix("_url"), url.get("url", "") if isinstance(url, dict) else url or ""
    else:
        raise DataError(
            f"{where}: a part of unknown type {kind!r}", "known are text, video, image, video_url and image_url"
        )


def _listed(row: dict[str, Any], kind: str) -> list[Any]:
    """The files that the row names in its own fields, for placeholders to take."""
    listed: list[Any] = []
    for key in (kind, f"{kind}s"):
        value = row.get(key)
        listed += value if isinstance(value, list) else [] if value is None else [value]
    return listed


def _fill(kind: str, slots: list[str | None], listed: list[Any], root: Path) -> Iterator[str]:
    """Resolved paths in reading order: placeholders take the row's files one after the other."""
    num_placeholders = slots.count(None)
    if num_placeholders != len(listed):
        raise DataError(
            f"{num_placeholders} <{kind}> placeholder(s) in the text, but {len(listed)} file(s) in the row's "
            f'"{kind}" or "{kind}s"',
            f"write one <{kind}> into the text for each file",
        )
    remaining = iter(listed)
    for slot in slots:
        yield _resolve(next(remaining) if slot is None else slot, kind, root)


def _resolve(value: Any, kind: str, root: Path) -> str:
    if not isinstance(value, str) or not value:
        raise DataError(f"a {kind} is {_kind(value)}", "it must be the path of a file")
    value = value.removeprefix("file://")
    if "://" in value or value.startswith("data:"):
        raise DataError(f"{kind} {value[:80]!r} is not a local file", "download it, and give its path")
    path = root / value
    if not path.is_file():
        raise MediaError(f"{kind} file not found: {path}", "check the path and data.media_root")
    return str(path)


def _object(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{what} is {_kind(value)}", "it must be a JSON object")
    return value


def _missing(found: dict[str, Any], wanted: tuple[str, ...], where: str) -> Any:
    """Refuse an object without any of the `wanted` keys, guessing which of its keys was meant."""
    near = [guess for key in wanted for guess in difflib.get_close_matches(key, found, n=1)]
    names = " or ".join(f'"{key}"' for key in wanted)
    keys = ", ".join(map(str, found)) or "none"
    hint = f'did you mean {names} by "{near[0]}"?' if near else ""
    raise DataError(f"{where} has no {names}; its keys: {keys}", hint)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "a boolean", int: "a number", float: "a number"}
    return "empty text" if value == "" else names.get(type(value), "null")
