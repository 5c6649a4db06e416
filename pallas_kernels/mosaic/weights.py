"""The three weights of each pixel inside a kernel: how they are laid out, loaded, normalised and differentiated.

The weights, or their logits, come in one of two forms:
    per channel: (B, H, W, D * 3, C), float32, or any float dtype for logits;
    shared: (B * D, lines, C_w, 4, pixels) float32, for the D directions of one launch. Channel c uses weight channel
        c // (C / C_w). `lines` is the axis that a direction walks and `pixels` the other one, rounded up to 16 bytes.
        Slot 3 is padding: a TMA copy needs whole groups of 16 bytes. A channel block lies within one weight channel, so
        a kernel normalises its weights once.

The normalisation is that of `pallas_kernels.stability` with few special functions: each of the three sigmoids takes one
special-function instruction (the power of two), and one more inverts their sum. With the GPU's approximations (the
power's relative error is 2^-22, its argument is rounded to float32) a weight differs from the exact one by less than
1e-6.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.mosaic import instructions, primitives
from pallas_kernels.mosaic.frame import Frame
from pallas_kernels.stability import LOGIT_FLOOR

SLOTS = 3
SHARED_SLOTS = 4


class Weights:
    """Loads the weights of a tile in either form, and writes their gradients back in the same form."""

    def __init__(self, frame: Frame, like: jax.Array | jax.ShapeDtypeStruct, from_logits: bool):
        """Takes the shapes of a kernel's weights.

        Args:
            frame: the kernel's walk.
            like: the weights or logits, in either form.
            from_logits: whether they are logits.
        """
        self.frame, self.from_logits, self.dtype = frame, from_logits, like.dtype
        self.rows, self.channels = frame.tile.rows, frame.tile.channels
        self.is_shared = like.shape[3] == SHARED_SLOTS
        self.sharing = frame.channels // (like.shape[2] if self.is_shared else like.shape[4])
        self.tile = (SHARED_SLOTS, self.rows) if self.is_shared else (self.rows, SLOTS, self.channels)

    def fetch(self, ref: Any, target: Any, axis: int, n: Any, barrier: Any) -> None:
        """Starts the copy of line n into `target` in shared memory, an array of shape `tile`."""
        frame = self.frame
        if self.is_shared:
            channel = lax.div(frame.block_index * self.channels, self.sharing)
            primitives.fetch(ref.at[self._walk, frame.line(n), channel, :, frame.rows()], target, barrier)
        else:
            frame.fetch(ref, target, axis, n, barrier, part=self._slots)

    def read(self, ref: Any) -> tuple[list[jax.Array], Any]:
        """The weights that `fetch` has copied, three (rows, channels) tiles, and the values that `gradients` needs."""
        if self.is_shared:
            return self.weights([primitives.load_pixels(ref.at[k], self.channels) for k in range(SLOTS)])
        return self.weights([primitives.load(ref.at[:, k], least=self.least) for k in range(SLOTS)])

    @property
    def least(self) -> float | None:
        """The least logit, if `weights` expects that the tiles are no smaller: the gradient needs smaller ones."""
        return LOGIT_FLOOR if self.from_logits and not self.is_shared and not self.frame.reverse else None

    def weights(self, given: list[jax.Array]) -> tuple[list[jax.Array], Any]:
        """As `read`, from weights or logits in registers: (rows, channels) tiles, or (rows,) where they are shared."""
        numbers = primitives.pixel_numbers if self.is_shared else primitives.pixels
        pixel = self.frame.pixel + numbers(self.rows, self.channels)
        weights, kept = given, None
        if self.from_logits:
            at_least = given if self.least else [jnp.maximum(logit, LOGIT_FLOOR) for logit in given]
            parts, factor = shares(at_least)
            weights = normalise(parts, pixel, self.frame.length)
            kept = given, parts, factor, weights
        if self.is_shared:
            weights = [primitives.spread(weight, self.channels) for weight in weights]
        return weights, kept

    def gradients(self, grads: list[jax.Array], kept: Any) -> list[jax.Array]:
        """Gradients of the weights or logits as given, from those of the weights of each channel."""
        if self.is_shared:
            grads = [jnp.sum(grad, axis=1) for grad in grads]  # (rows, channels) to (rows,)
        if not self.from_logits:
            return grads
        logits, parts, factor, weights = kept
        return pass_to_logits(logits, parts, factor, weights, grads)

    def write(self, ref: Any, grads: list[jax.Array]) -> None:
        """Writes `gradients` into shared memory, from where `store` copies them."""
        for k, grad in enumerate(grads):
            ref[(k, slice(None)) if self.is_shared else (slice(None), k)] = grad.astype(self.dtype)

    def clear(self, ref: Any) -> None:
        """Writes zeros in place of gradients."""
        nothing = primitives.zeros(self.rows, self.channels)
        self.write(ref, [jnp.sum(nothing, axis=1) if self.is_shared else nothing] * SLOTS)

    def gradient_like(self, like: jax.Array | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        """The gradient's shape in memory. For shared weights each channel block writes a part, to be summed by XLA."""
        if not self.is_shared:
            return jax.ShapeDtypeStruct(like.shape, like.dtype)
        frame, tile = self.frame, self.frame.tile
        pixels = max(like.shape[4], frame.segments * tile.own if tile.ghost else 0)
        return jax.ShapeDtypeStruct((like.shape[0], frame.lines, frame.blocks, SHARED_SLOTS, pixels), jnp.float32)

    def store(self, source: Any, ref: Any, axis: int, n: Any) -> None:
        """Starts the copy of line n's gradients out of shared memory."""
        frame, tile = self.frame, self.frame.tile
        if not self.is_shared:
            frame.store(source, ref, axis, n, part=self._slots)
        elif tile.ghost:
            pixels = pl.ds(frame.segment * tile.own, tile.own)
            for k in range(SLOTS):
                target = ref.at[self._walk, frame.line(n), frame.block_index, k, pixels]
                primitives.store(source.at[k, pl.ds(frame.offset, tile.own)], target)
        else:
            primitives.store(source, ref.at[self._walk, frame.line(n), frame.block_index, :, frame.rows()])

    @property
    def _slots(self) -> Any:
        """The direction's slots in the per-channel form."""
        return pl.ds(SLOTS * self.frame.slot, SLOTS)

    @property
    def _walk(self) -> Any:
        """The index of image and direction in the shared form."""
        return self.frame.image * len(self.frame.directions) + self.frame.direction


