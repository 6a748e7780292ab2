"""At rate 0 the pruned model is the plain one, bit for bit: logits, loss and every gradient.

Training computes some of these logits only; test_head.py compares that with all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutputWithPast

from tests.parity.rig import (
    Rig,
    attention_mask,
    language_model_logits,
    plain_forward_fails,
    plain_media,
    unpruned_embeds,
)

BATCHES = [("two", "image", "text", "still", "both"), ("two",), ("still", "text"), ("image",), ("text",)]


def plain_qwen(rig: Rig, batch: dict[str, Any]) -> Any:
    """The forward of transformers on the processor's own outputs, positions computed by the model itself."""
    ids, config = batch["input_ids"], rig.family.config
    kinds = torch.zeros_like(ids)
    kinds[ids == config.image_token_id] = 1
    kinds[ids == config.video_token_id] = 2
    return rig.model(
        input_ids=ids,
        labels=batch["labels"],
        attention_mask=attention_mask(batch),
        mm_token_type_ids=kinds,
        **batch["media"],
    )


def plain_nemotron(rig: Rig, batch: dict[str, Any]) -> Any:
    """The plain language model on the same embeddings: 5.23 has no forward with video that works."""
    ids, media = batch["input_ids"], batch["media"]
    embeds = rig.model.get_input_embeddings()(ids)
    images = (
        iter(rig.model.get_image_features(media["pixel_values"], media["image_grid_hw"]).pooler_output)
        if "pixel_values" in media
        else iter(())
    )
    videos = iter(
        [rig.model.get_video_features(v).pooler_output.flatten(0, 1) for v in media.get("pixel_values_videos", ())]
    )
    features = [next(videos if planned.item.kind == "video" else images) for planned in batch["plan"].items]
    if features:
        places = (ids == rig.family.config.image_token_id).unsqueeze(-1).expand_as(embeds)
        embeds = embeds.masked_scatter(places, torch.cat(features))
    out = rig.model.language_model(inputs_embeds=embeds, attention_mask=attention_mask(batch))
    out.loss = rig.model.loss_function(
        logits=out.logits, labels=batch["labels"], vocab_size=rig.family.config.text_config.vocab_size
    )
    return out


def plain_glm(rig: Rig, batch: dict[str, Any]) -> Any:
    """The forward of transformers; for images beside videos, where it fails, its language model on the embeddings."""
    ids, media = batch["input_ids"], batch["media"]
    kinds = torch.tensor(rig.family.processor.create_mm_token_type_ids(ids.tolist()))
    mask = attention_mask(batch)
    if not plain_forward_fails(rig, batch):
        return rig.model(input_ids=ids, labels=batch["labels"], attention_mask=mask, mm_token_type_ids=kinds, **media)
    grids = {name: grid for name, grid in media.items() if name.endswith("grid_thw")}
    positions, _ = rig.model.model.get_rope_index(ids, mm_token_type_ids=kinds, attention_mask=mask, **grids)
    logits = language_model_logits(rig, unpruned_embeds(rig, batch), mask, positions)
    loss = rig.model.loss_function(
        logits=logits, labels=batch["labels"], vocab_size=rig.family.config.text_config.vocab_size
    )
    return CausalLMOutputWithPast(loss=loss, logits=logits)


def plain_llava(rig: Rig, batch: dict[str, Any]) -> Any:
    """The forward of transformers, which takes one stack of videos; given the features where they differ in length."""
    media, outputs = dict(batch["media"]), None
    videos = media.pop("pixel_values_videos", [])
    if len({len(video) for video in videos}) == 1:
        media["pixel_values_videos"] = torch.stack(videos)
    elif videos:
        of_images = rig.model.get_image_features(**media).pooler_output if media else None
        rows = rig.model.get_video_features(torch.cat(videos)[None]).pooler_output[0]
        *of_frames, newline = rows.split([16 * len(video) for video in videos] + [1])
        of_videos = torch.cat([torch.cat([one, newline]) for one in of_frames])
        media, outputs = {}, {"video": pooled(of_videos[None])} | ({"image": pooled(of_images)} if of_images else {})
    return rig.model(
        input_ids=batch["input_ids"],
        labels=batch["labels"],
        attention_mask=attention_mask(batch),
        mm_encoder_outputs=outputs,
        **media,
    )


