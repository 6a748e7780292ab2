"""Answers of a running OpenAI-compatible server, and whether it prunes: its own count of the prompt's tokens tells.

A server prunes at the rate that its operator chose and says so nowhere; several engines take the setting and serve
dense all the same (docs/serving.md). But `usage.prompt_tokens` counts what the language model read. With the
checkpoint's processor at hand both counts are known beforehand, the dense and the pruned one.

Videos are sent as videos (`video_url`, a data URL), never as frames: engines do not prune images. Choices are asked for
in words and read from the answer, since the API does not tell how likely each is; a choice by likelihood can differ.

Invariant: a question is answered once, or an error names it. Cost: one request a question, `parallel` at a time.
Not here: segments and folders of frames, which cannot be sent as they are; they are refused by name.
"""

from __future__ import annotations

import base64
import http.client
import json
import mimetypes
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evs_train.config import ModelSection
from evs_train.data.sources import FrameList, Source, TarMember, name_of, read_bytes
from evs_train.data.video import decoding_options, frame_sampling
from evs_train.errors import DataError, MediaError, ServerError
from evs_train.evaluate.data import Question
from evs_train.evaluate.local import Prompts, free_verdicts, token_counts
from evs_train.evaluate.options import EvalOptions
from evs_train.evaluate.records import Record
from evs_train.evaluate.score import letter_said
from evs_train.generation import settings_of
from evs_train.models.loading import load_family

KEY_VARIABLE = "OPENAI_API_KEY"
"""Environment variable whose value is sent as the bearer token, if it is set."""
_PAUSES = (1.0, 4.0)  # seconds before the second and the third attempt
_PASSING = (408, 409, 425, 429, 500, 502, 503, 504)


class ServerModel:
    """A server that answers questions at the one rate it was started with.

    Args:
        url: up to and with /v1.
        options: of the evaluation.

    Raises:
        ServerError: it does not answer, or serves no model of that name.
        ModelError: the processor cannot be read.
    """

    def __init__(self, url: str, options: EvalOptions) -> None:
        self._url, self._options = url.rstrip("/"), options
        names = [str(one.get("id")) for one in self._call("/models", None).get("data", [])]
        if options.served not in (None, *names) or not names:
            raise ServerError(f"{url} serves {', '.join(names) or 'no model'}, not {options.served}", "see served=...")
        self._name = options.served or names[0]
        self._prompts: Prompts | None = None
        self._one_at_a_time = threading.Lock()  # tokenizers cannot be used by several threads
        if options.processor is not None:
            evs, section = settings_of(options.processor, options.sampled | {"frames_fps": options.frames_fps})
            model = ModelSection(
                path=options.processor, revision=options.revision, trust_remote_code=options.trust_remote_code
            )
            family = load_family(model, section, options.positions or evs.positions)
            self._prompts = Prompts(
                family, frame_sampling(section), decoding_options(section), section.template_kwargs, options.verify
            )

    def answer(self, question: Question, rates: Sequence[float]) -> list[Record]:
        """The record at the rate that the server is said to prune at.

        Raises:
            DataError, MediaError: the question cannot be sent.
            ServerError: the server does not answer it.
        """
        (rate,) = rates
        reply = self._call("/chat/completions", self.request(question))
        try:
            said = str(reply["choices"][0]["message"]["content"] or "").rsplit("</think>", 1)[-1].strip()
            tokens = (reply.get("usage") or {}).get("prompt_tokens")
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise ServerError(f"{self._url} answers in another form than OpenAI's: {str(reply)[:200]}") from error
        if question.choices and not question.whole:
            chosen = letter_said(said, question.choices)
            verdicts: dict[str, Any] = {"correct": chosen == question.choices[question.correct]}
        else:
            verdicts = free_verdicts(said, question, self._options)
        counts: dict[str, Any] = {}
        if self._prompts is not None:
            with self._one_at_a_time:
                prompt = self._prompts.of(question)
            counts = token_counts(prompt, rate)
            verdicts["proof"] = proof(tokens, counts.pop("tokens"), len(prompt.input_ids))
        return [
            Record(
                model=0,
                question=question.id,
                video=question.video,
                types=question.types,
                rate=rate,
                said=said,
                tokens=tokens,
                **verdicts,
                **counts,
            )
        ]

    def request(self, question: Question) -> dict[str, Any]:
        """Body of the request for one question, its media as data URLs."""
        if question.segment is not None:
            raise DataError(
                f"{question.sample.source}: it is about a segment of a video, and a server is sent whole files",
                "cut the segments out into files, or leave such questions out with on_error=skip",
            )
        files = {"video": iter(question.sample.videos), "image": iter(question.sample.images)}
        messages = [
            {
                "role": message["role"],
                "content": [
                    part
                    if part["type"] == "text"
                    else {
                        "type": f"{part['type']}_url",
                        f"{part['type']}_url": {"url": _data_url(next(files[part["type"]]), part["type"])},
                    }
                    for part in message["content"]
                ],
            }
            for message in question.sample.messages
        ]
        return {
            "model": self._name,
            "messages": messages,
            "temperature": 0,
            "max_tokens": self._options.max_new_tokens,
            **self._options.request,
        }

    def _call(self, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        """The server's answer, as JSON. What may pass (a busy server, a lost connection) is tried three times."""
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY_VARIABLE):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        call = urllib.request.Request(self._url + path, data, headers)  # noqa: S310 (http or https, by the options)
        for pause in (*_PAUSES, None):
            try:
                with urllib.request.urlopen(call, timeout=self._options.timeout) as answer:  # noqa: S310 (as above)
                    found = json.loads(answer.read())
                    return found if isinstance(found, dict) else {}
            except urllib.error.HTTPError as error:
                said = error.read().decode("utf-8", "replace")[:300]
                problem = ServerError(f"{self._url}{path} answers {error.code}: {said}", "see the server's own log")
                if error.code not in _PASSING:
                    raise problem from error
            except (OSError, http.client.HTTPException) as error:
                problem = ServerError(f"{self._url}{path} does not answer: {error}", "is the server running there?")
            except ValueError as error:
                raise ServerError(f"{self._url}{path} does not answer in JSON: {error}") from error
            if pause is None:
                raise problem
            time.sleep(pause)
        raise AssertionError("unreachable")


def proof(counted: int | None, pruned: int, dense: int) -> str | None:
    """What a server's count of the prompt's tokens shows.

    Args:
        counted: by the server, or None if it does not tell.
        pruned: tokens at the rate that it should prune at.
        dense: tokens without pruning.

    Returns:
        "pruned", or "ignored" where it read the whole video, "dense" where both counts are equal and met, "other" for
        any other count: the server samples or resizes otherwise than is assumed here. None if it does not tell.
    """
    if counted is None:
        return None
    if counted == dense:
        return "dense" if pruned == dense else "ignored"
    return "pruned" if counted == pruned else "other"


def _data_url(source: Source, kind: str) -> str:
    if isinstance(source, FrameList) or (isinstance(source, str) and Path(source).is_dir()):
        raise DataError(
            f"{name_of(source)} is a video of single frames, and a server is sent whole files",
            "engines prune no images; make a video file of them, or leave such questions out with on_error=skip",
        )
    name = source.name if isinstance(source, TarMember) else source
    media_type = mimetypes.guess_type(name)[0] or ("video/mp4" if kind == "video" else "image/jpeg")
    try:
        data = read_bytes(source)
    except OSError as error:
        raise MediaError(f"{name_of(source)}: cannot be read: {error.strerror}", reason="missing") from error
    return f"data:{media_type};base64,{base64.b64encode(data).decode('ascii')}"
