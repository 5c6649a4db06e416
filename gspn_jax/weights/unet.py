"""Parameters of the UNets of Stable Diffusion 1.5 and SDXL under the names of diffusers, with any mixer.

Files of replacements, as the authors of GSPN and LinFusion release them, name the parameters of mixer i `<i>.<name>`;
i counts the self-attentions in the order down, up, middle.
"""

import functools
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gspn_jax.mixers import MixerBuilder
from gspn_jax.models.cross_attention import Transformer
from gspn_jax.models.stack import stacked
from gspn_jax.models.unet import Stage, UNet, unet_mixer
from gspn_jax.weights.autoencoder import res_block_rows
from gspn_jax.weights.replacements import replacement_arrays, replacement_options, replacement_rows
from gspn_jax.weights.tensors import Tensors
from gspn_jax.weights.torch_layouts import (
    Joined,
    Row,
    conv_rows,
    fill,
    linear_rows,
    named_tensors,
    norm_rows,
)
from gspn_jax.weights.unet_config import diffusers_unet_sizes

INITIAL = ("teacher", "random")

_SELF_ATTENTION = re.compile(r".*\.attn1\.(to_[qkv]\.weight|to_out\.0\.(weight|bias))")
# Our path in a mixer, and what it takes over from self-attention.
_TEACHER = [
    (("qkv", "kernel"), ("to_q.weight", "to_k.weight", "to_v.weight")),
    (("query", "kernel"), ("to_q.weight",)),
    (("key", "kernel"), ("to_k.weight",)),
    (("value", "kernel"), ("to_v.weight",)),
    (("out", "kernel"), ("to_out.0.weight",)),
    (("out", "bias"), ("to_out.0.bias",)),
]


def diffusers_unet(
    arrays: Mapping[str, Any],
    config: Mapping[str, Any],
    *,
    mixer: str | MixerBuilder = "attention",
    replacements: Mapping[str, Any] | None = None,
    alignment: str | None = None,
    chunk: int | None = 4,
    dtype: jnp.dtype = jnp.float32,
    mixer_options: Mapping[str, Any] | None = None,
    initial: str = "teacher",
    seed: int = 0,
    remat: bool = False,
) -> UNet:
    """Loads a UNet, as published or with another mixer in place of its self-attention ("attn1").

    Tensors are read from the mappings and converted one after another: mappings that read a file when they are asked
    need little memory.

    Without `replacements`, mixers are new and their parameters random, but for those that they take over from the
    self-attention, their teacher (initial="teacher", "w/ init" in GSPN's paper): the layers query, key, value and out,
    where a mixer has one of the teacher's shape. By the paper's correspondence with linear attention, lam follows the
    keys, gate the queries, and the scanned map the values. "linfusion" and, with query_key_value=True, "gspn" take over
    all four; "gspn" without takes over out; the Mambas take over nothing. LinFusion starts close to the teacher: it is
    the same average of values with other weights. GSPN starts far from it: its logits, lam, gate, skip and merge, which
    attention lacks, are random. On the small UNet of the tests, the mixers' outputs are off by 0.18 of the teacher's
    norm with LinFusion (1.21 without these initial values) and by 1.03 with GSPN (1.26).

    Args:
        arrays: diffusers' parameter names to arrays, of unet/diffusion_pytorch_model.safetensors.
        config: the mapping of unet/config.json. What it lacks is read off the tensors, or has diffusers' default.
        mixer: "attention" (as published), "gspn", "linfusion", "mamba" or "mamba2", or a callable for new mixers, see
            `gspn_jax.models.unet.unet_mixer`.
        replacements: released or exported parameters of the mixers, `<i>.<name>` to arrays; None: new ones. The
            self-attention in `arrays` is then not used and may be missing.
        alignment: of GSPN, "aligned" or "unturned"; None takes "unturned" for `replacements`, else "aligned".
        chunk: lines after which GSPN's scans restart; None: never.
        dtype: of the computation and the parameters.
        mixer_options: further options of the mixer.
        initial: of new mixers: "teacher" or "random".
        seed: of the random parameters of new mixers.
        remat: recomputes each block in the backward pass instead of keeping its inner maps.

    Returns:
        the network; it takes latents (B, H, W, 4), timestep (B,), context (B, T, D), and in SDXL text_embeds and
        time_ids.

    Raises:
        ValueError: names the keys of `config` that ask for what the network lacks, or all parameters that are missing,
            are left over, do not fit, or hold NaN or Inf.
    """
    if initial not in INITIAL:
        raise ValueError(f"initial: expected one of {', '.join(INITIAL)}; got {initial!r}")
    if replacements is not None and (mixer == "attention" or not isinstance(mixer, str)):
        raise ValueError(f"replacements: expected none for the mixer {mixer}, got {len(replacements)}")
    if alignment is not None and mixer != "gspn":
        raise ValueError(f"alignment: expected None for the mixer {mixer}, got {alignment!r}")
    options = dict(mixer_options or {})
    if mixer == "gspn":
        options["alignment"] = alignment or ("aligned" if replacements is None else "unturned")
    tensors, released = Tensors(arrays), Tensors(replacements or {})
    sizes = diffusers_unet_sizes(config, tensors)
    of_width: dict[int, dict[str, Any]] = {}
    if replacements is not None:
        of_width = _released_options(str(mixer), released, options, sizes)

    def build(features: int, **given: Any) -> nnx.Module:
        return unet_mixer(mixer, of_width.get(features, options))(features, **given)

    given: dict[str, Any] = dict(chunk=chunk, dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(dtype))
    unet = nnx.eval_shape(lambda: UNet(**sizes, **given, mixer=build, remat=remat, rngs=nnx.Rngs(0)))
    mixer_rows: list[Row] = []
    for place in _places(unet):
        if replacements is not None:
            read = of_width[place.transformer.features]
            mixer_rows += replacement_rows(str(mixer), place.mixer, place.numbers, read)
        elif initial == "teacher" or mixer == "attention":
            mixer_rows += _teacher_rows(place)
    unused = {name for name in tensors if _SELF_ATTENTION.fullmatch(name)} - set(named_tensors(mixer_rows))
    tensors = Tensors(tensors, released, leave_out=unused)
    unet = fill(unet, [*_rows(unet), *mixer_rows], tensors, kind="UNet2DConditionModel")
    rngs = nnx.Rngs(seed)
    for transformer in unet.transformers:
        _draw_missing(transformer, build, rngs, **given)
    return unet


