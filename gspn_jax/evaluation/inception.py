"""The Inception-v3 that defines the Frechet inception distance: TensorFlow's network of 2015 with 1,008 outputs.

It differs from the usual Inception-v3 in its pooling (averages exclude the padding; the last block pools by maximum)
and in its image resizing.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

SIZE = 299
SPATIAL_CHANNELS = 7  # channels of "mixed_6_conv" that sFID uses


class ConvNorm(nnx.Module):
    """Convolution, batch norm with stored statistics, ReLU. Padding keeps the resolution at stride 1."""

    def __init__(self, shape: tuple[int, int, int, int], *, rngs: nnx.Rngs):
        """Initialises convolution and norm.

        Args:
            shape: shape of the kernel, (rows, columns, inputs, outputs).
            rngs: source of the initial parameters.
        """
        *size, inputs, outputs = shape
        self.conv = nnx.Conv(inputs, outputs, tuple(size), padding="VALID", use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(outputs, epsilon=1e-3, use_running_average=True, rngs=rngs)

    def __call__(self, x: jax.Array, *, stride: int = 1, padded: bool = True) -> jax.Array:
        rows, columns, _, _ = self.conv.kernel[...].shape
        borders = (rows // 2, columns // 2) if padded and stride == 1 else (0, 0)
        y = jax.lax.conv_general_dilated(
            x, self.conv.kernel[...], (stride, stride), [(border, border) for border in borders],
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip
        return jax.nn.relu(self.norm(y))


class Inception(nnx.Module):
    """Computes features by name from uint8 images (B, H, W, 3).

    "64", "192", "768", "2048": (B, 64) and so on, averages of the maps after the first and second pool, Mixed_6e and
    Mixed_7c. "logits_unbiased": (B, 1008), logits without the bias. "mixed_6_conv": (B, 17, 17, 7), for sFID.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, int, int, int]], outputs: int, *, rngs: nnx.Rngs):
        """Initialises the layers.

        Args:
            shapes: shapes of the kernels, by the names in `CONVOLUTIONS`.
            outputs: number of logits.
            rngs: source of the initial parameters.
        """
        self.convs = nnx.Dict({name: ConvNorm(shapes[name], rngs=rngs) for name in CONVOLUTIONS})
        self.logits = nnx.Linear(2048, outputs, use_bias=False, rngs=rngs)

    def __call__(self, images: jax.Array) -> dict[str, jax.Array]:
        """Returns the features, float32; ValueError unless images are uint8 (B, H, W, 3), H and W at least 1."""
        if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != jnp.uint8 or 0 in images.shape[1:3]:
            raise ValueError(f"images: expected uint8 (B, H, W, 3), got {images.dtype.name} {images.shape}")
        features = {}
        x = (resized(images.astype(jnp.float32), SIZE) - 128) / 128  # (B, 299, 299, 3)
        x = self.convs["Conv2d_1a_3x3"](x, stride=2)
        x = self.convs["Conv2d_2a_3x3"](x, padded=False)
        x = _max_pool(self.convs["Conv2d_2b_3x3"](x))  # (B, 73, 73, 64)
        features["64"] = _mean(x)
        x = self.convs["Conv2d_3b_1x1"](x)
        x = _max_pool(self.convs["Conv2d_4a_3x3"](x, padded=False))  # (B, 35, 35, 192)
        features["192"] = _mean(x)
        for block in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
            x = self._block(block, x, [["1x1"], ["5x5_1", "5x5_2"], ["3x3dbl_1", "3x3dbl_2", "3x3dbl_3"]])
        x = self._reduced("Mixed_6a", x, [["3x3"], ["3x3dbl_1", "3x3dbl_2", "3x3dbl_3"]])  # (B, 17, 17, 768)
        for block in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
            if block == "Mixed_6d":
                features["mixed_6_conv"] = self._chain(block, ["1x1"], x)[..., :SPATIAL_CHANNELS]
            x = self._block(block, x, [["1x1"], _numbered("7x7", 3), _numbered("7x7dbl", 5)])
        features["768"] = _mean(x)
        x = self._reduced("Mixed_7a", x, [["3x3_1", "3x3_2"], _numbered("7x7x3", 4)])  # (B, 8, 8, 1280)
        x = self._split_block("Mixed_7b", x, _mean_pool(x))
        x = self._split_block("Mixed_7c", x, _max_pool(x, stride=1))
        features["2048"] = _mean(x)
        features["logits_unbiased"] = self.logits(features["2048"])
        return features

    def _chain(self, block: str, names: list[str], x: jax.Array, last_stride: int = 1) -> jax.Array:
        """Applies convolutions of a block one after the other."""
        for name in names:
            x = self.convs[f"{block}.branch{name}"](x, stride=last_stride if name == names[-1] else 1)
        return x

    def _block(self, block: str, x: jax.Array, branches: list[list[str]]) -> jax.Array:
        """Concatenates branches and a pooled branch at the same resolution."""
        pooled = self._chain(block, ["_pool"], _mean_pool(x))
        return jnp.concatenate([*(self._chain(block, names, x) for names in branches), pooled], axis=-1)

    def _reduced(self, block: str, x: jax.Array, branches: list[list[str]]) -> jax.Array:
        """Concatenates branches and a maximum pool at half the resolution."""
        parts = [self._chain(block, names, x, last_stride=2) for names in branches]
        return jnp.concatenate([*parts, _max_pool(x)], axis=-1)

    def _split_block(self, block: str, x: jax.Array, pooled: jax.Array) -> jax.Array:
        """Concatenates branches, of which two end in both a 1x3 and a 3x1 convolution."""
        parts = [self._chain(block, ["1x1"], x)]
        for start, ends in ((["3x3_1"], "3x3_2"), (["3x3dbl_1", "3x3dbl_2"], "3x3dbl_3")):
            middle = self._chain(block, start, x)
            parts += [self._chain(block, [f"{ends}{side}"], middle) for side in "ab"]
        return jnp.concatenate([*parts, self._chain(block, ["_pool"], pooled)], axis=-1)


