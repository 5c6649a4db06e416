"""Mixup, cutmix and label smoothing on the device, in the batch mode of the classifiers' recipe.

Image i of a batch of B is mixed with image B - 1 - i. All images of a batch are mixed in the same way.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class MixingOptions:
    """Options of mixing.

    Attributes:
        mixup: alpha of the Beta distribution of mixup's share; 0 turns mixup off.
        cutmix: alpha of the Beta distribution of cutmix's share; 0 turns cutmix off.
        probability: probability that a batch is mixed.
        switch: probability that a mixed batch gets cutmix, if both are on.
        label_smoothing: share of the target that is spread evenly over all classes.

    Raises:
        ValueError: an option is out of its range or not finite.
    """

    mixup: float = 0.0
    cutmix: float = 0.0
    probability: float = 1.0
    switch: float = 0.5
    label_smoothing: float = 0.0

    def __post_init__(self):
        for name in ("mixup", "cutmix"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected a finite number >= 0, got {getattr(self, name)}")
        for name in ("probability", "switch", "label_smoothing"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected a number in [0, 1], got {getattr(self, name)}")


def smooth_targets(labels: jax.Array, num_classes: int, smoothing: float) -> jax.Array:
    """Returns (B, num_classes) float32 targets from (B,) labels."""
    return jax.nn.one_hot(labels, num_classes) * (1.0 - smoothing) + smoothing / num_classes


def mix(
    images: jax.Array, labels: jax.Array, key: jax.Array, *, num_classes: int, options: MixingOptions
) -> tuple[jax.Array, jax.Array]:
    """Returns mixed images (B, H, W, C) float32 and their targets (B, num_classes) float32.

    Args:
        images: (B, H, W, C), uint8 or float, normalised or not (mixing is linear).
        labels: (B,) int32.
        key: PRNG key of this batch.
        num_classes: length of a target.
        options: options of mixing.
    """
    targets = smooth_targets(labels, num_classes, options.label_smoothing)
    partners = jnp.flip(images, 0).astype(jnp.float32)  # flipped before the cast, so that devices exchange uint8
    images = images.astype(jnp.float32)
    if not options.mixup and not options.cutmix or not options.probability:
        return images, targets
    k_use, k_switch, k_mixup, k_cutmix, k_box = jax.random.split(key, 5)
    height, width = images.shape[1:3]
    if options.mixup:
        mixup_share = jax.random.beta(k_mixup, options.mixup, options.mixup, dtype=jnp.float32)
    else:
        mixup_share = jnp.float32(1)
    inside = jnp.zeros((height, width), bool)
    cutmix_share = jnp.float32(1)
    if options.cutmix:
        area = jax.random.beta(k_cutmix, options.cutmix, options.cutmix, dtype=jnp.float32)
        inside = box(area, jax.random.uniform(k_box, (2,)), height, width)
        # The border may cut the box, so the share is counted from the pixels outside it.
        cutmix_share = 1.0 - inside.astype(jnp.float32).mean()
    switch = options.switch if options.mixup else 1.0
    use_cutmix = (jax.random.uniform(k_switch) < switch) & (options.cutmix > 0)
    use = jax.random.uniform(k_use) < options.probability
    share = jnp.where(use, jnp.where(use_cutmix, cutmix_share, mixup_share), jnp.float32(1))
    # The share of an image in its mixture, for each pixel: constant for mixup, 0 or 1 for cutmix.
    by_pixel = jnp.where(use & use_cutmix, 1.0 - inside.astype(jnp.float32), share)[None, :, :, None]
    mixed = images * by_pixel + partners * (1.0 - by_pixel)
    return mixed, targets * share + jnp.flip(targets, 0) * (1.0 - share)


def box(share: jax.Array, centre: jax.Array, height: int, width: int) -> jax.Array:
    """Returns a (height, width) bool mask of cutmix's box: 1 - share of an image, or less if the border cuts it.

    Args:
        share: () share of the image that stays.
        centre: (2,) row and column of the centre, as shares of height and width in [0, 1).
        height: pixels of the image.
        width: pixels of the image.
    """
    ratio = jnp.sqrt(1.0 - share)

    def span(length: int, at: jax.Array) -> tuple[jax.Array, jax.Array]:
        half = (length * ratio).astype(jnp.int32) // 2
        middle = (at * length).astype(jnp.int32)
        return jnp.clip(middle - half, 0, length), jnp.clip(middle + half, 0, length)

    (top, bottom), (left, right) = span(height, centre[0]), span(width, centre[1])
    rows, columns = jnp.arange(height), jnp.arange(width)
    return ((rows >= top) & (rows < bottom))[:, None] & ((columns >= left) & (columns < right))[None, :]
