"""The UNet of Stable Diffusion 1.5 and SDXL (arXiv 2112.10752, 2307.01952): a denoiser of latents that reads a text.

Levels of residual blocks go down to coarse maps and up again; each block on the way up also reads the output of the
mirrored block on the way down (a long skip). In most levels, a transformer follows every block: see `cross_attention`.
Any mixer of `gspn_jax.mixers` takes the place of its self-attention.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from gspn_jax.mixers import MixerBuilder, mixer_builder, mixer_options
from gspn_jax.models.conditioning import timestep_features
from gspn_jax.models.convolutional import ResBlock, conv, doubled, group_norm
from gspn_jax.models.cross_attention import Transformer
from gspn_jax.models.sizes import check_counts
from pallas_kernels import named_layer
from pallas_kernels.checks import has_empty_axis

TIME_IDS = 6  # original height and width, top and left of the crop, target height and width

# Options of `UNet` for the published networks: 859,520,964 and 2,567,463,684 parameters with softmax attention.
UNET_SIZES: dict[str, dict[str, Any]] = {
    "sd15": dict(widths=(320, 640, 1280, 1280), depths=(1, 1, 1, 0), num_heads=8, context_width=768),
    "sdxl": dict(
        widths=(320, 640, 1280),
        depths=(0, 2, 10),
        middle_depth=10,
        num_heads=(5, 10, 20),
        context_width=2048,
        text_width=1280,
        id_features=256,
    ),
}


def unet_mixer(mixer: str | MixerBuilder, options: Mapping[str, Any] | None = None) -> MixerBuilder:
    """Returns the builder of a mixer with a UNet's defaults, which depend on its channels C.

    Attention has no bias but on its last layer. GSPN ends with such a layer too; its proxy has C / 8 channels, or
    C / 32 with `query_key_value`, as in the authors' text-to-image networks.

    Args:
        mixer: a name in `gspn_jax.mixers.MIXERS`, or a callable that builds a mixer.
        options: of the mixer; they replace the defaults.

    Raises:
        ValueError: an unknown name, or an option that the mixer does not take.
    """
    options = dict(options or {})
    known, takes_any = mixer_options(mixer)
    unknown = [] if takes_any else sorted(set(options) - known)
    if unknown:
        raise ValueError(f"{unknown[0]}: expected an option of the mixer {mixer} ({', '.join(sorted(known))})")

    def build(features: int, **given: Any) -> nnx.Module:
        proxy_rank = max(features // (32 if options.get("query_key_value") else 8), 1)
        defaults: dict[Any, dict[str, Any]] = {
            "attention": {"out_bias": True},
            "gspn": {"out_projection": True, "proxy_rank": proxy_rank},
        }
        return mixer_builder(mixer, {**defaults.get(mixer, {}), **options})(features, **given)

    return build


class Embedding(nnx.Module):
    """Linear, SiLU, linear: (B, inputs) to (B, outputs)."""

    def __init__(self, inputs: int, outputs: int, **options: Any):
        self.first = nnx.Linear(inputs, outputs, **options)
        self.second = nnx.Linear(outputs, outputs, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.second(jax.nn.silu(self.first(x)))


class Stage(nnx.Module):
    """A residual block and, where depth is not 0, a transformer."""

    def __init__(self, inputs: int, width: int, depth: int, block: Mapping[str, Any], transformer: Mapping[str, Any]):
        self.remat = transformer["remat"]
        self.block = ResBlock(inputs, width, **block)
        self.transformer = Transformer(width, depth, **transformer) if depth else None

    def __call__(
        self, x: jax.Array, condition: jax.Array, context: jax.Array, *, keep_mixed: bool
    ) -> tuple[jax.Array, list[jax.Array | None]]:
        """Returns the map and the mixers' outputs as `Transformer` does, the latter in a list, empty without one."""
        x = (jax.checkpoint(self.block) if self.remat else self.block)(x, condition)
        if self.transformer is None:
            return x, []
        x, mixed = self.transformer(x, context, keep_mixed=keep_mixed)
        return x, [mixed]


class Level(nnx.Module):
    """Stages on maps of one size and, but for the last level of a way, the convolution that leads to the next size."""

    def __init__(self, stages: Sequence[Stage], resample: nnx.Conv | None):
        self.stages = nnx.List(stages)
        self.resample = resample


