"""Checkpoints to configuration, processor and weights: what is supported, what is refused and why.

Invariant: a model comes with all of its weights or not at all, keeps no cache while training, and does not prune by
itself, or its video would be pruned twice.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.utils import logging
from transformers.video_utils import VideoMetadata

from evs_train.config import ModelSection, Positions
from evs_train.data_config import OWN_KWARGS, DataSection
from evs_train.errors import ModelError, RecipeError
from evs_train.models import FAMILIES, RELEASED_AS, REMOTE_FAMILIES, nemotron_release
from evs_train.models.base import Family
from evs_train.models.remote_code import check_kernels, check_remote_code
from evs_train.models.tuning import part_of
from evs_train.redaction import redact

_ADAPTERS = FAMILIES | REMOTE_FAMILIES
# Formats of models that are supported in another format.
_OTHER_FORMATS = {
    "internvl_chat": "this is OpenGVLab's own format; transformers' (internvl), in repositories ...-hf, is supported",
}


def load_config(path: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The checkpoint's configuration, for a supported architecture only; of `RELEASED_AS`, transformers' own.

    Raises:
        ModelError: nothing readable is at `path`, its architecture is not supported, or its code may not be run.
    """
    if Path(path).exists() and not (Path(path) / "config.json").is_file():
        raise ModelError(
            f"{path} holds no config.json", _of_a_run(path) or "a checkpoint's folder, or a hub name, is needed"
        )
    if not Path(path).exists() and (Path(path).is_absolute() or len(Path(path).parts) > 2):  # no hub name: owner/name
        raise ModelError(f"the checkpoint {path} does not exist", "model.path is a checkpoint directory or a hub name")
    try:
        fields, _ = PreTrainedConfig.get_config_dict(path, revision=revision)
        check_kernels(path, dict(fields))
        model_type = dict(fields).get("model_type")  # config.json may hold an empty list
        if model_type is not None and model_type not in _ADAPTERS | RELEASED_AS:
            supported = f"supported: {', '.join(sorted(_ADAPTERS))}; docs/adding-a-family.md says how to add one"
            raise ModelError(
                f"the architecture '{model_type}' of {path} is not supported", _OTHER_FORMATS.get(model_type, supported)
            )
        if model_type in REMOTE_FAMILIES:
            check_remote_code(path, revision, trust_remote_code, fields)
        if model_type in RELEASED_AS:
            config = nemotron_release.read_config(fields)
            config.name_or_path = path
        else:
            config = AutoConfig.from_pretrained(path, revision=revision, **_code_options(model_type, revision))
        # InternVL's releases leave both out; the outer default of transformers 5.23 would tie their separate heads.
        if (
            config.model_type in FAMILIES
            and "tie_word_embeddings" not in fields
            and config.get_text_config() is not config
        ):
            config.tie_word_embeddings = config.get_text_config().tie_word_embeddings
        return config
    except (OSError, ValueError, StrictDataclassError) as error:
        hint = "check model.path and model.revision"
        if not Path(path).exists():
            hint = f"no folder here is called {path}, so the hub was asked for it: {hint}, the network, and your access"
        raise ModelError(f"the checkpoint {path} cannot be read: {_reason(error)}", hint) from error


def _code_options(model_type: str | None, revision: str | None) -> dict[str, Any]:
    """How transformers is told which code to run: of `REMOTE_FAMILIES` the pinned code, otherwise none but its own."""
    if model_type in REMOTE_FAMILIES:
        return {"trust_remote_code": True, "code_revision": revision}
    return {"trust_remote_code": False}


def _model_class(model_type: str) -> Any:
    """The class of transformers that makes the model; remote code is registered for `AutoModel`."""
    return AutoModel if model_type in REMOTE_FAMILIES else AutoModelForImageTextToText


def _of_a_run(path: str) -> str:
    """What to name in place of a run's folder, or of what it trained there; empty where `path` is neither."""
    folder = Path(path)
    run = folder.parent if folder.name == "final" or folder.name.startswith("checkpoint-") else folder
    if not (run / "export" / "config.json").is_file():
        return ""
    return f"{run} is a run's folder; what it exported is {run / 'export'}"


def _reason(error: Exception) -> str:
    """First line of an error's text; the second, too, where the first only announces it."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join(line.strip() for line in lines[: 2 if lines[0].endswith(":") else 1])


def load_family(model: ModelSection, data: DataSection, positions: Positions = "preserve") -> Family:
    """The family's adapter with the checkpoint's processor; loads no weights.

    Raises:
        ModelError: configuration or processor cannot be used, or the architecture is not supported.
        RecipeError: the family has no such rule for positions, or the processor does not take an option of
            `data.video_kwargs` or `data.image_kwargs`.
    """
    config = load_config(model.path, model.revision, model.trust_remote_code)
    rules = adapter_of(config).position_rules
    if positions not in rules:
        raise RecipeError(
            f"evs.positions: {positions} is not possible with {config.model_type}", f"it has {', '.join(rules)}"
        )
    try:
        processor = load_processor(model.path, model.revision, config)
    except (OSError, ValueError) as error:
        hint = _of_a_run(model.path) or "its files belong beside config.json"
        raise ModelError(f"the processor of {model.path} cannot be read: {_reason(error)}", hint) from error
    if processor.chat_template is None:
        raise ModelError(f"the processor of {model.path} has no chat template", "start from an instruction-tuned model")
    if config.model_type in FAMILIES:
        _check_options(processor, data)
    return adapter_of(config)(config, processor, data.video_kwargs, data.image_kwargs, positions)


def load_processor(path: str, revision: str | None, config: Any) -> Any:
    """The checkpoint's processor, for what `load_config` returned. Raises OSError, ValueError."""
    fields, _ = PreTrainedConfig.get_config_dict(path, revision=revision)
    if fields.get("model_type") in RELEASED_AS:
        return nemotron_release.read_processor(path, revision, config)
    return AutoProcessor.from_pretrained(path, revision=revision, **_code_options(config.model_type, revision))


