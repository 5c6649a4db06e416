"""What unet/config.json of a Stable Diffusion folder says about its network, with diffusers' meaning of absent keys."""

from collections.abc import Mapping
from typing import Any

from gspn_jax.models.unet import TIME_IDS
from gspn_jax.weights.torch_layouts import block_count, shape_of

# The values that `UNet` supports; the first is diffusers' default for an absent key. Other keys are free or ignored.
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "_class_name": ("UNet2DConditionModel",),
    "act_fn": ("silu", "swish"),
    "addition_embed_type": (None, "text_time"),
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "class_embeddings_concat": (False,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (None,),
    "downsample_padding": (1,),
    "dropout": (0.0,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "mid_block_only_cross_attention": (None, False),
    "mid_block_scale_factor": (1,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "num_attention_heads": (None,),  # diffusers refuses it too: attention_head_dim counts the heads
    "num_class_embeds": (None,),
    "only_cross_attention": (False,),
    "resnet_out_scale_factor": (1.0,),
    "resnet_skip_time_act": (False,),
    "resnet_time_scale_shift": ("default",),
    "reverse_transformer_layers_per_block": (None,),
    "time_cond_proj_dim": (None,),
    "time_embedding_act_fn": (None,),
    "time_embedding_dim": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
    # 1x1 convolution or linear layer, attention scores in float32 or not: the network is the same.
    "upcast_attention": (False, True),
    "use_linear_projection": (False, True),
}
_CONTEXT = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
_BLOCK_TYPES = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}


def diffusers_unet_sizes(config: Mapping[str, Any], arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Reads the options of `UNet` that define its parameters and arithmetic.

    Depths of transformers are read off the tensors' names; other sizes off the tensors where the config lacks them.

    Args:
        config: the mapping of unet/config.json.
        arrays: diffusers' parameter names to arrays.

    Raises:
        ValueError: names all keys that ask for what `UNet` lacks; or a key, or parameter, that is missing or misshapen.
    """
    _check_supported(config)
    levels = block_count(arrays, "down_blocks")
    depths = tuple(_depth(arrays, f"down_blocks.{level}") for level in range(levels))

    def size(key: str, name: str, axis: int) -> int:
        value = config.get(key)
        return shape_of(arrays, name)[axis] if value is None else _one(key, value)

    def width(level: int) -> int:
        return shape_of(arrays, f"down_blocks.{level}.resnets.0.conv1.weight")[0]

    widths = _each("block_out_channels", config.get("block_out_channels") or [*map(width, range(levels))], levels)
    heads = config.get("attention_head_dim", 8)  # an old misnomer: it is the number of heads
    num_heads = _each("attention_head_dim", heads, levels)
    for channels, number, depth in zip(widths, num_heads, (*depths[:-1], 1), strict=True):  # the middle is as the last
        if depth and channels % number:
            raise ValueError(f"config: expected attention_head_dim to be numbers of heads, got {heads} for {widths}")
    sizes = dict(
        widths=widths,
        depths=depths,
        middle_depth=_depth(arrays, "mid_block"),
        num_heads=num_heads,
        blocks=_one("layers_per_block", config.get("layers_per_block") or block_count(arrays, "down_blocks.0.resnets")),
        context_width=size("cross_attention_dim", _CONTEXT, 1),
        in_channels=size("in_channels", "conv_in.weight", 1),
        out_channels=size("out_channels", "conv_out.weight", 0),
        norm_groups=_one("norm_num_groups", config.get("norm_num_groups", 32)),
        epsilon=_epsilon(config.get("norm_eps", 1e-5)),
    )
    if config.get("addition_embed_type") is None:
        return sizes
    features = _one("addition_time_embed_dim", config.get("addition_time_embed_dim"))
    added = size("projection_class_embeddings_input_dim", "add_embedding.linear_1.weight", 1)
    if added <= TIME_IDS * features or features % 2:
        raise ValueError(
            f"config: expected addition_time_embed_dim to be even and below {added} / {TIME_IDS}, got {features}"
        )
    return sizes | dict(text_width=added - TIME_IDS * features, id_features=features)


def _check_supported(config: Mapping[str, Any]) -> None:
    faults = []
    for key, supported in _SUPPORTED.items():
        value = config.get(key, supported[0])
        if isinstance(value, list | tuple) and len(set(map(str, value))) == 1:  # one value for each level
            value = value[0]
        if value not in supported:
            faults.append(f"{key} {' or '.join(map(repr, supported))}, got {value!r}")
    for key, supported in _BLOCK_TYPES.items():
        odd = sorted(set(map(str, config.get(key) or ())) - set(supported))
        if odd:
            faults.append(f"{key} {' or '.join(supported)}, got {', '.join(odd)}")
    if faults:
        raise ValueError(f"config: expected {'; '.join(faults)}")


def _depth(arrays: Mapping[str, Any], block: str) -> int:
    """Blocks of each transformer of a level; 0 if it has none."""
    stem = f"{block}.attentions.0."
    return block_count(arrays, f"{stem}transformer_blocks") if any(name.startswith(stem) for name in arrays) else 0


def _each(key: str, value: Any, levels: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, list | tuple) else (value,) * levels
    if len(values) != levels or not all(type(each) is int and each >= 1 for each in values):
        raise ValueError(f"config: expected {key} to be one integer of at least 1 or {levels}, got {value!r}")
    return values


def _one(key: str, value: Any) -> int:
    values = set(value) if isinstance(value, list | tuple) else {value}
    found = next(iter(values), None)
    if len(values) != 1 or type(found) is not int or found < 1:
        raise ValueError(f"config: expected {key} to be an integer of at least 1, got {value!r}")
    return found


def _epsilon(value: Any) -> float:
    if type(value) not in (int, float) or not 0 < value < 1:
        raise ValueError(f"config: expected norm_eps to be a number between 0 and 1, got {value!r}")
    return value
