"""Parameters of CLIP's text towers under the names of transformers (CLIPTextModel, CLIPTextModelWithProjection)."""

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp

from gspn_jax.text.clip import ACTIVATIONS, CLIPText
from gspn_jax.weights.renamed import Renamed
from gspn_jax.weights.tensors import Tensors
from gspn_jax.weights.torch_layouts import Row, block_count, filled, linear_rows, norm_rows, shape_of

_PREFIX = "text_model."  # in most files, but not in all
_TOKENS = "embeddings.token_embedding.weight"
_POSITIONS = "embeddings.position_embedding.weight"
_POSITION_IDS = "embeddings.position_ids"  # 0, 1, 2, ..., in old files
_PROJECTION = "text_projection.weight"
_LAYERS = "encoder.layers"
_LAYER_NORMS = [("attention_norm", "layer_norm1"), ("mlp_norm", "layer_norm2")]
_LAYER_LINEARS = [
    *((f"attention/{ours}", f"self_attn.{theirs}_proj") for ours, theirs in
      [("query", "q"), ("key", "k"), ("value", "v"), ("out", "out")]),
    ("widen", "mlp.fc1"),
    ("narrow", "mlp.fc2"),
]  # fmt: skip

_LARGEST_ID = 2  # an eos_token_id that old configs hold by mistake; programs then take the largest id instead
# Values of the keys that a config leaves out, as transformers' CLIPTextConfig has them.
_DEFAULTS = {
    "model_type": "clip_text_model",
    "num_attention_heads": 8,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "eos_token_id": _LARGEST_ID,  # theirs is 49407, in their vocabulary the same
}


def clip_text(arrays: Mapping[str, Any], config: Mapping[str, Any], *, dtype: jnp.dtype = jnp.float32) -> CLIPText:
    """Loads a text tower of SD-1.5, SDXL or their kin.

    Args:
        arrays: parameter names, with or without "text_model.", to arrays, which are read and converted one after
            another. With `text_projection.weight` the tower's "pooled" is projected.
        config: what text_encoder/config.json holds. Keys that are absent take transformers' defaults; sizes are those
            of the arrays.
        dtype: of computation and parameters.

    Returns:
        the tower; it takes ids (B, T), and returns a mapping with "last", "penultimate" and "pooled".

    Raises:
        ValueError: names all parameters that are missing, are left over, do not fit, or hold NaN or Inf; or the key of
            `config` that asks for what these towers lack.
    """
    tensors = Tensors(arrays)
    bare = {name.removeprefix(_PREFIX): name for name in tensors}
    bare.pop(_POSITION_IDS, None)
    tensors = Renamed(tensors, bare)
    sizes = _sizes(tensors)
    sizes |= _settings({**_DEFAULTS, **config}, sizes["width"])
    build = functools.partial(CLIPText, **sizes, dtype=dtype, param_dtype=dtype)
    return filled(build, _rows(tensors, sizes["depth"]), tensors, kind="CLIPTextModel")


def _sizes(arrays: Mapping[str, Any]) -> dict[str, Any]:
    vocabulary, width = shape_of(arrays, _TOKENS, axes=2)
    return dict(
        vocabulary=vocabulary,
        width=width,
        depth=block_count(arrays, _LAYERS),
        hidden=shape_of(arrays, f"{_LAYERS}.0.mlp.fc1.weight", axes=2)[0],
        length=shape_of(arrays, _POSITIONS, axes=2)[0],
        projection=shape_of(arrays, _PROJECTION, axes=2)[0] if _PROJECTION in arrays else None,
    )


def _settings(config: Mapping[str, Any], width: int) -> dict[str, Any]:
    def check(key: str, is_supported: bool, expected: str) -> None:
        if not is_supported:
            raise ValueError(f"config: expected {key} to be {expected}, got {config[key]!r}")

    heads, epsilon, end = (config[key] for key in ("num_attention_heads", "layer_norm_eps", "eos_token_id"))
    check("model_type", config["model_type"] == "clip_text_model", "'clip_text_model'")
    check("hidden_act", config["hidden_act"] in tuple(ACTIVATIONS), " or ".join(map(repr, ACTIVATIONS)))
    check("num_attention_heads", type(heads) is int and heads > 0 and width % heads == 0, f"a divisor of {width}")
    check("layer_norm_eps", type(epsilon) in (int, float) and 0 < epsilon < 1, "between 0 and 1")
    check("eos_token_id", type(end) is int, "an integer")
    return dict(
        num_heads=heads,
        activation=config["hidden_act"],
        epsilon=epsilon,
        end=None if end == _LARGEST_ID else end,
    )


def _rows(arrays: Mapping[str, Any], depth: int) -> Iterator[Row]:
    def layers(theirs: str) -> list[str]:
        return [f"{_LAYERS}.{index}.{theirs}" for index in range(depth)]

    yield ("tokens", "embedding"), _TOKENS, "table"
    yield ("positions", "embedding"), _POSITIONS, "table"
    for ours, theirs in _LAYER_NORMS:
        yield from norm_rows(("layers", ours), layers(theirs))
    for ours, theirs in _LAYER_LINEARS:
        yield from linear_rows(("layers", *ours.split("/")), layers(theirs))
    yield from norm_rows(("norm",), "final_layer_norm")
    if _PROJECTION in arrays:
        yield ("project", "kernel"), _PROJECTION, "linear"