def unet_replacements(unet: UNet) -> dict[str, np.ndarray]:
    """The parameters of all mixers as a file of replacements names and shapes them; `diffusers_unet` loads them.

    Raises:
        ValueError: the mixers are no "gspn", "linfusion", "mamba" or "mamba2", or have parameters without such a name.
    """
    state = dict(nnx.to_flat_state(nnx.state(unet, nnx.Param)))
    arrays = {}
    for place in _places(unet):
        arrays |= replacement_arrays(state, place.mixer, place.numbers)
    return dict(sorted(arrays.items(), key=lambda item: int(item[0].partition(".")[0])))


class Place(NamedTuple):
    """Where a transformer is.

    Attributes:
        path: ours.
        name: theirs.
        first: number of its first block among the blocks of all transformers.
        transformer: itself.
    """

    path: tuple
    name: str
    first: int
    transformer: Transformer

    @property
    def mixer(self) -> tuple:
        """Our path of its mixers."""
        return (*self.path, "blocks", "mixer")

    @property
    def numbers(self) -> list[str]:
        """What precedes the names of its mixers in a file of replacements."""
        return [f"{self.first + index}." for index in range(self.transformer.depth)]

    @property
    def blocks(self) -> list[str]:
        """Their names of its blocks."""
        return [f"{self.name}.transformer_blocks.{index}" for index in range(self.transformer.depth)]


def _stages(unet: UNet) -> Iterator[tuple[tuple, str, str, Stage]]:
    """Our path of each stage, their names of its residual block and transformer, and the stage itself."""
    for way in ("down", "up"):
        for n, level in enumerate(getattr(unet, way)):
            for index, stage in enumerate(level.stages):
                theirs = f"{way}_blocks.{n}"
                yield (way, n, "stages", index), f"{theirs}.resnets.{index}", f"{theirs}.attentions.{index}", stage
    yield ("middle",), "mid_block.resnets.0", "mid_block.attentions.0", unet.middle


def _places(unet: UNet) -> Iterator[Place]:
    """All transformers, in the order down, up, middle."""
    first = 0
    for path, _, name, stage in _stages(unet):
        if stage.transformer is not None:
            yield Place((*path, "transformer"), name, first, stage.transformer)
            first += stage.transformer.depth


