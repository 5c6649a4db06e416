"""The autoencoder of latent diffusion (arXiv 2112.10752; "AutoencoderKL"): images to latents of 1/8 of their side.

Maps are channels-last. A level is a sequence of residual blocks; all levels but the innermost then change the
resolution by a factor of two.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from gspn_jax.models.convolutional import ResBlock, conv, doubled, group_norm

# Stable Diffusion's autoencoder: latents times LATENT_SCALE have about unit variance, and networks denoise those.
# An image's side is LATENT_FACTOR times the latents' side.
LATENT_SCALE = 0.18215
LATENT_FACTOR = 8
_LOG_VARIANCES = -30.0, 20.0  # bounds of the predicted log variances


class AttentionBlock(nnx.Module):
    """Residual block of softmax attention with one head over all pixels of a map."""

    def __init__(self, features: int, *, norm_groups: int, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.norm = group_norm(features, norm_groups, dtype=dtype, rngs=rngs)
        self.query, self.key, self.value, self.out = (
            nnx.Linear(features, features, dtype=dtype, rngs=rngs) for _ in range(4)
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        batch, height, width, features = x.shape
        rows = self.norm(x).reshape(batch, height * width, 1, features)  # (B, H W, one head, C)
        mixed = jax.nn.dot_product_attention(self.query(rows), self.key(rows), self.value(rows))
        return x + self.out(mixed).reshape(x.shape)


class Middle(nnx.Module):
    """Residual block, attention, residual block."""

    def __init__(self, features: int, **options: Any):
        self.first = ResBlock(features, features, **options)
        self.attention = AttentionBlock(features, **options)
        self.second = ResBlock(features, features, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.second(self.attention(self.first(x)))


class Level(nnx.Module):
    """Residual blocks, then a convolution that halves ("down") or doubles ("up") the resolution, or None."""

    def __init__(self, inputs: int, outputs: int, count: int, resample: str | None, **options: Any):
        widths = [inputs, *[outputs] * count]
        self.blocks = nnx.List([ResBlock(*pair, **options) for pair in zip(widths, widths[1:], strict=False)])
        del options["norm_groups"]
        self.is_down = resample == "down"
        # `__call__` pads the map at the bottom and on the right before a strided convolution.
        strided: Any = dict(stride=2, padding=0) if self.is_down else {}
        self.resample = None if resample is None else conv(outputs, outputs, 3, **strided, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        for block in self.blocks:
            x = block(x)
        if self.resample is None:
            return x
        if self.is_down:
            return self.resample(jnp.pad(x, [(0, 0), (0, 1), (0, 1), (0, 0)]))
        return self.resample(doubled(x))


class Encoder(nnx.Module):
    """Maps images (B, H, W, channels) to (B, H / factor, W / factor, outputs)."""

    def __init__(self, channels: int, widths: Sequence[int], blocks: int, outputs: int, **options: Any):
        plain = {key: value for key, value in options.items() if key != "norm_groups"}
        last = len(widths) - 1
        self.start = conv(channels, widths[0], 3, **plain)
        self.levels = nnx.List([
            Level(before, width, blocks, "down" if n < last else None, **options)
            for n, (before, width) in enumerate(zip([widths[0], *widths], widths, strict=False))
        ])  # fmt: skip
        self.middle = Middle(widths[-1], **options)
        self.norm = group_norm(widths[-1], **options)
        self.end = conv(widths[-1], outputs, 3, **plain)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.start(x)
        for level in self.levels:
            x = level(x)
        return self.end(jax.nn.silu(self.norm(self.middle(x))))


class Decoder(nnx.Module):
    """Maps latents (B, h, w, inputs) to images (B, factor h, factor w, channels).

    It mirrors the encoder; each level has one residual block more.
    """

    def __init__(self, inputs: int, widths: Sequence[int], blocks: int, channels: int, **options: Any):
        plain = {key: value for key, value in options.items() if key != "norm_groups"}
        widths, last = widths[::-1], len(widths) - 1
        self.start = conv(inputs, widths[0], 3, **plain)
        self.middle = Middle(widths[0], **options)
        self.levels = nnx.List([
            Level(before, width, blocks + 1, "up" if n < last else None, **options)
            for n, (before, width) in enumerate(zip([widths[0], *widths], widths, strict=False))
        ])  # fmt: skip
        self.norm = group_norm(widths[-1], **options)
        self.end = conv(widths[-1], channels, 3, **plain)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.middle(self.start(x))
        for level in self.levels:
            x = level(x)
        return self.end(jax.nn.silu(self.norm(x)))


class Autoencoder(nnx.Module):
    """Encodes images (B, H, W, channels), about -1 to 1, to normal distributions of latents, and decodes latents.

    Attributes:
        factor: side of an image divided by the side of its latents.
        channels: channels of an image.
        latent_channels: channels of the latents.
    """

    def __init__(
        self,
        widths: Sequence[int] = (128, 256, 512, 512),
        *,
        blocks: int = 2,
        channels: int = 3,
        latent_channels: int = 4,
        norm_groups: int = 32,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Initialises encoder and decoder.

        Args:
            widths: channels of each level, finest first.
            blocks: residual blocks in a level of the encoder; a level of the decoder has one more.
            channels: channels of an image.
            latent_channels: channels of the latents.
            norm_groups: groups of the group norms, a divisor of every width.
            dtype: dtype of the computation; parameters are float32.
            rngs: source of the initial parameters.

        Raises:
            ValueError: norm_groups does not divide every width.
        """
        for width in widths:
            if width % norm_groups:
                raise ValueError(f"norm_groups: expected a divisor of the widths {tuple(widths)}, got {norm_groups}")
        options: Any = dict(norm_groups=norm_groups, dtype=jnp.dtype(dtype), rngs=rngs)
        plain = {key: value for key, value in options.items() if key != "norm_groups"}
        self.factor, self.channels, self.latent_channels = 2 ** (len(widths) - 1), channels, latent_channels
        self.encoder = Encoder(channels, tuple(widths), blocks, 2 * latent_channels, **options)
        self.to_moments = conv(2 * latent_channels, 2 * latent_channels, 1, **plain)
        self.from_latents = conv(latent_channels, latent_channels, 1, **plain)
        self.decoder = Decoder(latent_channels, tuple(widths), blocks, channels, **options)

    def encode(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns mean and log variance of the latents, each (B, H / factor, W / factor, latent_channels) float32.

        They are not multiplied by LATENT_SCALE.

        Args:
            images: (B, H, W, channels), about -1 to 1.

        Raises:
            ValueError: another number of channels, or sides that `factor` does not divide.
        """
        shape = images.shape
        if len(shape) != 4 or shape[-1] != self.channels or shape[1] % self.factor or shape[2] % self.factor:
            expected = f"(B, H, W, {self.channels}) with H and W divisible by {self.factor}"
            raise ValueError(f"images: expected shape {expected}, got {shape}")
        moments = self.to_moments(self.encoder(images)).astype(jnp.float32)
        mean, log_variance = jnp.split(moments, 2, axis=-1)
        return mean, jnp.clip(log_variance, *_LOG_VARIANCES)

    def decode(self, latents: jax.Array) -> jax.Array:
        """Returns images (B, factor h, factor w, channels) float32, about -1 to 1.

        Args:
            latents: (B, h, w, latent_channels), not multiplied by LATENT_SCALE.

        Raises:
            ValueError: another number of channels.
        """
        if latents.ndim != 4 or latents.shape[-1] != self.latent_channels:
            raise ValueError(f"latents: expected shape (B, H, W, {self.latent_channels}), got {latents.shape}")
        return self.decoder(self.from_latents(latents)).astype(jnp.float32)
