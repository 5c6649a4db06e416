"""Checkpoints of SD-1.5 and SDXL in one file: their names to those of the published folders.

The UNet and the autoencoder have the names of the LDM program (arXiv 2112.10752), SDXL's second text tower those of
OpenCLIP. LDM counts the UNet's blocks through; folders count levels, and blocks within a level.
"""

import functools
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import numpy as np

from gspn_jax.weights.renamed import Renamed

# Name in the file, name in the folder; what makes the folder's array of the file's, where they differ.
Place = tuple[str, str, Callable[[Any], np.ndarray] | None]

UNET_START = "model.diffusion_model."
# What names in the file start with; the part that they belong to.
_PARTS = {
    UNET_START: "unet",
    "first_stage_model.": "vae",
    "cond_stage_model.transformer.": "text_encoder",
    "conditioner.embedders.0.transformer.": "text_encoder",
    "conditioner.embedders.1.model.": "text_encoder_2",
}
_NEEDED = ("unet", "vae", "text_encoder")

# Moving averages of the UNet; the noise schedule; positions and CLIP's temperature, which these networks do not use.
_IGNORED = re.compile(
    r"model_ema\..+|betas|(\w+_)?alphas_cumprod(_prev)?|posterior_\w+|lvlb_weights|logvar|scale_factor|denoiser\.\w+"
    r"|.+\.position_ids|.+\.logit_scale"
)

_UNET_ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_UNET_BLOCK = re.compile(r"(?:(input|output)_blocks\.(\d+)|middle_block)\.(\d)\.(.+)")
_UNET_HALVING = re.compile(r"input_blocks\.(\d+)\.0\.op\.weight")
_UNET_SAMPLERS = {"op": "downsamplers.0.conv", "conv": "upsamplers.0.conv"}
_UNET_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_UNET_TRANSFORMER = re.compile(r"norm|proj_in|proj_out|transformer_blocks\.\d+\..+")

_VAE_ENDS = {
    "encoder.conv_in": "encoder.conv_in",
    "encoder.norm_out": "encoder.conv_norm_out",
    "encoder.conv_out": "encoder.conv_out",
    "quant_conv": "quant_conv",
    "post_quant_conv": "post_quant_conv",
    "decoder.conv_in": "decoder.conv_in",
    "decoder.norm_out": "decoder.conv_norm_out",
    "decoder.conv_out": "decoder.conv_out",
}
_VAE_LEVEL = re.compile(r"(encoder\.down|decoder\.up)\.(\d+)\.(?:block\.(\d+)|(?:down|up)sample)\.(\w+)")
_VAE_MIDDLE = re.compile(r"(encoder|decoder)\.mid\.(block_1|attn_1|block_2)\.(\w+)")
_VAE_RESNET = {
    "norm1": "norm1",
    "conv1": "conv1",
    "norm2": "norm2",
    "conv2": "conv2",
    "nin_shortcut": "conv_shortcut",
}
_VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_VAE_MIDDLE_BLOCKS = {
    "block_1": ("resnets.0", _VAE_RESNET),
    "attn_1": ("attentions.0", _VAE_ATTENTION),
    "block_2": ("resnets.1", _VAE_RESNET),
}

_CLIP = re.compile(r"(text_model\.)?(embeddings|encoder|final_layer_norm)\..+")
_OPEN_CLIP_ENDS = {
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
}
_OPEN_CLIP_BLOCK = re.compile(r"transformer\.resblocks\.(\d+)\.(.+)[._](weight|bias)")
_OPEN_CLIP_LAYERS = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def split_single_file(arrays: Mapping[str, Any]) -> dict[str, Renamed]:
    """Splits a checkpoint into what the files of a folder hold. Arrays are read when they are asked for.

    Args:
        arrays: names in the file to arrays. Moving averages ("model_ema.") and the noise schedule are not used.

    Returns:
        "unet", "vae", "text_encoder" and, of SDXL, "text_encoder_2": names in the published folder to arrays.

    Raises:
        ValueError: tells which parts are missing, and names what belongs to none. On reading an array: names the
            tensor that is no stack of query, key and value.
    """
    parts: dict[str, dict[str, str]] = {part: {} for part in _PARTS.values()}
    unknown = []
    for whole in arrays:
        prefix = next(filter(whole.startswith, _PARTS), None)
        if _IGNORED.fullmatch(whole):
            continue
        if prefix is None:
            unknown.append(whole)
        else:
            parts[_PARTS[prefix]][whole.removeprefix(prefix)] = whole
    found = {}
    for part, names in parts.items():
        places = list(_PLACES[part](names))
        unknown += [names[name] for name in names.keys() - {name for name, _, _ in places}]
        found[part] = Renamed(
            arrays,
            {new: names[name] for name, new, _ in places},
            {new: change for _, new, change in places if change is not None},
        )
    faults = [
        f"none that start with {' or '.join(prefix for prefix in _PARTS if _PARTS[prefix] == part)}"
        for part in _NEEDED
        if not parts[part]
    ]
    if unknown:
        faults.append(f"{len(unknown)} of other networks: {', '.join(sorted(unknown)[:5])}")
    if faults:
        raise ValueError(f"arrays: expected the names of SD-1.5 or SDXL in one file, got {'; '.join(faults)}")
    return {part: renamed for part, renamed in found.items() if renamed}


