"""Families of transformers, tiny and random: configurations are shrunk by the names of their fields."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

Built = tuple[nn.Module, list[Callable[[nn.Module], Any]]]

SMALL: dict[str, int] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embed_dim", "hidden_dim", "emb_dim", "dim"), 32),
    **dict.fromkeys(("decoder_hidden_size", "encoder_hidden_size", "text_hidden_size", "embedding_size"), 32),
    **dict.fromkeys(("out_hidden_size", "output_dim", "projection_dim", "output_hidden_size", "fpn_hidden_size"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "mlp_dim", "decoder_intermediate_size", "n_inner"), 64),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "moe_intermediate_size", "dim_feedforward"), 64),
    **dict.fromkeys(("encoder_intermediate_size", "shared_expert_intermediate_size", "decoder_mlp_dim"), 64),
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_head", "n_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "decoder_num_attention_heads", "swa_num_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "swa_num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "v_head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "swa_head_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "attention_head_size"), 8),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers", "layers", "depth"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_decoder_layers", "num_encoder_layers"), 2),
    **dict.fromkeys(("decoder_num_hidden_layers",), 2),
    **dict.fromkeys(("rotary_dim", "n_shared_experts", "moe_topk"), 4),
    "vocab_size": 96,
    "max_position_embeddings": 64,
    **dict.fromkeys(("n_positions", "max_source_positions", "max_target_positions", "n_ctx"), 64),
    **dict.fromkeys(("image_size", "pretrain_image_size"), 32),
    "patch_size": 8,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "num_queries"), 2),
    **dict.fromkeys(("num_mel_bins",), 16),
    **dict.fromkeys(("sliding_window", "attention_window", "local_attention"), 6),
    **dict.fromkeys(("n_group", "topk_group"), 1),
}
LISTS: dict[str, int] = {"depths": 1, "hidden_sizes": 32, "num_heads": 2, "num_attention_heads": 2, "conv_dim": 32}

LESS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "layers", "depth", "encoder_layers", "vocab_size")
"""What is shrunk where all together give no model: the widths stay."""

TOKEN, TOKENS = 90, {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3, "decoder_start_token_id": 2}
MOST = 40_000_000  # parameters
LENGTH = 10

CHECKED_BY_OTHERS = ("timm_backbone", "timm_wrapper")
DERIVED = ("layer_types", "mlp_layer_types", "architectures", "dtype", "transformers_version", "attn_implementation")
DERIVED += ("out_features", "out_indices", "stage_names", "_out_features", "_out_indices", "id2label", "label2id")
MORE = ("pixel_values", "input_ids", "input_features", "input_values", "decoder_input_ids", "bbox")
"""Inputs that a model may need though it does not say so."""


def names() -> list[str]:
    """Every family with a model."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    return [name for name in MODEL_MAPPING_NAMES if name not in CHECKED_BY_OTHERS]


def builds(name: str) -> Iterator[Callable[[], Built]]:
    """Ways to a model and calls of it, to be tried one after the other."""
    for small in (SMALL, {key: SMALL[key] for key in LESS}):
        for less in ((), ("image_size", "patch_size")):
            yield partial(_built, name, {key: value for key, value in small.items() if key not in less})


def _built(name: str, small: dict[str, int]) -> Built:
    config = _config(name, small)
    model = _model(config)
    inputs = [_inputs(model, config, more) for more in ((), MORE, (*MORE, "encoder_hidden_states"))]
    return model, [lambda module, given=given: module(**given) for given in inputs]


def _config(name: str, small: dict[str, int]) -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = CONFIG_MAPPING[name]
    return kind(**_shrunk(kind().to_dict(), small))


def _model(config: Any) -> nn.Module:
    from transformers import AutoModel

    with torch.device("meta"):
        size = sum(one.numel() for one in AutoModel.from_config(config, attn_implementation="eager").parameters())
    if size > MOST:
        raise ValueError(f"not shrunk enough: {size:,} parameters")
    torch.manual_seed(0)
    return AutoModel.from_config(config, attn_implementation="eager").float()


def _shrunk(given: dict[str, Any], small: dict[str, int]) -> dict[str, Any]:
    """A configuration's fields, those of a known name smaller; what is derived from others is left out."""
    made: dict[str, Any] = {}
    for key, value in given.items():
        if isinstance(value, dict) and key.endswith("config"):
            made[key] = _shrunk(value, small)
        elif key.endswith("token_id") and value is not None:
            made[key] = TOKENS.get(key, TOKEN) if isinstance(value, int) else [TOKEN]
        elif key == "model_type" or isinstance(value, bool):
            made[key] = value
        elif isinstance(value, int) and key in small:
            made[key] = min(small[key], value) if value > 0 else value
        elif isinstance(value, list) and value and all(type(one) is int for one in value):
            made |= _list(key, value, small)
        elif key not in DERIVED:
            made[key] = value
    return {key: value for key, value in made.items() if key not in DERIVED}


def _list(key: str, value: list[int], small: dict[str, int]) -> dict[str, Any]:
    if key in LISTS and "hidden_size" in small:
        return {key: [LISTS[key]] * len(value)}
    if key in small:
        return {key: [min(small[key], one) for one in value]}
    return {key: value}


# ---- inputs


def _inputs(model: nn.Module, config: Any, more: tuple[str, ...]) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(2)
    parameters = inspect.signature(model.forward).parameters
    needed = {n for n, one in parameters.items() if one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD}
    wanted = sorted({getattr(model, "main_input_name", "input_ids"), "decoder_input_ids", *needed, *more})
    return {name: _value(name, config, generator) for name in wanted if name in parameters}


def _value(name: str, config: Any, generator: torch.Generator) -> torch.Tensor:
    if name.endswith("ids"):
        if name == "decoder_input_ids":
            return torch.randint(4, 60, (2, LENGTH - 3), generator=generator)
        return torch.randint(4, 60, (2, LENGTH), generator=generator)
    if name.startswith("pixel_values") or name in ("images", "flattened_patches"):
        return _pixels(name, config, generator)
    if name == "bbox":
        return torch.randint(0, 20, (2, LENGTH, 4), generator=generator)
    if name in ("input_values", "input_features"):
        return _sound(name, config, generator)
    return torch.randn(2, LENGTH, 32, generator=generator)


def _find(config: Any, *names: str, default: Any) -> Any:
    for one in (config, *(getattr(config, key, None) for key in ("vision_config", "audio_config", "backbone_config"))):
        for name in names:
            value = getattr(one, name, None)
            if value is not None:
                return value
    return default


def _pixels(name: str, config: Any, generator: torch.Generator) -> torch.Tensor:
    size = _find(config, "image_size", "img_size", "input_size", default=64)
    height, width = size[:2] if isinstance(size, list | tuple) else (size, size)
    if isinstance(size, dict):
        height, width = size["height"], size["width"]
    channels = _find(config, "num_channels", "in_channels", default=3)
    frames = [_find(config, "num_frames", default=4)] if "video" in name or "num_frames" in dir(config) else []
    return torch.randn(2, *frames, channels, height, width, generator=generator)


def _sound(name: str, config: Any, generator: torch.Generator) -> torch.Tensor:
    bins = _find(config, "num_mel_bins", "feature_size", "input_feat_per_channel", "input_dim", default=16)
    if name == "input_values" and hasattr(config, "max_length") and hasattr(config, "num_mel_bins"):
        return torch.randn(2, config.max_length, bins, generator=generator)
    if name == "input_values":
        return torch.randn(2, 4000, generator=generator)
    return torch.randn(2, 64, bins, generator=generator)
