from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from evs_train.generation import PrunedModel
from evs_train.inspection.observe import Observation, load, observe
from evs_train.inspection.options import read_options
from tests.conftest import write_noise

RATES = (0.5, 0.75, 0.9)
Look = Callable[..., Observation]

_MODELS: dict[tuple[str, str], PrunedModel] = {}


@pytest.fixture(scope="session")
def wide_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """13 frames of 96 x 64 pixels, the lower half new in each: units of two frames, and one of a single frame."""
    path = tmp_path_factory.mktemp("clips") / "wide.mp4"
    write_noise(path, num_frames=13, width=96)
    return path


@pytest.fixture
def encoder(tiny_checkpoint: Callable[[str], Path], wide_clip: Path, tmp_path: Path) -> Callable[..., PrunedModel]:
    """The encoder of a family's tiny checkpoint, as the command loads it; every frame is sampled."""

    def loaded(family: str, dtype: str = "float32") -> PrunedModel:
        if (family, dtype) not in _MODELS:
            keys = {"model": str(tiny_checkpoint(family)), "dtype": dtype, "fps": "8", "out": str(tmp_path / "o.png")}
            _MODELS[family, dtype] = load(read_options([str(wide_clip)], keys))
        return _MODELS[family, dtype]

    return loaded


@pytest.fixture
def look(encoder: Callable[..., PrunedModel], wide_clip: Path) -> Look:
    """What a family keeps of the wide clip, or of another video."""

    def seen(
        family: str = "qwen3_vl", rates: Sequence[float] = RATES, video: Path = wide_clip, dtype: str = "float32"
    ) -> Observation:
        return observe(encoder(family, dtype), str(video), rates)

    return seen
