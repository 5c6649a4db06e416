"""The image classification task: loss of a batch, and accuracy of parameters."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from gspn_jax.evaluation.accuracy import accuracy, count_batch
from gspn_jax.training.functional import Functional
from gspn_jax.training.mixing import MixingOptions, mix
from gspn_jax.training.sharding import place_batch
from gspn_jax.training.state import Parameters


class Classification:
    """Trains and evaluates a classifier.

    Args:
        build: NNX rngs -> module. `module(images, key=key)` maps normalised images (B, H, W, C) float32 to logits
            (B, num_classes) float32; key=None means inference.
        num_classes: number of classes.
        mean, std: normalisation of each channel, on the 0..255 scale. Images arrive as uint8; the device normalises
            them.
        mixing: mixup, cutmix and label smoothing of training batches; None for none.

    Raises:
        ValueError: mean and std differ in length, or a std is not positive.
    """

    def __init__(
        self,
        build: Callable[[nnx.Rngs], nnx.Module],
        *,
        num_classes: int,
        mean: Sequence[float],
        std: Sequence[float],
        mixing: MixingOptions | None = None,
    ):
        if len(mean) != len(std) or not len(mean) or min(std) <= 0:
            raise ValueError(f"mean, std: expected as many positive std as means, got {mean} and {std}")
        self._module = Functional(build)
        self.num_classes = num_classes
        self._mean = np.asarray(mean, np.float32)
        self._std = np.asarray(std, np.float32)
        self._mixing = mixing or MixingOptions()
        self._count = jax.jit(self._count_batch)

    def init(self, key: jax.Array) -> Parameters:
        """Returns fresh parameters: a nested dict of float32 arrays. Traceable."""
        return self._module.init(key)

    def logits(self, params: Parameters, images: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Returns logits (B, num_classes) for images (B, H, W, C) on the 0..255 scale. Traceable."""
        return self._module.apply(params, self.normalised(images), key=key)

    def features(self, params: Parameters, images: jax.Array) -> jax.Array:
        """Returns the head's input, (B, F) float32, for images (B, H, W, C) on the 0..255 scale. Traceable."""
        return self._module.apply(params, self.normalised(images), method="features")

    def normalised(self, images: jax.Array) -> jax.Array:
        """Returns the module's input, (B, H, W, C) float32, for images on the 0..255 scale. Traceable."""
        mean, std = (jnp.asarray(value).reshape(1, 1, 1, -1) for value in (self._mean, self._std))
        return (images.astype(jnp.float32) - mean) / std

    def loss(
        self, params: Parameters, batch: dict[str, jax.Array], key: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns the mean cross entropy, () float32, and the accuracy in percent on the mixed batch. Traceable.

        Args:
            params: nested dict of float32 arrays.
            batch: "image" (B, H, W, C) uint8 and "label" (B,) int32.
            key: PRNG key of mixing and of the module.
        """
        mix_key, module_key = jax.random.split(key)
        images, targets = mix(
            batch["image"], batch["label"], mix_key, num_classes=self.num_classes, options=self._mixing
        )
        logits = self.logits(params, images, module_key)
        loss = optax.softmax_cross_entropy(logits, targets).mean()
        right = (logits.argmax(-1) == targets.argmax(-1)).astype(jnp.float32)
        return loss, {"accuracy": 100.0 * right.mean()}

    def evaluate(self, params: Parameters, batches: Iterable[dict[str, np.ndarray]]) -> dict[str, float]:
        """Returns "top1" and "top5" in percent, "loss" and "images", computed on the mesh set by `jax.set_mesh`.

        Args:
            params: nested dict of arrays on the mesh.
            batches: rows of this process: "image" (b, H, W, C) uint8, "label" (b,) int32, "mask" (b,) bool.

        Raises:
            ValueError: the batches have no image, or the loss is NaN or Inf.
        """
        place = functools.partial(place_batch, mesh=jax.sharding.get_mesh())
        return accuracy(lambda batch: self._count(params, batch), batches, place)

    def _count_batch(self, params: Parameters, batch: dict[str, Any]) -> dict[str, jax.Array]:
        return count_batch(self.logits(params, batch["image"]), batch["label"], batch["mask"])
