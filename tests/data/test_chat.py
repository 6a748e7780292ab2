"""Conversations to ids and labels with the real processors: exactly the answers are supervised, whatever the row."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from evs_train.config import ModelSection
from evs_train.data.chat import THUMBNAIL_SIDE, Example, MediaItem, build_example, build_prompt
from evs_train.data.manifest import Sample
from evs_train.data.template import IGNORE_INDEX
from evs_train.data.video import Clip, video_metadata
from evs_train.data_config import DataSection
from evs_train.errors import DataError
from evs_train.models import FAMILIES
from evs_train.models.base import Family, frames_tensor
from evs_train.models.loading import load_family
from evs_train.models.tiny import build_tiny

END = "<|im_end|>"
SOURCE = "rows.json row 7"
VIDEO, IMAGE = {"type": "video"}, {"type": "image"}
# The template of the tiny Nemotron, as of the real one, opens the answer with an empty thought.
HEADERS = dict.fromkeys(FAMILIES, "<|im_start|>assistant\n") | {
    "nemotron_h_omni": "<|im_start|>assistant\n<think></think>"
}

FRAMES_PER_UNIT = dict.fromkeys(FAMILIES, 2) | {"internvl": 1, "llava_onevision": 1, "video_llama_3": 1}


@pytest.fixture(scope="module")
def families(tiny_checkpoint: Callable[[str], Path]) -> dict[str, Family]:
    return {name: _family(tiny_checkpoint(name)) for name in FAMILIES}


@pytest.fixture
def family(families: dict[str, Family], family_name: str) -> Family:
    return families[family_name]


def _family(path: Path) -> Family:
    return load_family(ModelSection(path=str(path)), DataSection(rows="unused.json"))


def clip(num_frames: int, side: int = 64, seed: int = 0) -> Clip:
    frames = np.random.default_rng(seed).integers(0, 255, (num_frames, side, side, 3), dtype=np.uint8)
    times = np.arange(num_frames) / 8.0
    return Clip(frames, list(range(num_frames)), 8.0, times, num_frames, num_frames / 8.0, "clip.mp4")


def image(width: int = 80, height: int = 48) -> Image.Image:
    return Image.fromarray(np.random.default_rng(9).integers(0, 255, (height, width, 3), dtype=np.uint8))


def sample(*turns: tuple[str, Sequence[Any]]) -> Sample:
    """A row of (role, parts); a part is text or VIDEO or IMAGE."""
    messages = tuple(
        {"role": role, "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}
        for role, parts in turns
    )
    parts = [part for _, parts in turns for part in parts]
    return Sample("id", SOURCE, messages, ("clip.mp4",) * parts.count(VIDEO), ("image.png",) * parts.count(IMAGE))


def build(
    family: Family, row: Sample, clips: Sequence[Clip] = (), images: Sequence[Image.Image] = (), **options: Any
) -> Example:
    settings: dict[str, Any] = {"template_kwargs": _thoughts(family, False), "max_length": None, **options}
    return build_example(row, clips, images, family, **settings)


def _thoughts(family: Family, enabled: bool) -> dict[str, Any]:
    return {"enable_thinking": enabled} if family.model_type == "nemotron_h_omni" else {}


def runs(labels: torch.Tensor) -> list[tuple[int, int]]:
    """Start and end of each run of supervised tokens."""
    edges = np.flatnonzero(np.diff((labels != IGNORE_INDEX).numpy(), prepend=False, append=False))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def answers(family: Family, example: Example) -> list[str]:
    """Text of each supervised run; every run must stand right behind a header, and copy the ids."""
    decode = family.processor.tokenizer.decode
    found = runs(example.labels)
    for start, end in found:
        assert decode(example.input_ids[:start]).endswith(HEADERS[family.model_type])
        assert torch.equal(example.labels[start:end], example.input_ids[start:end])
    return [decode(example.labels[start:end]) for start, end in found]


CONVERSATIONS = {
    "one turn": sample(("user", ["What moves?"]), ("assistant", ["A ball."])),
    "system prompt": sample(("system", ["You say Yes."]), ("user", ["Is it red?"]), ("assistant", ["Yes."])),
    "like answers": sample(
        ("user", ["Is it red?"]), ("assistant", ["Yes."]), ("user", ["Yes."]), ("assistant", ["Yes."])
    ),
    "answer in the question": sample(("user", ["Say A ball."]), ("assistant", ["A ball."])),
    "two parts": sample(("user", ["a", "b"]), ("assistant", ["One. ", "Two."])),
    "leading newline": sample(("user", ["a"]), ("assistant", ["\nA ball."])),
    "space round it": sample(("user", ["a"]), ("assistant", [" \n\n A ball. \n"])),
    "header words": sample(("user", ["assistant\nYes."]), ("assistant", ["assistant\nYes."])),
    "empty": sample(("user", ["a"]), ("assistant", [""]), ("user", ["b"]), ("assistant", ["B."])),
    "beyond ASCII": sample(("user", ["été 日本"]), ("assistant", ["été 日本 🎬"])),
    "user last": sample(("user", ["a"]), ("assistant", ["A."]), ("user", ["b"])),
    "assistant twice": sample(("user", ["a"]), ("assistant", ["A."]), ("assistant", ["B."])),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_exactly_the_answers_are_supervised(family: Family, name: str) -> None:
    row = CONVERSATIONS[name]
    wanted = [
        "".join(part["text"] for part in message["content"]) + END
        for message in row.messages
        if message["role"] == "assistant"
    ]
    assert answers(family, build(family, row)) == wanted


def test_control_tokens_written_out_by_a_user_are_not_supervised(family: Family) -> None:
    header = HEADERS[family.model_type]
    fake = f"{header}Yes.{END}\n"
    row = sample(
        ("user", [f"a {fake} {fake} b"]), ("assistant", ["Yes."]), ("user", [fake]), ("assistant", ["Yes."]),
    )  # fmt: skip
    example = build(family, row)
    assert answers(family, example) == ["Yes." + END] * 2
    decoded = family.processor.tokenizer.decode(example.input_ids)
    places = [family.processor.tokenizer.decode(example.input_ids[:start]) for start, _ in runs(example.labels)]
    # Of the five places that read like an answer, the third and the last are answers.
    reads_like = [i + len(header) for i in range(len(decoded)) if decoded.startswith(f"{header}Yes.{END}", i)]
    assert [len(place) for place in places] == [reads_like[2], reads_like[4]]


def test_control_tokens_in_an_answer_are_part_of_it(family: Family) -> None:
    header = HEADERS[family.model_type]
    row = sample(("user", ["a"]), ("assistant", [f"x{header}Yes."]), ("user", ["b"]), ("assistant", ["Yes."]))
    assert answers(family, build(family, row)) == [f"x{header}Yes.{END}", "Yes." + END]


def test_a_token_across_header_and_answer_is_supervised(tmp_path: Path) -> None:
    family = _family(build_tiny("qwen3_vl", tmp_path / "newlines", texts=["\n\n\n\n"] * 200))
    tokenizer = family.processor.tokenizer
    assert len(tokenizer("\n\n")["input_ids"]) == 1
    example = build(family, sample(("user", ["a"]), ("assistant", ["\nYes."])))
    ((start, end),) = runs(example.labels)
    assert tokenizer.decode(example.labels[start:end]) == f"\n\nYes.{END}"
    assert tokenizer.decode(example.input_ids[:start]).endswith("<|im_start|>assistant")


@pytest.mark.parametrize("role", ["user", "assistant"])
@pytest.mark.parametrize("kind", ["video", "image"])
def test_a_literal_placeholder_is_refused_with_the_row(family: Family, role: str, kind: str) -> None:
    token = family.processor.video_token if kind == "video" else family.processor.image_token
    texts = {"user": "What?", "assistant": "That.", role: f"see {token} there"}
    row = sample(("user", [VIDEO, texts["user"]]), ("assistant", [texts["assistant"]]))
    with pytest.raises(DataError, match=rf"^{SOURCE}: the rendered conversation has ") as caught:
        build(family, row, [clip(4)])
    assert token in str(caught.value)
    assert "remove or reword" in caught.value.hint


def test_the_conversation_must_start_with_a_user(family: Family) -> None:
    with pytest.raises(DataError, match=rf"^{SOURCE}: the conversation starts with the assistant"):
        build(family, sample(("assistant", ["Hi."]), ("user", ["Hi."])))


def changed_template(checkpoint: Path, change: Callable[[str], str]) -> Family:
    """The tiny Qwen3-VL with another chat template."""
    family = _family(checkpoint)
    family.processor.chat_template = change(family.processor.chat_template)
    return family


TALK = sample(("user", ["a"]), ("assistant", ["One."]), ("user", ["b"]), ("assistant", ["Two."]))


def test_a_template_that_adds_to_the_answer_is_refused(tiny_checkpoint: Callable[[str], Path]) -> None:
    prompt = "'<|im_start|>assistant\\n'"
    family = changed_template(
        tiny_checkpoint("qwen3_vl"), lambda text: text.replace(prompt, "'<|im_start|>assistant\\n<think>'")
    )
    with pytest.raises(DataError, match=rf"^{SOURCE}: the chat template renders turn 2 unlike the prompt") as caught:
        build(family, TALK)
    assert "data.template_kwargs" in caught.value.hint


def test_a_template_that_rewrites_earlier_turns_is_refused(tiny_checkpoint: Callable[[str], Path]) -> None:
    last_only = "{%- for message in (messages if messages|length < 3 else messages[2:]) -%}"
    family = changed_template(
        tiny_checkpoint("qwen3_vl"),
        lambda text: text.replace("{%- for message in messages -%}", last_only),
    )
    with pytest.raises(DataError, match=rf"^{SOURCE}: the chat template leaves out what turn 2 says"):
        build(family, TALK)


def test_a_template_that_refuses_the_conversation(tiny_checkpoint: Callable[[str], Path]) -> None:
    family = changed_template(
        tiny_checkpoint("qwen3_vl"), lambda text: "{{- raise_exception('roles must alternate') -}}" + text
    )
    with pytest.raises(DataError, match=rf"^{SOURCE}: the chat template refuses the conversation: roles must"):
        build(family, TALK)


def test_max_length_refuses_and_never_cuts(family: Family) -> None:
    row = sample(("user", [VIDEO, "What?"]), ("assistant", ["That."]))
    length = len(build(family, row, [clip(6)]).input_ids)
    assert len(build(family, row, [clip(6)], max_length=length).input_ids) == length
    with pytest.raises(DataError, match=rf"^{SOURCE}: {length} tokens before pruning, above data.max_length = "):
        build(family, row, [clip(6)], max_length=length - 1)


def test_media_of_a_mixed_row_are_in_reading_order(family: Family) -> None:
    row = sample(
        ("user", ["first", VIDEO, "then", IMAGE, "last", VIDEO, "Compare."]),
        ("assistant", ["They differ."]),
        ("user", [IMAGE, "And this?"]),
        ("assistant", ["No."]),
    )
    clips, images = [clip(4), clip(9, side=96, seed=1)], [image(), image(64, 64)]
    example = build(family, row, clips, images, keep_frames=True)
    assert [item.kind for item in example.items] == ["video", "image", "video", "image"]
    units = [math.ceil(frames / FRAMES_PER_UNIT[family.model_type]) for frames in (4, 9)]
    assert [item.num_units for item in example.items] == [units[0], 1, units[1], 1]
    assert [len(span) for span in example.spans] == [item.num_tokens for item in example.items]
    joined = torch.cat(example.spans)
    assert torch.equal(joined, joined.sort().values)
    assert torch.equal(joined, torch.nonzero(media_mask(family, example))[:, 0])
    assert bool((example.labels[joined] == IGNORE_INDEX).all())
    assert answers(family, example) == ["They differ." + END, "No." + END]
    texts = [words(family, example, a, b) for a, b in zip(example.spans, example.spans[1:], strict=False)]
    assert ["then" in texts[0], "last" in texts[1], "Compare." in texts[2]] == [True] * 3
    assert [len(frames) for frames in example.frames] == units  # one frame of each temporal unit
    # The same media alone give the same pixels: no clip or image changed places.
    if family.model_type == "llava_onevision":  # an image alone is tiled: see tests/models/test_llava_onevision.py
        images = []
    for kind, media, numbers in (("video", clips, [0, 2]), ("image", images, [1, 3])):
        for place, (one, number) in enumerate(zip(media, numbers, strict=bool(media))):
            part = VIDEO if kind == "video" else IMAGE
            alone = build(
                family,
                sample(("user", [part, "a"]), ("assistant", ["b"])),
                [one] if kind == "video" else [],
                [one] if kind == "image" else [],
            )
            assert alone.items == (example.items[number],)
            assert torch.equal(pixels(example, kind)[place], pixels(alone, kind)[0])


def media_mask(family: Family, example: Example) -> torch.Tensor:
    ids = [family.config.image_token_id]
    if getattr(family.config, "video_token_id", None) is not None:  # else frames stand under the image's placeholder
        ids.append(family.config.video_token_id)
    mask = torch.isin(example.input_ids, torch.tensor(ids))
    if family.model_type == "llava_onevision":  # the last placeholder of a video is its newline
        is_video = (example.input_ids == family.config.video_token_id).long()
        mask &= torch.diff(is_video, append=torch.zeros(1, dtype=torch.int64)) >= 0
    return mask


def words(family: Family, example: Example, first: torch.Tensor, second: torch.Tensor) -> str:
    """Text between the last token of one item and the first of the next."""
    text: str = family.processor.tokenizer.decode(example.input_ids[int(first[-1]) + 1 : int(second[0])])
    return text


def pixels(example: Example, kind: str) -> list[torch.Tensor]:
    """Encoder inputs of each video or image."""
    media = example.media
    name = "pixel_values_videos" if kind == "video" else "pixel_values"
    if isinstance(media[name], list):
        return list(media[name])
    grids = media.get("video_grid_thw" if kind == "video" else "image_grid_thw")
    sizes = (media["image_grid_hw"] if grids is None else grids).prod(dim=1).tolist()
    return list(media[name].split(sizes))


def test_a_video_of_one_frame_is_one_unit(family: Family) -> None:
    example = build(family, sample(("user", [VIDEO, "a"]), ("assistant", ["b"])), [clip(1)])
    (item,) = example.items
    assert (item.kind, item.num_units) == ("video", 1)
    assert len(example.spans[0]) == item.num_tokens > 1
    assert answers(family, example) == ["b" + END]


def test_units_follow_from_frames(family: Family) -> None:
    row = sample(("user", [VIDEO, "a"]), ("assistant", ["b"]))
    for frames, units in ((2, 1), (3, 2), (8, 4), (9, 5)):
        (item,) = build(family, row, [clip(frames)]).items
        assert item.num_units == (units if FRAMES_PER_UNIT[family.model_type] == 2 else frames)


def test_text_alone_has_no_media(family: Family) -> None:
    example = build(family, CONVERSATIONS["one turn"])
    assert (example.media, example.items, example.spans, example.frames) == ({}, (), (), ())


def test_frames_are_kept_only_on_demand(family: Family) -> None:
    row = sample(("user", [VIDEO, "a"]), ("assistant", ["b"]))
    video = clip(4)
    assert build(family, row, [video]).frames == ()
    (frames,) = build(family, row, [video], keep_frames=True).frames
    step = FRAMES_PER_UNIT[family.model_type]
    assert np.array_equal(frames, video.frames[::step])
    large = clip(4, side=THUMBNAIL_SIDE + 64)
    (frames,) = build(family, row, [large], keep_frames=True).frames
    assert np.array_equal(frames, large.frames[::step, ::2, ::2])


def test_thinking_template_is_refused_or_followed(families: dict[str, Family]) -> None:
    """With `enable_thinking` the header is another, and still not supervised."""
    family = families["nemotron_h_omni"]
    example = build(family, CONVERSATIONS["like answers"], template_kwargs=_thoughts(family, True))
    decode = family.processor.tokenizer.decode
    assert [decode(example.labels[a:b]) for a, b in runs(example.labels)] == ["Yes." + END] * 2
    assert all(decode(example.input_ids[:a]).endswith("assistant\n<think>\n") for a, _ in runs(example.labels))


CLIP_TALK = sample(
    ("user", [VIDEO, "Is it red?"]), ("assistant", ["Yes."]), ("user", ["Sure?"]), ("assistant", ["Yes."])
)


UNANSWERED = replace(CLIP_TALK, messages=CLIP_TALK.messages[:3])


@pytest.fixture
def with_template(tiny_checkpoint: Callable[[str], Path]) -> Callable[[str, str], Family]:
    """A family with another chat template, of its own."""
    return lambda name, template: changed_template(tiny_checkpoint(name), lambda _: template)


# As GLM-4.1V's release: answers are printed as they are given, a list as a list, and nothing ends them.
GLM_LIKE = """[gMASK]<sop>
{%- for turn in messages -%}
<|{{ turn.role }}|>{{ '\n' }}
{%- if turn.role == 'user' and turn.content is not string -%}
{%- for part in turn.content -%}
{{ '<|begin_of_video|><|video|><|end_of_video|>' if part.type == 'video' else part.text }}
{%- endfor -%}
{%- else -%}{{ turn.content }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>{{ '\n' }}{%- endif -%}"""


@pytest.mark.parametrize("name", ["glm4v", "glm46v"])
def test_glm_learns_to_stop_after_every_answer(with_template: Callable[[str, str], Family], name: str) -> None:
    family = with_template(name, GLM_LIKE)
    example = build(family, CLIP_TALK, [clip(4)])
    decode = family.processor.tokenizer.decode
    supervised = [decode(example.labels[a:b]) for a, b in runs(example.labels)]
    assert supervised == ["Yes.<|user|>"] * 2
    assert decode(example.input_ids).endswith("<|assistant|>\nYes.<|user|>")
    assert decode(example.input_ids).count("<|user|>") == 3
    prompt = build_prompt(
        replace(CLIP_TALK, messages=CLIP_TALK.messages[:3]), [clip(4)], [], family, template_kwargs={}
    )
    assert decode(prompt.input_ids).endswith("Yes.<|user|>\nSure?<|assistant|>\n")
    start = runs(example.labels)[1][0]
    assert torch.equal(prompt.input_ids, example.input_ids[:start])  # what generation sees is what was trained on


# As LLaVA-OneVision's release: a blank behind the role, which the prompt of generation does not have; media first.
LLAVA_LIKE = """{%- for turn in messages -%}
<|im_start|>{{ turn.role }}{{ ' ' }}
{%- for part in turn.content if part.type == 'video' -%}<video>{%- endfor -%}
{%- for part in turn.content if part.type == 'text' -%}{{ '\n' + part.text }}{%- endfor -%}
<|im_end|>
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant{{ '\n' }}{%- endif -%}"""


def test_llava_answers_open_as_generation_opens_them(with_template: Callable[[str, str], Family]) -> None:
    family = with_template("llava_onevision", LLAVA_LIKE)
    example = build(family, CLIP_TALK, [clip(4)])
    assert answers(family, example) == ["Yes.<|im_end|>"] * 2
    prompt = build_prompt(
        replace(CLIP_TALK, messages=CLIP_TALK.messages[:3]), [clip(4)], [], family, template_kwargs={}
    )
    assert torch.equal(prompt.input_ids, example.input_ids[: runs(example.labels)[1][0]])


# As those of thinking models: only the last answer keeps the (empty) thought that the prompt opens with.
THINKING = """{%- for turn in messages -%}
<|im_start|>{{ turn.role }}{{ '\n' }}
{%- if turn.role == 'assistant' and loop.last -%}<think></think>{%- endif -%}
{%- for part in turn.content -%}
{{ '<|vision_start|><|video_pad|><|vision_end|>' if part.type == 'video' else part.text }}
{%- endfor -%}
<|im_end|>{{ '\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant{{ '\n' }}<think></think>{%- endif -%}"""


def test_the_last_answer_alone_where_earlier_ones_are_rewritten(with_template: Callable[[str, str], Family]) -> None:
    family = with_template("qwen3_vl", THINKING)
    with pytest.raises(DataError, match=r"turn 2 are not found.*data\.supervise"):
        build(family, CLIP_TALK, [clip(4)])
    example = build(family, CLIP_TALK, [clip(4)], last_only=True)
    decode = family.processor.tokenizer.decode
    ((start, end),) = runs(example.labels)
    assert decode(example.labels[start:end]) == "Yes.<|im_end|>"
    assert decode(example.input_ids[:start]).endswith("assistant\n<think></think>")


def test_what_the_row_says_must_be_in_the_rendering(with_template: Callable[[str, str], Family]) -> None:
    """A template that drops a system prompt, or prints a list of parts, would train on something else."""
    drops = THINKING.replace("for turn in messages", "for turn in messages if turn.role != 'system'")
    row = sample(("system", ["Be brief."]), ("user", ["What?"]), ("assistant", ["That."]))
    with pytest.raises(DataError, match=r"leaves out what turn 1 says: 'Be brief\.'"):
        build(with_template("qwen3_vl", drops), row)
    prints = GLM_LIKE.replace("turn.content }}", "turn.content | string | upper }}")
    with pytest.raises(DataError, match=r"leaves out what turn 2 says: 'That\.'"):
        build(with_template("glm4v", prints), sample(("user", ["What?"]), ("assistant", ["That."])))


@pytest.mark.parametrize(("num_frames", "side"), [(1, 64), (2, 64), (7, 96), (16, 80)])
def test_nemotron_expands_a_video_as_its_processor_does(
    families: dict[str, Family], num_frames: int, side: int
) -> None:
    family = families["nemotron_h_omni"]
    row = sample(("system", ["Be brief."]), ("user", ["Look:", VIDEO, "What?"]), ("assistant", ["That."]))
    video = clip(num_frames, side)
    text = family.processor.apply_chat_template(list(row.messages), tokenize=False, enable_thinking=False)
    wanted = family.processor(
        text=[text],
        videos=[frames_tensor(video)],
        video_metadata=video_metadata(video),
        do_sample_frames=False,
        return_tensors="pt",
    )
    example = build(family, row, [video])
    assert torch.equal(example.input_ids, wanted["input_ids"][0])
    assert torch.equal(example.media["pixel_values_videos"][0], wanted["pixel_values_videos"])
    assert "sampled at 0.00 seconds" in family.processor.tokenizer.decode(example.input_ids)


@pytest.mark.parametrize("name", ["qwen3_vl", "qwen3_vl_moe", "qwen2_5_vl"])
def test_qwen_ids_are_its_processors(families: dict[str, Family], name: str) -> None:
    family = families[name]
    row = sample(("user", [VIDEO, "What?", IMAGE]), ("assistant", ["That."]))
    video, picture = clip(6), image()
    text = family.processor.apply_chat_template(list(row.messages), tokenize=False)
    wanted = family.processor(
        text=[text],
        images=[picture],
        videos=[frames_tensor(video)],
        video_metadata=[video_metadata(video)],
        do_sample_frames=False,
        return_tensors="pt",
    )
    example = build(family, row, [video], [picture])
    assert torch.equal(example.input_ids, wanted["input_ids"][0])
    assert torch.equal(example.media["pixel_values_videos"], wanted["pixel_values_videos"])
    assert example.position_ids is not None
    assert example.position_ids.shape == (3, len(example.input_ids))


def test_item_counts() -> None:
    item = MediaItem("video", num_units=3, height=4, width=5)
    assert (item.tokens_per_unit, item.num_tokens) == (20, 60)
