"""Tiles of one size, as many as an image is wide in tiles, up to `max_num_tiles`; `num_patches` says how many."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import BatchFeature, ImageProcessingMixin


class NemotronNanoVLV2ImageProcessor(ImageProcessingMixin):
    model_input_names = ["pixel_values"]  # noqa: RUF012 (as transformers reads it)

    def __init__(self, image_size: int = 32, max_num_tiles: int = 4, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.image_size = image_size
        self.max_num_tiles = max_num_tiles

    def __call__(self, images: list[Any], return_tensors: str | None = None, **kwargs: Any) -> BatchFeature:
        size, tiles, counts = self.image_size, [], []
        for image in images:
            count = min(self.max_num_tiles, max(1, image.width // image.height))
            pixels = np.array(image.convert("RGB").resize((size * count, size)), dtype=np.float32) / 127.5 - 1
            tiles += torch.from_numpy(pixels).permute(2, 0, 1).split(size, dim=-1)
            counts.append(count)
        return BatchFeature({"pixel_values": torch.stack(tiles), "num_patches": torch.tensor(counts)})
