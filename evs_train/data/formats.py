"""Published forms of a row, each read into the same draft: who says what, and which media it names.

- `qwen`: `conversations` with `<video>` and `<image>` in the text, files in `video`, `image` or their plurals
  (QwenLM/Qwen3-VL, qwen-vl-finetune/README.md and data_processor.py, read).
- `llava_video`: the same, but `<image>` stands for the row's video, as LLaVA-Video-178K is written (LLaVA-NeXT's
  llava/train/train.py has DEFAULT_IMAGE_TOKEN where a row's "video" goes, read; the data set's files were not seen).
- `swift`: `messages` of plain text, files in `videos` and `images`; a video may be a list of frames or a folder of them
  (modelscope/ms-swift, Custom-dataset.md, issue 4290, pull request 4326, read).
- `openai`: `messages` whose content is a list of parts that name their files: `video_url`, `image_url` as in OpenAI's
  chat API, `video`, `image`, `path` or `url` as in Hugging Face's chat templates and qwen-vl-utils.
- `videochat2`: `QA`, a list of {"i", "q", "a"}, beside `video` or `image` (OpenGVLab/Ask-Anything,
  video_chat2/dataset/it_dataset.py, read).
- `caption`: `caption` beside the media; what tar shards of clips and captions hold.

Invariant: in a `Draft` the media parts of the messages, in reading order, are exactly its `videos` and `images`. A key
that would change what is trained (part of a video, boxes, tools, answers without loss) is refused, not passed over.
Cost: one pass over the text of a row. Not here: files of rows (`readers.py`), paths and whether they exist
(`manifest.py`).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

from evs_train.errors import DataError

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
MEDIA = ("video", "image")
CAPTION_QUESTIONS = {"video": "Describe the video.", "image": "Describe the image."}
"""What a caption answers; captions come without a question."""

_PLACEHOLDER = re.compile(r"\n?<(video|image)>\n?")
_PART_KEYS = {"video": ("video", "path", "url"), "image": ("image", "path", "url")}

Row = dict[str, Any]
Part = dict[str, str]


@dataclass(frozen=True)
class Draft:
    """A row in the one form that the rest of the package knows, its media as the row names them.

    Args:
        messages: chat in Hugging Face form; `content` is always a list of {"type": "text", "text": ...},
            {"type": "video"} and {"type": "image"} in reading order.
        videos: for each video part what names it: a path, a list of paths of frames, or a tar member.
        images: the same for images.
    """

    messages: tuple[dict[str, Any], ...]
    videos: tuple[Any, ...]
    images: tuple[Any, ...]


@dataclass(frozen=True)
class RowFormat:
    """How rows of one format are known and read.

    Args:
        key: the key that every row of the format has.
        read: row to draft; raises DataError.
        refused: keys that would change what is trained and are not supported, each with what they mean.
    """

    key: str
    read: Callable[[Row], Draft]
    refused: dict[str, str]


def read_row(row: Any, row_format: str = "auto") -> tuple[Draft, str]:
    """The draft of a row, and the name of the format it was read as.

    Raises:
        DataError: the row is not of that format, or of none; or it contradicts itself.
    """
    row = _object(row, "the row")
    name = recognise(row) if row_format == "auto" else row_format
    form = FORMATS[name]
    if form.key not in row:
        keys = ", ".join(map(str, row)) or "none"
        hint = "set data.format to the format of the rows, or to auto"
        raise DataError(f'the row has no "{form.key}", which format {name} expects; its keys: {keys}', hint)
    for key, meaning in form.refused.items():
        if row.get(key) not in (None, [], {}, ""):
            raise DataError(f'the row has "{key}" ({meaning}), which is not supported', "remove the row or the key")
    return form.read(row), name


def recognise(row: Row) -> str:
    """Name of the format that a row's keys speak for. Raises DataError where they speak for two, or for none."""
    found = [key for key in ("conversations", "messages", "QA") if key in row]
    if len(found) > 1:
        raise DataError(f'both "{found[0]}" and "{found[1]}" are there', "keep one")
    if not found and "caption" in row:
        return "caption"
    if not found:
        _missing(row, ("conversations", "messages", "QA", "caption"), "the row")
    if found == ["QA"]:
        return "videochat2"
    turns = row[found[0]] if isinstance(row[found[0]], list) else []
    if found == ["messages"]:
        in_parts = any(isinstance(turn, dict) and isinstance(turn.get("content"), list) for turn in turns)
        return "openai" if in_parts else "swift"
    text = "".join(str(turn.get("value")) for turn in turns if isinstance(turn, dict))
    for_video = "<image>" in text and "<video>" not in text and listed(row, "video") and not listed(row, "image")
    return "llava_video" if for_video else "qwen"


