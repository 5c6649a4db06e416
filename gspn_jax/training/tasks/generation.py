"""The class-conditional generation task: the loss of a diffusion objective on images or latents with labels."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gspn_jax.diffusion import GaussianDiffusion, Interpolant
from gspn_jax.diffusion.gaussian import split_output
from gspn_jax.diffusion.interpolants import PATHS
from gspn_jax.training.functional import Functional
from gspn_jax.training.sharding import place_batch
from gspn_jax.training.state import Parameters

Objective = GaussianDiffusion | Interpolant
OBJECTIVES = ("ddpm", *PATHS)  # by name: noise prediction, and the interpolants


class Generation:
    """Trains a denoiser.

    Args:
        build: NNX rngs -> module. `module(x, time, label, key=key)` takes x (B, H, W, C) float32, time (B,) in the
            objective's units and label (B,) int32, and returns (B, H, W, C), or (B, H, W, 2 C) with variance channels;
            key=None means inference.
        num_classes: number of classes; label num_classes means "no class".
        objective: a Gaussian process, whose denoiser predicts noise, or an interpolant, whose denoiser predicts
            velocities.
        label_dropout: share of images that are trained without their class, in [0, 1).
        latent_scale: factor by which latents are multiplied.

    Raises:
        ValueError: label_dropout is out of range.
    """

    def __init__(
        self,
        build: Callable[[nnx.Rngs], nnx.Module],
        *,
        num_classes: int,
        objective: Objective,
        label_dropout: float = 0.1,
        latent_scale: float = 1.0,
    ):
        if not 0 <= label_dropout < 1:
            raise ValueError(f"label_dropout: expected a probability in [0, 1), got {label_dropout}")
        self._module = Functional(build)
        self.num_classes, self.objective = num_classes, objective
        self._label_dropout, self._latent_scale = label_dropout, latent_scale
        self._losses = jax.jit(self._evaluation_losses)

    def init(self, key: jax.Array) -> Parameters:
        """Returns fresh parameters: a nested dict of float32 arrays. Traceable."""
        return self._module.init(key)

    def denoise(
        self, params: Parameters, x: jax.Array, time: jax.Array, label: jax.Array, key: jax.Array | None = None
    ) -> jax.Array:
        """Returns the module's prediction, (B, H, W, C) or (B, H, W, 2 C) float32. Traceable."""
        output = self._module.apply(params, x, time, label, key=key).astype(jnp.float32)
        # Interpolants do not use the variance channels.
        return split_output(output, x.shape[-1])[0] if isinstance(self.objective, Interpolant) else output

    def loss(
        self, params: Parameters, batch: dict[str, jax.Array], key: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns the mean loss, () float32, and the means of its parts. Traceable.

        Args:
            params: nested dict of float32 arrays.
            batch: "label" (B,) int32; "image" (B, H, W, C) uint8, or the latents' "mean" and "log_variance"
                (B, H, W, C).
            key: PRNG key of times, noise, latents, dropped labels and the module.
        """
        data_key, drop_key, module_key = jax.random.split(key, 3)
        label = batch["label"]
        drops = jax.random.bernoulli(drop_key, self._label_dropout, label.shape)
        label = jnp.where(drops, self.num_classes, label)
        losses = self._losses_of(params, batch, label, data_key, module_key)
        numbers = {name: value.mean() for name, value in losses.items() if name != "loss"}
        return losses["loss"].mean(), numbers

    def evaluate(self, params: Parameters, batches: Iterable[dict[str, np.ndarray]]) -> dict[str, float]:
        """Returns "loss" and "images", computed on the mesh set by `jax.set_mesh`.

        Times and noise depend only on an image's batch and row, so evaluations of equal batches are comparable.

        Args:
            params: nested dict of arrays on the mesh.
            batches: rows of this process, as for `loss`, with "mask" (b,) bool; False rows are padding.

        Raises:
            ValueError: the batches have no image.
        """
        place = functools.partial(place_batch, mesh=jax.sharding.get_mesh())
        total, count = 0.0, 0.0
        for number, batch in enumerate(batches):
            summed, images = self._losses(params, place(batch), jnp.asarray(number))
            total, count = total + float(summed), count + float(images)
        if not count:
            raise ValueError("batches: expected at least one image, got none")
        return {"loss": total / count, "images": int(count)}

    def _evaluation_losses(
        self, params: Parameters, batch: dict[str, Any], number: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the summed loss, () float32, and the number of images, () float32, of batch `number`."""
        key = jax.random.fold_in(jax.random.key(0), number)
        losses = self._losses_of(params, batch, batch["label"], key, None)["loss"]
        mask = batch["mask"]
        return jnp.sum(jnp.where(mask, losses, 0)), jnp.sum(mask.astype(jnp.float32))

    def _losses_of(
        self,
        params: Parameters,
        batch: dict[str, jax.Array],
        label: jax.Array,
        data_key: jax.Array,
        module_key: jax.Array | None,
    ) -> dict[str, jax.Array]:
        """Returns the objective's losses, each (B,), at random times and with random noise."""
        latent_key, time_key, noise_key = jax.random.split(data_key, 3)
        x = self.inputs(batch, latent_key)
        noise = jax.random.normal(noise_key, x.shape)

        def denoiser(x: jax.Array, time: jax.Array) -> jax.Array:
            return self.denoise(params, x, time, label, module_key)

        if isinstance(self.objective, Interpolant):
            time = jax.random.uniform(time_key, label.shape)
        else:
            time = jax.random.randint(time_key, label.shape, 0, self.objective.num_steps)
        return self.objective.losses(denoiser, x, time, noise)

    def inputs(self, batch: dict[str, jax.Array], key: jax.Array) -> jax.Array:
        """Returns the clean data, (B, H, W, C) float32: images on -1..1, or scaled latents. Traceable.

        Latents are drawn from their normal distribution, with a new draw for each key.
        """
        if "image" in batch:
            return batch["image"].astype(jnp.float32) / 127.5 - 1
        mean, log_variance = batch["mean"].astype(jnp.float32), batch["log_variance"].astype(jnp.float32)
        drawn = mean + jnp.exp(log_variance / 2) * jax.random.normal(key, mean.shape)
        return drawn * self._latent_scale