def _unet(names: Collection[str]) -> Iterator[Place]:
    # Blocks of a level in LDM's count: its residual blocks, and the convolution that halves the resolution.
    per_level = min((int(match[1]) for match in map(_UNET_HALVING.fullmatch, names) if match), default=len(names))
    for name in names:
        stem, _, leaf = name.rpartition(".")
        place = _UNET_ENDS.get(stem) or _unet_place(stem, per_level)
        if place:
            yield name, f"{place}.{leaf}", None


def _unet_place(stem: str, per_level: int) -> str | None:
    match = _UNET_BLOCK.fullmatch(stem)
    if match is None:
        return None
    side, index, place, layer = match.groups()
    if side is None:  # residual block, transformer, residual block
        block, slot = "mid_block", int(place) // 2
    else:
        level, slot = divmod(int(index) - (side == "input"), per_level)
        block = f"{'down' if side == 'input' else 'up'}_blocks.{level}"
    if layer in _UNET_SAMPLERS:
        return f"{block}.{_UNET_SAMPLERS[layer]}"
    if layer in _UNET_RESNET:
        return f"{block}.resnets.{slot}.{_UNET_RESNET[layer]}"
    return f"{block}.attentions.{slot}.{layer}" if _UNET_TRANSFORMER.fullmatch(layer) else None


def _vae(names: Collection[str]) -> Iterator[Place]:
    levels = len({match[2] for match in map(_VAE_LEVEL.match, names) if match})
    for name in names:
        stem, _, leaf = name.rpartition(".")
        place = _VAE_ENDS.get(stem) or _vae_place(stem, levels)
        if place:
            is_pointwise = ".to_" in place and leaf == "weight"
            yield name, f"{place}.{leaf}", _matrix if is_pointwise else None


def _vae_place(stem: str, levels: int) -> str | None:
    if match := _VAE_MIDDLE.fullmatch(stem):
        half, block, layer = match.groups()
        block, layers = _VAE_MIDDLE_BLOCKS[block]
        return f"{half}.mid_block.{block}.{layers[layer]}" if layer in layers else None
    match = _VAE_LEVEL.fullmatch(stem)
    if match is None:
        return None
    side, level, block, layer = match.groups()
    if side == "decoder.up":  # LDM counts the decoder's levels from the full resolution, too
        level = levels - 1 - int(level)
    if block is None:
        return f"{side}_blocks.{level}.{side.rpartition('.')[2]}samplers.0.{layer}" if layer == "conv" else None
    return f"{side}_blocks.{level}.resnets.{block}.{_VAE_RESNET[layer]}" if layer in _VAE_RESNET else None


def _clip(names: Collection[str]) -> Iterator[Place]:
    return ((name, name, None) for name in names if _CLIP.fullmatch(name))


def _open_clip(names: Collection[str]) -> Iterator[Place]:
    for name in names:
        match = _OPEN_CLIP_BLOCK.fullmatch(name)
        if name in _OPEN_CLIP_ENDS:
            yield name, _OPEN_CLIP_ENDS[name], None
        elif name == "text_projection":  # applied as x @ text_projection
            yield name, "text_projection.weight", np.transpose
        elif match:
            index, layer, leaf = match.groups()
            block = f"text_model.encoder.layers.{index}"
            if layer in _OPEN_CLIP_LAYERS:
                yield name, f"{block}.{_OPEN_CLIP_LAYERS[layer]}.{leaf}", None
            elif layer == "attn.in_proj":
                for third, letter in enumerate("qkv"):
                    yield name, f"{block}.self_attn.{letter}_proj.{leaf}", functools.partial(_third, name, third)


_PLACES = {"unet": _unet, "vae": _vae, "text_encoder": _clip, "text_encoder_2": _open_clip}


def _matrix(array: Any) -> np.ndarray:
    """A 1x1 convolution (out, in, 1, 1) as (out, in)."""
    return np.reshape(array, np.shape(array)[:2])


def _third(name: str, index: int, array: Any) -> np.ndarray:
    """One of three parts of the rows."""
    array = np.asarray(array)
    if not array.ndim or len(array) % 3:
        raise ValueError(f"arrays: expected rows of query, key and value in {name}, got shape {array.shape}")
    return np.split(array, 3)[index]