def _read_qwen(row: Row) -> Draft:
    return _dialogue(row, "conversations", "from", "value")


def _read_llava_video(row: Row) -> Draft:
    if listed(row, "image"):
        raise DataError("the row lists images, but <image> stands for a video", "set data.format: qwen")
    turns = [
        {**turn, "value": turn["value"].replace("<image>", "<video>")}
        if isinstance(turn, dict) and isinstance(turn.get("value"), str)
        else turn
        for turn in _turns(row, "conversations")
    ]
    return _dialogue({**row, "conversations": turns}, "conversations", "from", "value")


def _read_swift(row: Row) -> Draft:
    for index, turn in enumerate(_turns(row, "messages"), start=1):
        if isinstance(turn, dict) and isinstance(turn.get("content"), list):
            raise DataError(f'turn {index}: "content" is a list of parts', "set data.format: openai")
    return _dialogue(row, "messages", "role", "content")


def _read_openai(row: Row) -> Draft:
    return _dialogue(row, "messages", "role", "content")


def _read_videochat2(row: Row) -> Draft:
    """The media, the instruction and the first question are the first turn; VideoChat2 itself shuffles the questions.

    It puts the instruction before the conversation, as a system text (read). Here it goes to the user, who gives it
    when the model is served; one that only repeats the last is not said again. Captions have an empty question.
    """
    kind = "video" if listed(row, "video") else "image"
    files = listed(row, kind)
    turns: list[dict[str, str]] = []
    instruction = ""
    for index, value in enumerate(_turns(row, "QA"), start=1):
        where = f"QA item {index}"
        item = _object(value, where)
        for key in ("q", "a"):
            if not isinstance(item.get(key), str):
                raise DataError(f'{where}: "{key}" is {kind_of(item.get(key))}', "it must be text")
        told = str(item.get("i") or "")
        lines = ["" if told == instruction else told, item["q"]]
        text = "\n".join(line for line in lines if line)
        instruction = told
        if index == 1:
            text = "\n".join([f"<{kind}>"] * len(files) + [text])
        elif not text:
            raise DataError(f'{where}: neither "i" nor "q" asks anything', "only the first item may be a caption")
        turns += [{"from": "human", "value": text}, {"from": "gpt", "value": item["a"]}]
    return _dialogue({**row, "conversations": turns}, "conversations", "from", "value")


def _read_caption(row: Row) -> Draft:
    kind = "video" if listed(row, "video") else "image"
    caption = row["caption"].strip() if isinstance(row["caption"], str) else row["caption"]
    if not isinstance(caption, str) or not caption:
        raise DataError(f'"caption" is {kind_of(caption)}', "it must be text")
    question = f"<{kind}>\n" * len(listed(row, kind)) + CAPTION_QUESTIONS[kind]
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": caption}]
    return _dialogue({**row, "conversations": turns}, "conversations", "from", "value")


_SWIFT_ONLY = {
    "objects": "boxes for grounding",
    "audios": "sound",
    "tools": "tools of an agent",
    "rejected_response": "a preference",
    "rejected_messages": "a preference",
}
FORMATS: dict[str, RowFormat] = {
    "qwen": RowFormat("conversations", _read_qwen, {}),
    "llava_video": RowFormat("conversations", _read_llava_video, {}),
    "swift": RowFormat("messages", _read_swift, _SWIFT_ONLY),
    "openai": RowFormat("messages", _read_openai, {"tools": "tools of an agent"}),
    "videochat2": RowFormat("QA", _read_videochat2, {"start": "part of a video", "end": "part of a video"}),
    "caption": RowFormat("caption", _read_caption, {}),
}
"""Reader of each format by its name, which `data.format` takes beside `auto`."""


