"""A processor without names for its placeholders and without videos, as the copies that were read have it."""

from __future__ import annotations

from typing import Any

from transformers import ProcessorMixin


class NemotronNanoVLV2Processor(ProcessorMixin):
    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
