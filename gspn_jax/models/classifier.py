"""GSPN classifiers (GSPN, section 4.1): four stages of local and global propagation blocks.

The network follows the authors' released code: a convolutional stem, stages of blocks at strides 4, 8, 16 and 32, and a
linear head on the mean of the last map. Each block has a GSPN module between two projections, then an MLP.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from gspn_jax.mixers import MixerBuilder
from gspn_jax.models import layers
from gspn_jax.models.sizes import check_counts, check_positive
from pallas_kernels import named_layer
from pallas_kernels.checks import has_empty_axis

_STEM_STRIDES = {1: (1, 1), 2: (2, 1), 4: (2, 2)}
_ACTIVATIONS = {"none": lambda x: x, "silu": jax.nn.silu}


def is_global(index: int) -> bool:
    """Returns whether block `index` of a global stage propagates globally: the first 7 and every 7th after them do."""
    return index < 7 or (index + 1) % 7 == 0


class Block(nnx.Module):
    """Computes x + mixing(norm(x)), then x + MLP(norm(x)), on maps (B, H, W, features).

    The mixing branch projects to expansion * features channels, mixes and projects back.
    """

    def __init__(
        self,
        features: int,
        *,
        mixer: MixerBuilder,
        chunk: int | None,
        expansion: float,
        mlp_ratio: float,
        drop_path: float,
        activation: str,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        inner = round(expansion * features)
        project = functools.partial(nnx.Linear, use_bias=False, kernel_init=layers.NORMAL, dtype=dtype, rngs=rngs)
        self.norm = layers.layer_norm(features, dtype=dtype, rngs=rngs)
        self.widen = project(features, inner)
        self.depthwise = layers.DepthwiseConv(inner, 7, dtype=dtype, rngs=rngs)
        self.activation = activation
        self.mixer = mixer(inner, chunk=chunk, dtype=dtype, rngs=rngs)
        self.mixer_norm = layers.layer_norm(inner, dtype=dtype, rngs=rngs)
        self.response_norm = layers.GlobalResponseNorm(inner)
        self.narrow = project(inner, features)
        self.mlp_norm = layers.layer_norm(features, dtype=dtype, rngs=rngs)
        self.mlp = layers.MLP(features, round(mlp_ratio * features), dtype=dtype, rngs=rngs)
        self.drop_path = drop_path

    def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        first, second = (None, None) if key is None else jax.random.split(key)
        x = layers.residual(x, self._mix, self.drop_path, first)
        return layers.residual(x, lambda y: self.mlp(self.mlp_norm(y)), self.drop_path, second)

    def _mix(self, x: jax.Array) -> jax.Array:
        # (B, H, W, features) to (B, H, W, inner) and back
        x = layers.chained(self.norm, self.widen)(x)
        x = self.mixer(_ACTIVATIONS[self.activation](self.depthwise(x)))
        return layers.chained(self.mixer_norm, self.response_norm, self.narrow)(x)


class Stem(nnx.Module):
    """Maps images (B, H, W, 3) to (B, ceil(H / stride), ceil(W / stride), features) by two normed 3x3 convolutions."""

    def __init__(self, features: int, stride: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        first, second = _STEM_STRIDES[stride]
        self.dtype = dtype
        self.first = layers.conv3x3(3, features // 2, first, dtype=dtype, rngs=rngs)
        self.first_norm = layers.layer_norm(features // 2, dtype=dtype, rngs=rngs)
        self.second = layers.conv3x3(features // 2, features, second, dtype=dtype, rngs=rngs)
        self.second_norm = layers.layer_norm(features, dtype=dtype, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = self.first_norm(self.first(images.astype(self.dtype)))
        return self.second_norm(self.second(layers.gelu(x, approximate=False)))


class Downsample(nnx.Module):
    """Maps (B, H, W, inputs) to (B, ceil(H / 2), ceil(W / 2), outputs) by a 3x3 convolution of stride 2 and a norm."""

    def __init__(self, inputs: int, outputs: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.conv = layers.conv3x3(inputs, outputs, 2, dtype=dtype, rngs=rngs)
        self.norm = layers.layer_norm(outputs, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.norm(self.conv(x))


class Classifier(nnx.Module):
    """Maps normalised images (B, H, W, 3), H and W at least 1, to logits (B, num_classes) float32."""

    def __init__(
        self,
        num_classes: int,
        widths: Sequence[int],
        depths: Sequence[int],
        *,
        mixer: MixerBuilder,
        global_stages: Sequence[int] = (),
        chunk: int = 2,
        stem_stride: int = 4,
        expansion: float = 1.5,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        activation: str = "none",
        remat: bool = False,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Initialises the layers.

        Args:
            num_classes: outputs of the head.
            widths, depths: channels and number of blocks of each stage.
            mixer: called as mixer(channels, chunk=..., dtype=..., rngs=...) for each block; returns a module on maps.
            global_stages: stages, counted from 0, whose blocks for which `is_global` holds get chunk None.
            chunk: lines of a chunk in all other blocks.
            stem_stride: side of the image divided by the side of the first map: 4, 2 or 1.
            expansion: the mixer's channels divided by the block's.
            mlp_ratio: hidden channels of an MLP divided by the block's channels.
            drop_path: stochastic depth of the last block; it grows linearly from 0 at the first.
            activation: between depthwise convolution and mixer: "none", as in the released code, or "silu", as in the
                paper's figure.
            remat: recomputes each block in the backward pass instead of keeping its inner maps.
            dtype: dtype of the computation; parameters are float32.
            rngs: source of the initial parameters.

        Raises:
            ValueError: an argument out of range; the message names it.
        """
        check_counts(num_classes=num_classes, widths=tuple(widths), depths=tuple(depths), chunk=chunk)
        if len(widths) != len(depths) or not widths:
            raise ValueError(f"depths: expected one for each of {len(widths)} widths (at least 1), got {len(depths)}")
        check_positive(expansion=expansion, mlp_ratio=mlp_ratio)
        if round(min(widths) * expansion) < 1 or round(min(widths) * mlp_ratio) < 1:
            raise ValueError(
                f"expansion, mlp_ratio: expected at least one channel of {min(widths)}, got {expansion}, {mlp_ratio}"
            )
        if widths[0] < 2:
            raise ValueError(f"widths: expected at least 2 channels in the first stage, got {tuple(widths)}")
        if not set(global_stages) <= set(range(len(widths))):
            raise ValueError(f"global_stages: expected stages in 0..{len(widths) - 1}, got {tuple(global_stages)}")
        if stem_stride not in _STEM_STRIDES:
            raise ValueError(f"stem_stride: expected one of {', '.join(map(str, _STEM_STRIDES))}; got {stem_stride!r}")
        if activation not in _ACTIVATIONS:
            raise ValueError(f"activation: expected one of {', '.join(_ACTIVATIONS)}; got {activation!r}")
        if not 0 <= drop_path < 1:
            raise ValueError(f"drop_path: expected a probability in [0, 1), got {drop_path}")
        dtype = jnp.dtype(dtype)
        self.remat = remat
        self.stem = Stem(widths[0], stem_stride, dtype=dtype, rngs=rngs)
        block = functools.partial(
            Block, mixer=mixer, expansion=expansion, mlp_ratio=mlp_ratio, activation=activation, dtype=dtype, rngs=rngs
        )
        total = sum(depths)
        rates = iter([drop_path * i / max(total - 1, 1) for i in range(total)])
        self.stages = nnx.List()
        for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            chunks = [None if stage in global_stages and is_global(index) else chunk for index in range(depth)]
            self.stages.append(nnx.List([block(width, chunk=c, drop_path=next(rates)) for c in chunks]))
        self.downsamples = nnx.List(
            [Downsample(*pair, dtype=dtype, rngs=rngs) for pair in zip(widths[:-1], widths[1:], strict=True)]
        )
        self.norm = layers.layer_norm(widths[-1], dtype=dtype, rngs=rngs)
        self.head = nnx.Linear(widths[-1], num_classes, kernel_init=layers.NORMAL, rngs=rngs)

    def stage_maps(self, images: jax.Array, *, key: jax.Array | None = None) -> list[jax.Array]:
        """Returns the map at the end of each stage, finest first, for use as a backbone.

        Args:
            images: (B, H, W, 3), normalised.
            key: PRNG key of stochastic depth; None for inference.

        Returns:
            Maps (B, ceil(H / s), ceil(W / s), width) in the dtype of the computation; s is the stem's stride times 1,
            2, 4, 8.

        Raises:
            ValueError: another shape.
        """
        if images.ndim != 4 or images.shape[-1] != 3 or has_empty_axis(images.shape):
            raise ValueError(f"images: expected shape (B, H, W, 3), every axis at least 1, got {images.shape}")
        x, maps = self.stem(images), []
        for stage, blocks in enumerate(self.stages):
            if stage:
                x = self.downsamples[stage - 1](x)
            for index, block in enumerate(blocks):
                block_key = None if key is None else jax.random.fold_in(key, 1000 * stage + index)
                with named_layer(f"stages/{stage}/{index}"):
                    x = (jax.checkpoint(block) if self.remat else block)(x, block_key)
            maps.append(x)
        return maps

    def __call__(self, images: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        """Returns logits, (B, num_classes) float32.

        Args:
            images: (B, H, W, 3), normalised.
            key: PRNG key of stochastic depth in training; None for inference.

        Raises:
            ValueError: another shape.
        """
        return self.head(self.features(images, key=key))

    def features(self, images: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        """Returns the input of the head, (B, last width) float32: the mean of the last map, normed.

        Arguments and errors are those of a call.
        """
        x = self.norm(self.stage_maps(images, key=key)[-1])  # (B, h, w, last width)
        return jnp.mean(x.astype(self.head.param_dtype), axis=(1, 2))