def _rows(unet: UNet) -> Iterator[Row]:
    """The rows of all parameters but the mixers'."""
    yield from conv_rows(("start",), "conv_in")
    for ours, theirs in (("time", "time_embedding"), *([] if unet.added is None else [("added", "add_embedding")])):
        yield from linear_rows((ours, "first"), f"{theirs}.linear_1")
        yield from linear_rows((ours, "second"), f"{theirs}.linear_2")
    blocks = [((*path, "block"), name, stage.block) for path, name, _, stage in _stages(unet)]
    for path, name, block in (*blocks, (("middle_block",), "mid_block.resnets.1", unet.middle_block)):
        yield from res_block_rows(path, name, has_shortcut=block.shortcut is not None)
        yield from linear_rows((*path, "condition"), f"{name}.time_emb_proj")
    for way in ("down", "up"):
        for n, level in enumerate(getattr(unet, way)):
            if level.resample is not None:
                yield from conv_rows((way, n, "resample"), f"{way}_blocks.{n}.{way}samplers.0.conv")
    for place in _places(unet):
        yield from _transformer_rows(place)
    yield from norm_rows(("norm",), "conv_norm_out")
    yield from conv_rows(("end",), "conv_out")


def _transformer_rows(place: Place) -> Iterator[Row]:
    def theirs(name: str) -> list[str]:
        return [f"{block}.{name}" for block in place.blocks]

    path = place.path
    yield from norm_rows((*path, "norm"), f"{place.name}.norm")
    yield from linear_rows((*path, "project_in"), f"{place.name}.proj_in")
    yield from linear_rows((*path, "project_out"), f"{place.name}.proj_out")
    for number, norm in enumerate(("norm", "cross_norm", "mlp_norm"), start=1):
        yield from norm_rows((*path, "blocks", norm), theirs(f"norm{number}"))
    attention = (*path, "blocks", "cross_attention")
    for ours, name in (("query", "to_q"), ("key", "to_k"), ("value", "to_v")):
        yield from linear_rows((*attention, ours), theirs(f"attn2.{name}"), use_bias=False)
    yield from linear_rows((*attention, "out"), theirs("attn2.to_out.0"))
    yield from linear_rows((*path, "blocks", "mlp", "widen"), theirs("ff.net.0.proj"))
    yield from linear_rows((*path, "blocks", "mlp", "narrow"), theirs("ff.net.2"))


def _teacher_rows(place: Place) -> Iterator[Row]:
    """The rows of what the mixers of a transformer take over from its self-attention."""
    depth, features = place.transformer.depth, place.transformer.features
    state = dict(nnx.to_flat_state(nnx.state(place.transformer.blocks.mixer)))
    for path, names in _TEACHER:
        is_bias = path[-1] == "bias"
        shape = (depth, features) if is_bias else (depth, features, len(names) * features)
        if path in state and state[path].shape == shape:
            tensors = [Joined(f"{block}.attn1.{name}" for name in names) for block in place.blocks]
            yield (*place.mixer, *path), tensors, "vector" if is_bias else "linear"


def _released_options(
    mixer: str, released: Mapping[str, Any], options: Mapping[str, Any], sizes: Mapping[str, Any]
) -> dict[int, dict[str, Any]]:
    """The mixers' options by width: as read off the first replacement of that width, and `options`."""
    levels, blocks = list(zip(sizes["widths"], sizes["depths"], strict=True)), sizes["blocks"]
    widths = [width for width, depth in levels for _ in range(blocks * depth)]
    widths += [width for width, depth in reversed(levels) for _ in range((blocks + 1) * depth)]
    widths += [sizes["widths"][-1]] * sizes["middle_depth"]
    groups = options.get("groups", 1)
    return {
        width: {**replacement_options(mixer, released, f"{widths.index(width)}.", groups=groups), **options}
        for width in dict.fromkeys(widths)
    }


def _draw_missing(transformer: Transformer, build: MixerBuilder, rngs: nnx.Rngs, **given: Any) -> None:
    """Draws those parameters of new mixers that nothing was read for; none where only shapes were read."""
    mixer = transformer.blocks.mixer
    state = dict(nnx.to_flat_state(nnx.state(mixer)))
    missing = [path for path, variable in state.items() if _is_abstract(variable)]
    if not missing or _is_abstract(transformer.norm.scale):
        return
    heads = transformer.blocks.cross_attention.num_heads
    one = functools.partial(build, transformer.features, num_heads=heads, **given)
    drawn = dict(nnx.to_flat_state(nnx.state(stacked(one, transformer.depth, rngs))))
    nnx.update(mixer, nnx.from_flat_state({**state, **{path: drawn[path] for path in missing}}))


def _is_abstract(variable: Any) -> bool:
    return isinstance(variable.get_value(), jax.ShapeDtypeStruct)