def shares(logits: list[jax.Array]) -> tuple[list[jax.Array], jax.Array]:
    """The sigmoids of three float32 logits of at least -27, each times the same factor, and that factor.

    With a, b, c = 1 + exp(-logit), the sigmoids are 1/a, 1/b, 1/c. Times a*b*c they are b*c, a*c, a*b, which takes no
    division. The factor is at most 1.5e35.
    """
    a, b, c = (1.0 + jnp.exp(-logit) for logit in logits)
    ab, bc = a * b, b * c
    return [bc, a * c, ab], ab * c


def normalise(parts: list[jax.Array], pixel: jax.Array, length: int) -> list[jax.Array]:
    """Weights of the three neighbours: `parts` over their sum, 0 outside the image. Rows sum to exactly 1.

    Args:
        parts: shares of the neighbours of smaller, same and larger index, float32; a common factor cancels.
        pixel: int32, the index along the line.
        length: pixels of the line.
    """
    smaller = jnp.where(pixel > 0, parts[0], 0.0)
    larger = jnp.where(pixel < length - 1, parts[2], 0.0)
    inverse = instructions.reciprocal(smaller + parts[1] + larger)
    # Adding a half rounds to a grid on which sums are exact; see `stability.normalise`.
    smaller = (smaller * inverse + 0.5) - 0.5
    larger = jnp.minimum((larger * inverse + 0.5) - 0.5, 1.0 - smaller)
    return [smaller, 1.0 - (smaller + larger), larger]


def pass_to_logits(
    logits: list[jax.Array], parts: list[jax.Array], factor: jax.Array, given: list[jax.Array], grads: list[jax.Array]
) -> list[jax.Array]:
    """Gradients of the logits from `grads`, those of the weights `given`; `parts` and `factor` are `shares(logits)`."""
    mean = given[0] * grads[0] + given[1] * grads[1] + given[2] * grads[2]
    inverse = instructions.reciprocal(factor)
    return [
        jnp.where(logit < LOGIT_FLOOR, 0.0, 1.0 - part * inverse) * (weight * (grad - mean))
        for logit, part, weight, grad in zip(logits, parts, given, grads, strict=True)
    ]