def adapter_of(config: Any) -> type[Family]:
    """The class of the family's adapter, for what `load_config` returned."""
    return _ADAPTERS[config.model_type]


def _check_options(processor: Any, data: DataSection) -> None:
    """Raises RecipeError if the processor does not take the recipe's options of videos or images."""
    blank = torch.zeros(8, 3, 224, 224, dtype=torch.uint8)
    metadata = VideoMetadata(total_num_frames=8, fps=2.0, frames_indices=list(range(8)))
    video = {"videos": [blank], "video_metadata": [metadata], "do_sample_frames": False}
    if data.video_kwargs:
        _try_options("data.video_kwargs", data.video_kwargs, processor.video_processor, video)
    if data.image_kwargs:
        _try_options("data.image_kwargs", data.image_kwargs, processor.image_processor, {"images": [blank[0]]})


def _try_options(key: str, options: Mapping[str, Any], processor: Any, blank: Mapping[str, Any]) -> None:
    """Run a blank video or image through `processor` with the recipe's `options`.

    It is known to work without them, so whatever is raised is theirs.
    """
    name = type(processor).__name__
    known = sorted(set(processor.valid_kwargs.__annotations__) - set(OWN_KWARGS))
    for option in options:
        if option not in known:
            near = difflib.get_close_matches(option, known, n=1)
            raise RecipeError(
                f"{key}.{option}: {name} has no such option" + (f"; did you mean {near[0]}?" if near else ""),
                f"its options are {', '.join(known)}",
            )
    try:
        processor(**blank, **options, return_tensors="pt")
    except Exception as error:
        raise RecipeError(f"{key}: {name} does not take {dict(options)}: {_reason(error)}") from error


def load_encoder(model: ModelSection, config: Any, dtype: torch.dtype) -> PreTrainedModel:
    """The model with all of its vision tower and projector, and one layer of its language model.

    Enough to encode video, at the cost of the encoder, one layer and the embeddings: the other layers are not read. It
    cannot answer. A family whose code comes with the checkpoint is loaded whole. Raises ModelError as `load_weights`.
    """
    if config.model_type in REMOTE_FAMILIES:
        return load_weights(model, config, dtype)
    config = copy.deepcopy(config)
    text = config.get_text_config()
    if "layers_block_type" in text.to_dict():  # Nemotron-H counts its layers by this list
        text.layers_block_type = text.layers_block_type[:1]
    text.num_hidden_layers = 1
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it would list every layer that is left out
    try:
        return load_weights(model, config, dtype)
    finally:
        logging.set_verbosity(verbosity)


def load_weights(model: ModelSection, config: Any, dtype: torch.dtype) -> PreTrainedModel:
    """The plain transformers model in `dtype`, not pruning by itself.

    Raises:
        ModelError: weights are missing or do not fit.
    """
    if "video_pruning_rate" in config.to_dict():
        config.video_pruning_rate = 0.0
    try:
        loaded: PreTrainedModel
        loaded, info = _model_class(config.model_type).from_pretrained(
            model.path,
            revision=model.revision,
            config=config,
            dtype=dtype,
            attn_implementation=model.attn_implementation,
            use_safetensors=True,  # older forms of weights are pickles
            output_loading_info=True,
            **_code_options(config.model_type, model.revision),
        )
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"the weights of {model.path} cannot be loaded: {_reason(error)}",
            "all of them must be there, as safetensors; what model.attn_implementation names must be installed",
        ) from error
    except AttributeError as error:
        if config.model_type not in REMOTE_FAMILIES:
            raise
        raise ModelError(
            f"the code of {model.path} does not fit this version of transformers: {_reason(error)}",
            "correct a copy in a directory; a model's __init__ must end with self.post_init()",
        ) from error
    loaded.name_or_path = loaded.config.name_or_path = redact(model.path)  # adapters are saved with it
    # transformers fills what the files lack with random numbers and only logs it.
    family, parameters = adapter_of(config), {name for name, _ in loaded.named_parameters()}
    missing = sorted(name for name in info["missing_keys"] if name in parameters and part_of(name, family) is not None)
    if missing:
        raise ModelError(
            f"the weights of {model.path} lack {len(missing)} tensor(s) of the model, the first being {missing[0]}",
            "the checkpoint is incomplete or of another architecture",
        )
    # The text model goes by its own config. A cache would keep Mamba from its fused kernel, and hides a missing mask:
    # transformers looks for documents only where there is neither.
    loaded.config.use_cache = loaded.config.get_text_config().use_cache = False
    if is_deepspeed_zero3_enabled():
        # transformers 5.23 records all renamings it knows under ZeRO-3, used or not, and saving would apply them all
        # in reverse: Qwen3-VL's layers would come out as `model.language_model.model.layers`.
        loaded._weight_conversions = [rule for rule in loaded._weight_conversions if rule.was_used()]
    return loaded


def without_weights(config: Any, revision: str | None = None) -> PreTrainedModel:
    """The plain model with its shapes and names only (meta device): enough to count and to plan."""
    with torch.device("meta"):
        options = _code_options(config.model_type, revision)
        model: PreTrainedModel = _model_class(config.model_type).from_config(config, **options)
    return model