def pooled(features: Any) -> BaseModelOutputWithPooling:
    return BaseModelOutputWithPooling(pooler_output=features)


def plain(rig: Rig, batch: dict[str, Any]) -> Any:
    """The forward of transformers on the processor's own outputs, which counts positions by itself."""
    return rig.model(
        input_ids=batch["input_ids"],
        labels=batch["labels"],
        attention_mask=attention_mask(batch),
        **plain_media(rig, batch),
    )


PLAIN = {
    "qwen3_vl": plain_qwen,
    "qwen3_vl_moe": plain_qwen,
    "qwen2_5_vl": plain_qwen,
    "qwen3_5": plain_qwen,
    "glm4v": plain_glm,
    "glm46v": plain_glm,
    "llava_onevision": plain_llava,
    "video_llama_3": plain,
    "nemotron_h_omni": plain_nemotron,
    "internvl": plain,
}


@pytest.mark.capability("rate 0 is the plain model", "bit for bit")
@pytest.mark.parametrize("names", BATCHES, ids="+".join)
@pytest.mark.parametrize("encoder_trains", [False, True])
def test_rate_zero_equals_the_plain_forward(
    rig: Rig, names: tuple[str, ...], encoder_trains: bool, record_property: Callable[[str, object], None]
) -> None:
    if rig.family.model_type == "nemotron_h_omni":
        record_property("cell", "of its language model, bit for bit")
    elif plain_forward_fails(rig, rig.batch(names)):
        record_property("cell", "where its own forward fails: of its language model")
    elif rig.family.model_type == "internvl" and len(names) > 1:
        record_property("cell", "gradients of images and videos together: to 1e-4")
    equals_the_plain_forward(rig, names, encoder_trains)


@pytest.mark.parametrize("seed", [1, 2])
def test_rate_zero_equals_the_plain_forward_with_other_weights(rig: Rig) -> None:
    equals_the_plain_forward(rig, BATCHES[0], encoder_trains=True)


def equals_the_plain_forward(rig: Rig, names: tuple[str, ...], encoder_trains: bool) -> None:
    batch = rig.batch(names, 0.0)
    plain = PLAIN[rig.family.model_type](rig, batch)
    plain.loss.backward()
    expected = rig.gradients()
    rig.model.zero_grad(set_to_none=True)

    pruned, _ = rig.full(batch, encoder_trains=encoder_trains)
    pruned.loss.backward()

    real = attention_mask(batch).bool()  # behind a row's end the plain forward may count positions on
    assert torch.equal(pruned.logits[real], plain.logits[real])
    assert torch.equal(pruned.loss, plain.loss)
    # InternVL's own forward encodes images and videos in one call. Two calls sum the same gradients in another order.
    one_call = rig.family.model_type != "internvl" or len({planned.item.kind for planned in batch["plan"].items}) < 2
    for name, gradient in rig.gradients().items():
        reference = expected[name]
        if reference is None:  # the plain model never ran the tower; a blank medium gives it exact zeros
            assert gradient is None or not gradient.any(), name
        else:
            assert gradient is not None
            if one_call:
                assert torch.equal(gradient, reference), name
            else:
                torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


def test_every_trainable_parameter_gets_a_gradient_whatever_the_batch_holds(rig: Rig) -> None:
    for names in BATCHES:
        rig.model.zero_grad(set_to_none=True)
        out, _ = rig.forward(rig.batch(names, 0.5), encoder_trains=True)
        out.loss.backward()
        missing = [name for name, gradient in rig.gradients().items() if gradient is None]
        assert missing == [], names


def test_a_blank_medium_does_not_change_the_loss(rig: Rig) -> None:
    without, _ = rig.forward(rig.batch(("text",)), encoder_trains=False)
    with_blank, _ = rig.forward(rig.batch(("text",)), encoder_trains=True)
    assert torch.equal(without.logits, with_blank.logits)


def test_a_call_without_a_plan_passes_through(rig: Rig) -> None:
    ids = rig.examples["text"].input_ids[None]
    hooked, _ = rig.forward({"input_ids": ids})
    assert torch.equal(hooked.logits, rig.model(input_ids=ids).logits)
