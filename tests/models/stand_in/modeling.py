"""The contract of the release's forward, as it was read: it takes pixels and flags and no features."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import NemotronHForCausalLM, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration import NemotronH_Nano_VL_V2_Config


class Tower(nn.Module):
    """One token per patch."""

    def __init__(self, patch_size: int, hidden_size: int) -> None:
        super().__init__()
        self.embedder = nn.Conv2d(3, hidden_size, patch_size, patch_size)
        self.block = nn.Sequential(nn.GELU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, pixel_values: Tensor) -> Tensor:
        embeds: Tensor = self.block(self.embedder(pixel_values).flatten(2).transpose(1, 2))
        return embeds


class NemotronH_Nano_VL_V2(PreTrainedModel):
    config_class = NemotronH_Nano_VL_V2_Config
    main_input_name = "pixel_values"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.language_model = NemotronHForCausalLM(config.llm_config)
        self.vision_model = Tower(config.patch_size, config.vit_hidden_size)
        side = round(1 / config.downsample_ratio)
        self.mlp1 = nn.Sequential(
            nn.LayerNorm(config.vit_hidden_size * side**2),
            nn.Linear(config.vit_hidden_size * side**2, config.llm_config.hidden_size, bias=False),
        )
        self.side = side
        self.img_context_token_id = config.img_context_token_id
        self.post_init()

    def extract_feature(self, pixel_values: Tensor) -> Tensor:
        embeds = self.vision_model(pixel_values).to(torch.bfloat16)  # (tiles, h * w, C)
        count, side = len(embeds), int(embeds.shape[1] ** 0.5) // self.side
        embeds = embeds.view(count, side, self.side, side, self.side, -1).transpose(2, 3).reshape(count, side**2, -1)
        features: Tensor = self.mlp1(embeds)
        return features

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        image_flags: Any = None,
        past_key_values: Any = None,
        labels: Any = None,
        inputs_embeds: Any = None,
        use_cache: Any = None,
        output_attentions: Any = None,
        output_hidden_states: Any = None,
        return_dict: Any = None,
    ) -> CausalLMOutputWithPast:
        if inputs_embeds is None:
            inputs_embeds = self.language_model.get_input_embeddings()(input_ids)
        image_flags = image_flags.squeeze(-1)
        shape = inputs_embeds.shape
        inputs_embeds = inputs_embeds.reshape(-1, shape[-1])
        selected = input_ids.reshape(-1) == self.img_context_token_id
        features = self.extract_feature(pixel_values)[image_flags == 1].reshape(-1, shape[-1])
        inputs_embeds[selected] = inputs_embeds[selected] * 0.0 + features
        out = self.language_model(inputs_embeds=inputs_embeds.reshape(shape), attention_mask=attention_mask)
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss=loss, logits=out.logits)