def resized(images: jax.Array, size: int) -> jax.Array:
    """Resizes (B, H, W, C) to (B, size, size, C) by TensorFlow 1's bilinear interpolation.

    Pixel i of the result lies at i * H / size (or W / size) in the original.
    """
    for axis in (1, 2):
        length = images.shape[axis]
        place = np.arange(size) * (length / size)
        lower = place.astype(int)
        upper = np.minimum(lower + 1, length - 1)
        share = jnp.asarray(place - lower, images.dtype).reshape([-1 if a == axis else 1 for a in range(4)])
        low, high = jnp.take(images, lower, axis=axis), jnp.take(images, upper, axis=axis)
        images = low + (high - low) * share
    return images


def _numbered(name: str, count: int) -> list[str]:
    return [f"{name}_{number}" for number in range(1, count + 1)]


def _mean(x: jax.Array) -> jax.Array:
    """Returns averages over the map: (B, H, W, C) to (B, C)."""
    return jnp.mean(x, axis=(1, 2))


def _max_pool(x: jax.Array, stride: int = 2) -> jax.Array:
    return nnx.max_pool(x, (3, 3), strides=(stride, stride), padding="VALID" if stride == 2 else "SAME")


def _mean_pool(x: jax.Array) -> jax.Array:
    return nnx.avg_pool(x, (3, 3), strides=(1, 1), padding="SAME", count_include_pad=False)


def _names() -> list[str]:
    """Returns the names of all convolutions, which are those of the published parameters."""
    branches = {
        "5bcd": ["1x1", *_numbered("5x5", 2), *_numbered("3x3dbl", 3), "_pool"],
        "6a": ["3x3", *_numbered("3x3dbl", 3)],
        "6bcde": ["1x1", *_numbered("7x7", 3), *_numbered("7x7dbl", 5), "_pool"],
        "7a": [*_numbered("3x3", 2), *_numbered("7x7x3", 4)],
        "7bc": ["1x1", "3x3_1", "3x3_2a", "3x3_2b", *_numbered("3x3dbl", 2), "3x3dbl_3a", "3x3dbl_3b", "_pool"],
    }
    stem = ["Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "Conv2d_3b_1x1", "Conv2d_4a_3x3"]
    mixed = [
        f"Mixed_{blocks[0]}{letter}.branch{name}"
        for blocks, names in branches.items() for letter in blocks[1:] for name in names
    ]  # fmt: skip
    return stem + mixed


CONVOLUTIONS = tuple(_names())
