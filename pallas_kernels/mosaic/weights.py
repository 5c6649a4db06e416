"""The three weights of each pixel inside a kernel: how they are laid out, loaded, normalised and differentiated.

The weights, or their logits, come in one of two forms:
    per channel: (B, H, W, 3, C), float32, or any float dtype for logits;
    shared: (B, lines, C_w, 4, pixels) float32. Channel c uses weight channel c // (C / C_w). `lines` is the axis that
        the scan walks and `pixels` the other one, rounded up to 16 bytes. Slot 3 is padding: a TMA copy needs whole
        groups of 16 bytes. A channel block lies within one weight channel, so a kernel normalises its weights once.

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

from pallas_kernels.mosaic import primitives
from pallas_kernels.mosaic.pipeline import Pipeline
from pallas_kernels.stability import LOGIT_FLOOR

SLOTS = 3
SHARED_SLOTS = 4


class Weights:
    """Loads the weights of a tile in either form, and writes their gradients back in the same form."""

    def __init__(self, walk: Pipeline, array: jax.Array, from_logits: bool, direction: int = 0):
        """Takes the shapes of a kernel's weights.

        Args:
            walk: the kernel's walk.
            array: the weights or logits, in either form. Where it is (B, H, W, 12, C), each direction has 3 slots.
            from_logits: whether `array` holds logits.
            direction: which 3 of the 12 slots are used.
        """
        self.walk, self.from_logits, self.dtype = walk, from_logits, array.dtype
        self.slots = pl.ds(SLOTS * direction, SLOTS)
        self.rows, self.channels = walk.tile.rows, walk.tile.channels
        self.is_shared = array.shape[3] == SHARED_SLOTS
        self.sharing = walk.channels // (array.shape[2] if self.is_shared else array.shape[4])
        self.tile = (SHARED_SLOTS, self.rows) if self.is_shared else (self.rows, SLOTS, self.channels)

    def fetch(self, ref, target, n, barrier) -> None:
        """Starts the copy of line n into `target` in shared memory, an array of shape `tile`."""
        walk = self.walk
        if self.is_shared:
            channel = lax.div(walk.block_index * self.channels, self.sharing)
            source = ref.at[walk.image, walk.line(n), channel, :, walk.rows()]
        else:
            source = walk.at(ref, walk.line(n), walk.rows(), self.slots)
        primitives.fetch(source, target, barrier)

    def read(self, ref: Any):
        """The weights that `fetch` has copied, three (rows, channels) tiles, and the values that `gradients` needs."""
        if self.is_shared:
            return self.weights([primitives.load_pixels(ref.at[k], self.channels) for k in range(SLOTS)])
        return self.weights([primitives.load(ref.at[:, k]) for k in range(SLOTS)])

    def weights(self, given: list[jax.Array]):
        """As `read`, from weights or logits in registers: (rows, channels) tiles, or (rows,) where they are shared."""
        numbers = primitives.pixel_numbers if self.is_shared else primitives.pixels
        pixel = self.walk.pixel + numbers(self.rows, self.channels)
        weights, kept = given, None
        if self.from_logits:
            parts, factor = shares(given)
            weights = normalise(parts, pixel, self.walk.length)
            kept = [given, parts, factor, weights]
        if self.is_shared:
            weights = [primitives.spread(weight, self.channels) for weight in weights]
        return weights, kept

    def gradients(self, grads, kept):
        """Gradients of the weights or logits as given, from those of the weights of each channel."""
        if self.is_shared:
            grads = [jnp.sum(grad, axis=1) for grad in grads]  # (rows, channels) to (rows,)
        return pass_to_logits(*kept, grads) if self.from_logits else grads  # pyright: ignore

    def write(self, ref, grads) -> None:
        """Writes `gradients` into shared memory, from where `store` copies them."""
        for k, grad in enumerate(grads):
            ref[(k, slice(None)) if self.is_shared else (slice(None), k)] = grad.astype(self.dtype)

    def gradient_like(self, array: jax.Array) -> jax.ShapeDtypeStruct:
        """The gradient's shape in memory. For shared weights each channel block writes a part, to be summed by XLA."""
        if not self.is_shared:
            return jax.ShapeDtypeStruct(array.shape, array.dtype)
        walk, tile = self.walk, self.walk.tile
        pixels = max(array.shape[4], walk.segments * tile.own if tile.ghost else 0)
        return jax.ShapeDtypeStruct((walk.batch, walk.lines, walk.blocks, SHARED_SLOTS, pixels), jnp.float32)

    def store(self, source, ref, n) -> None:
        """Starts the copy of line n's gradients out of shared memory."""
        walk, tile = self.walk, self.walk.tile
        if not self.is_shared:
            walk.store(source, ref, n, self.slots)
        elif tile.ghost:
            own = pl.ds(walk.segment * tile.own, tile.own)
            for k in range(SLOTS):
                target = ref.at[walk.image, walk.line(n), walk.block_index, k, own]
                primitives.store(source.at[k, pl.ds(walk.offset, tile.own)], target)
        else:
            primitives.store(source, ref.at[walk.image, walk.line(n), walk.block_index, :, walk.rows()])


def shares(logits: list[jax.Array]) -> tuple[list[jax.Array], jax.Array]:
    """The sigmoids of three float32 logits, each times the same factor, and that factor.

    With a, b, c = 1 + exp(-logit), the sigmoids are 1/a, 1/b, 1/c. Times a*b*c they are b*c, a*c, a*b, which takes no
    division. The factor is at most 1.5e35.
    """
    a, b, c = (1.0 + jnp.exp(-jnp.maximum(logit, LOGIT_FLOOR)) for logit in logits)
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
    inverse = 1.0 / (smaller + parts[1] + larger)
    # Adding a half rounds to a grid on which sums are exact; see `stability.normalise`.
    smaller = (smaller * inverse + 0.5) - 0.5
    larger = jnp.minimum((larger * inverse + 0.5) - 0.5, 1.0 - smaller)
    return [smaller, 1.0 - (smaller + larger), larger]


def pass_to_logits(
    logits: list[jax.Array], parts: list[jax.Array], factor: jax.Array, given: list[jax.Array], grads: list[jax.Array]
) -> list[jax.Array]:
    """Gradients of the logits from `grads`, those of the weights `given`; `parts` and `factor` are `shares(logits)`."""
    mean = given[0] * grads[0] + given[1] * grads[1] + given[2] * grads[2]
    inverse = 1.0 / factor
    return [
        jnp.where(logit < LOGIT_FLOOR, 0.0, 1.0 - part * inverse) * (weight * (grad - mean))
        for logit, part, weight, grad in zip(logits, parts, given, grads, strict=True)
    ]