class UNet(nnx.Module):
    """Predicts noise (or the velocity, as trained) from noisy latents, timestep and text. Latents may have any size.

    Attributes:
        down, up: levels, in order of execution.
        middle: the stage between them, and the residual block after it.
    """

    def __init__(
        self,
        widths: Sequence[int],
        depths: Sequence[int],
        *,
        mixer: MixerBuilder,
        num_heads: int | Sequence[int],
        context_width: int,
        middle_depth: int = 1,
        blocks: int = 2,
        text_width: int | None = None,
        id_features: int | None = None,
        in_channels: int = 4,
        out_channels: int = 4,
        norm_groups: int = 32,
        epsilon: float = 1e-5,
        chunk: int | None = 4,
        remat: bool = False,
        dtype: jnp.dtype = jnp.float32,
        param_dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Initialises the layers.

        Args:
            widths: channels of each level, finest first.
            depths: blocks of each transformer of a level, finest first; 0: the level has none.
            mixer: of the transformers, see `unet_mixer`; called as mixer(width, chunk=..., num_heads=..., dtype=...,
                param_dtype=..., rngs=...).
            num_heads: of the attention, for all levels or for each; the middle has those of the last.
            context_width: D, the channels of the text.
            middle_depth: blocks of the middle's transformer.
            blocks: residual blocks of a level on the way down; on the way up there is one more.
            text_width: channels of the pooled text; None: the network takes neither it nor time ids.
            id_features: features of each time id, even; given if and only if `text_width` is.
            in_channels, out_channels: of the latents and of the prediction.
            norm_groups: groups of the group norms, a divisor of every width.
            epsilon: of the residual blocks' norms; the transformers' is 1e-6.
            chunk: lines after which the mixers' scans restart; None: never.
            remat: recomputes each block in the backward pass instead of keeping its inner maps.
            dtype: dtype of the computation. Norm statistics, softmax and timestep features are at least float32.
            param_dtype: dtype of the parameters.
            rngs: source of the initial parameters.

        Raises:
            ValueError: an argument out of range; the message names it.
        """
        check_counts(
            widths=widths, context_width=context_width, middle_depth=middle_depth, blocks=blocks, chunk=chunk,
            text_width=text_width, id_features=id_features, in_channels=in_channels, out_channels=out_channels,
            norm_groups=norm_groups, num_heads=num_heads,
        )  # fmt: skip
        levels = len(widths)
        heads = (num_heads,) * levels if isinstance(num_heads, int) else tuple(num_heads)
        if not levels or len(depths) != levels or min(depths) < 0:
            raise ValueError(f"depths: expected {levels} numbers of at least 0, one for each width, got {depths}")
        if len(heads) != levels:
            raise ValueError(f"num_heads: expected one number or {levels}, got {num_heads}")
        if any(width % norm_groups for width in widths) or widths[0] % 2:
            raise ValueError(f"norm_groups: expected a divisor of the widths {tuple(widths)}, got {norm_groups}")
        if (text_width is None) != (id_features is None) or (id_features or 0) % 2:
            raise ValueError(f"id_features: expected an even number with text_width, None without, got {id_features}")
        self.in_channels, self.context_width = in_channels, context_width
        self.text_width, self.id_features, self.frequencies = text_width, id_features, widths[0] // 2
        self.dtype = dtype = jnp.dtype(dtype)
        self.wide_dtype = jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)

        plain: Any = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        embedded = 4 * widths[0]
        block: Any = dict(condition_width=embedded, norm_groups=norm_groups, epsilon=epsilon, **plain)
        shared = dict(mixer=mixer, context_width=context_width, chunk=chunk, norm_groups=norm_groups, remat=remat)

        def stage(inputs: int, level: int, depth: int) -> Stage:
            return Stage(inputs, widths[level], depth, block, {**shared, **plain, "num_heads": heads[level]})

        self.time = Embedding(widths[0], embedded, **plain)
        added = None if text_width is None or id_features is None else text_width + TIME_IDS * id_features
        self.added = None if added is None else Embedding(added, embedded, **plain)
        self.start = conv(in_channels, widths[0], 3, **plain)
        self.down, self.up = nnx.List([]), nnx.List([])
        width, skips = widths[0], [widths[0]]
        for level in range(levels):
            stages = []
            for _ in range(blocks):
                stages.append(stage(width, level, depths[level]))
                width = widths[level]
                skips.append(width)
            is_last = level == levels - 1
            self.down.append(Level(stages, None if is_last else conv(width, width, 3, stride=2, **plain)))
            skips += [] if is_last else [width]
        self.middle = stage(width, levels - 1, middle_depth)
        self.middle_block = ResBlock(width, width, **block)
        for level in reversed(range(levels)):
            stages = []
            for _ in range(blocks + 1):
                stages.append(stage(width + skips.pop(), level, depths[level]))
                width = widths[level]
            self.up.append(Level(stages, None if level == 0 else conv(width, width, 3, **plain)))
        self.norm = group_norm(width, norm_groups, epsilon=epsilon, **plain)
        self.end = conv(width, out_channels, 3, **plain)

    @property
    def transformers(self) -> list[Transformer]:
        """All transformers in the order in which files of replacements count: down, up, middle."""
        stages = [stage for way in (self.down, self.up) for level in way for stage in level.stages]
        return [stage.transformer for stage in [*stages, self.middle] if stage.transformer is not None]

    def __call__(
        self,
        latents: jax.Array,
        timestep: jax.Array,
        context: jax.Array,
        text_embeds: jax.Array | None = None,
        time_ids: jax.Array | None = None,
        *,
        keep_mixed: bool = False,
    ) -> Any:
        """Returns (B, H, W, out_channels) float32 (float64 if `dtype` is float64).

        Args:
            latents: (B, H, W, in_channels), any float dtype, H and W at least 1.
            timestep: (B,) integers or floats, 0 to 999.
            context: the text's embeddings, (B, T, D).
            text_embeds: the pooled text, (B, text_width); None if and only if the network takes none.
            time_ids: (B, 6) in pixels: original height and width, top and left of the crop, target height and width;
                None with `text_embeds`.
            keep_mixed: also returns the mixers' outputs, before they are added to the map: a list in the order of
                `transformers`, (depth, B, H, W, C) each.

        Raises:
            ValueError: another shape; the message names the argument.
        """
        self._check(latents, timestep, context, text_embeds, time_ids)
        condition = jax.nn.silu(self._embedding(timestep, text_embeds, time_ids))
        context = context.astype(self.dtype)
        down, up = [], []  # the mixers' outputs

        def run(stage: Stage, name: str, x: jax.Array, mixed: list) -> jax.Array:
            with named_layer(name):
                x, found = stage(x, condition, context, keep_mixed=keep_mixed)
            mixed += found
            return x

        x = self.start(latents.astype(self.dtype))
        skips = [x]
        for n, level in enumerate(self.down):
            for index, stage in enumerate(level.stages):
                x = run(stage, f"down/{n}/{index}", x, down)
                skips.append(x)
            if level.resample is not None:
                x = level.resample(x)
                skips.append(x)
        middle = []
        x = self.middle_block(run(self.middle, "middle", x, middle), condition)
        for n, level in enumerate(self.up):
            for index, stage in enumerate(level.stages):
                x = run(stage, f"up/{n}/{index}", jnp.concatenate([x, skips.pop()], axis=-1), up)
            if level.resample is not None:
                _, height, width, _ = skips[-1].shape  # a map of odd size was halved to the next larger whole number
                x = level.resample(doubled(x)[:, :height, :width])
        x = self.end(jax.nn.silu(self.norm(x))).astype(self.wide_dtype)
        return (x, [*down, *up, *middle]) if keep_mixed else x

    def _embedding(self, timestep: jax.Array, text_embeds: jax.Array | None, time_ids: jax.Array | None) -> jax.Array:
        """Returns the embedding of timestep and, in SDXL, of pooled text and time ids, (B, 4 widths[0])."""
        dtype = self.wide_dtype
        embedding = self.time(timestep_features(timestep, self.frequencies, dtype=dtype))
        if self.added is None or text_embeds is None or time_ids is None or self.id_features is None:
            return embedding
        ids = timestep_features(time_ids.reshape(-1), self.id_features // 2, dtype=dtype)
        rows = jnp.concatenate([text_embeds.astype(dtype), ids.reshape(len(timestep), -1)], axis=-1)
        return embedding + self.added(rows)

    def _check(
        self,
        latents: jax.Array,
        timestep: jax.Array,
        context: jax.Array,
        text_embeds: jax.Array | None,
        time_ids: jax.Array | None,
    ) -> None:
        shape, batch = latents.shape, latents.shape[:1]
        if len(shape) != 4 or shape[-1] != self.in_channels or has_empty_axis(shape):
            raise ValueError(f"latents: expected shape (B, H, W, {self.in_channels}), got {shape}")
        if timestep.shape != batch:
            raise ValueError(f"timestep: expected shape {batch}, as latents have rows, got {timestep.shape}")
        if context.ndim != 3 or context.shape[::2] != (*batch, self.context_width) or has_empty_axis(context.shape):
            raise ValueError(f"context: expected shape ({batch[0]}, T, {self.context_width}), got {context.shape}")
        for name, array, width in (("text_embeds", text_embeds, self.text_width), ("time_ids", time_ids, TIME_IDS)):
            expected = None if self.text_width is None else (*batch, width)
            got = None if array is None else array.shape
            if got != expected:
                what = "none, since the network takes none" if expected is None else f"shape {expected}"
                raise ValueError(f"{name}: expected {what}, got {got}")