def _turns(row: Row, key: str) -> list[Any]:
    turns = row[key]
    if not isinstance(turns, list) or not turns:
        raise DataError(f'"{key}" is {"empty" if turns == [] else kind_of(turns)}', "it must be a list")
    return turns


def _dialogue(row: Row, key: str, role_key: str, content_key: str) -> Draft:
    slots: dict[str, list[Any]] = {kind: [] for kind in MEDIA}
    messages = tuple(
        _message(turn, index, role_key, content_key, slots) for index, turn in enumerate(_turns(row, key), start=1)
    )
    media = {kind: tuple(_fill(kind, slots[kind], listed(row, kind))) for kind in MEDIA}
    return Draft(messages, media["video"], media["image"])


def _message(turn: Any, index: int, role_key: str, content_key: str, slots: dict[str, list[Any]]) -> dict[str, Any]:
    """One turn in Hugging Face form; appends to `slots` what names each media part, None where the row does."""
    where = f"turn {index}"
    turn = _object(turn, where)
    for key in (role_key, content_key):
        if key not in turn:
            _missing(turn, (key,), where)
    role, content = ROLES.get(str(turn[role_key])), turn[content_key]
    if role is None:
        raise DataError(f'{where}: unknown role {turn[role_key]!r} in "{role_key}"', f"known are {', '.join(ROLES)}")
    for key in ("loss", "weight"):  # of ms-swift and of OpenAI's fine-tuning
        if turn.get(key) not in (None, True, 1):
            raise DataError(f'{where}: "{key}" is {turn[key]!r}', "every answer is trained on; split or remove the row")
    if not isinstance(content, str | list):
        raise DataError(f'{where}: "{content_key}" is {kind_of(content)}', "it must be text or a list of parts")
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


def _parts(part: Row, where: str) -> Iterator[tuple[str, Any]]:
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
        given = {key: value for key, value in part.items() if key != "type" and value is not None}
        named = [given.pop(key) for key in _PART_KEYS[kind] if key in given]
        if given or len(named) > 1:
            extra = ", ".join(map(str, given)) or "more than one file"
            raise DataError(f"{where}: a {kind} part has {extra}", "sampling is set for all rows, by the keys of data")
        yield kind, named[0] if named else None
    elif kind in ("video_url", "image_url"):
        url = part.get(kind)
        yield kind.removesuffix("_url"), url.get("url", "") if isinstance(url, dict) else url or ""
    else:
        raise DataError(
            f"{where}: a part of unknown type {kind!r}", "known are text, video, image, video_url and image_url"
        )


def listed(row: Row, kind: str) -> list[Any]:
    """What the row names in its own fields, for placeholders to take."""
    files: list[Any] = []
    for key in (kind, f"{kind}s"):
        value = row.get(key)
        files += value if isinstance(value, list) else [] if value is None else [value]
    return files


def _fill(kind: str, slots: list[Any], files: list[Any]) -> Iterator[Any]:
    """Media in reading order: placeholders take the row's files one after the other."""
    num_placeholders = slots.count(None)
    if num_placeholders != len(files):
        raise DataError(
            f"{num_placeholders} <{kind}> placeholder(s) in the text, but {len(files)} file(s) in the row's "
            f'"{kind}" or "{kind}s"',
            f"write one <{kind}> into the text for each file",
        )
    remaining = iter(files)
    for slot in slots:
        yield next(remaining) if slot is None else slot


def _object(value: Any, what: str) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"{what} is {kind_of(value)}", "it must be a JSON object")
    return value


def _missing(found: Row, wanted: tuple[str, ...], where: str) -> NoReturn:
    """Refuse an object without any of the `wanted` keys, guessing which of its keys was meant."""
    near = [guess for key in wanted for guess in difflib.get_close_matches(key, found, n=1)]
    names = " or ".join(f'"{key}"' for key in wanted)
    keys = ", ".join(map(str, found)) or "none"
    hint = f'did you mean {names} by "{near[0]}"?' if near else "docs/data.md shows the forms that rows may have"
    raise DataError(f"{where} has no {names}; its keys: {keys}", hint)


def kind_of(value: Any) -> str:
    """What a JSON value is, for messages."""
    names = {dict: "an object", list: "a list", str: "text", bool: "a boolean", int: "a number", float: "a number"}
    return "empty text" if value == "" else names.get(type(value), "null")
