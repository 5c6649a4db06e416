"""Runs of class-conditional generators."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gspn_jax import data
from gspn_jax.diffusion import GaussianDiffusion, Interpolant
from gspn_jax.runs.description import InputDescription, RunDescription, mixer_of, model_builder, network_of, sizes_of
from gspn_jax.runs.run import Picture, Run
from gspn_jax.sampling import ImageSampler, Sampling
from gspn_jax.training.tasks.generation import OBJECTIVES, Generation, Objective


def describe_input(latents: data.LatentSpace | None, image_size: int) -> InputDescription:
    """Returns the "input" entry of a description.

    Args:
        latents: the latents' layout; None for a run on pixels.
        image_size: side of the images, in pixels.
    """
    if latents is None:
        return {"shape": [image_size, image_size, 3]}
    return {"shape": list(latents.shape), "scale": latents.scale, "autoencoder": latents.autoencoder}


def make_objective(name: str) -> Objective:
    """Returns the objective "ddpm", or the interpolant "linear" or "gvp"; ValueError for another name."""
    if name not in OBJECTIVES:
        raise ValueError(f"objective: expected one of {', '.join(OBJECTIVES)}; got {name!r}")
    return GaussianDiffusion.linear() if name == "ddpm" else Interpolant(name)


class GeneratorRun(Run):
    """A run of a generator; `run.sample(labels)` draws images.

    Attributes:
        input: the denoised pixels or latents, from the description.
    """

    task_name = "generation"
    networks = ("generator", "dit")

    def __init__(self, description: RunDescription, *args: Any, **kwargs: Any):
        super().__init__(description, *args, **kwargs)
        self.input: InputDescription = description["input"]  # pyright: ignore[reportTypedDictNotRequiredAccess]
        channels = self.input["shape"][-1]
        if description["model"]["options"].get("in_channels", channels) != channels:
            got = description["model"]["options"]["in_channels"]
            raise ValueError(f"model.in_channels: expected {channels}, as the data have, got {got}")

    @property
    def build(self) -> Callable[[nnx.Rngs], nnx.Module]:
        """A function NNX rngs -> the model with fresh parameters."""
        return model_builder(self.description, in_channels=self.input["shape"][-1])

    def make_task(self) -> Generation:
        """Returns the task."""
        return Generation(
            self.build,
            num_classes=self.num_classes,
            objective=make_objective(self.description.get("objective", "")),
            label_dropout=self.description.get("label_dropout", 0.0),
            latent_scale=self.input.get("scale", 1.0),
        )

    @functools.cached_property
    def task(self) -> Generation:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The task."""
        return self.make_task()

    def model_inputs(self, batch_size: int) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Returns maps (B, H, W, C) float32, timesteps (B,) int32 and labels (B,) int32."""
        maps = jax.ShapeDtypeStruct((batch_size, *self.input["shape"]), jnp.float32)
        numbers = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
        return maps, numbers, numbers

    def preprocess(self, images: Picture | Sequence[Picture]) -> jax.Array:
        """Returns images on -1..1, (B, S, S, 3) float32; ValueError if the generator denoises latents."""
        if "scale" in self.input:
            raise ValueError("images: expected a generator of pixels, got one of latents: encode the images first")
        return self.task.inputs({"image": jnp.asarray(self.pictures(images))}, jax.random.key(0))

    def sampler(
        self,
        sampling: Sampling | None = None,
        *,
        image_size: tuple[int, int] | None = None,
        autoencoder: str = "",
        norm_groups: int = 32,
    ) -> ImageSampler:
        """Returns an `ImageSampler` on the devices of this process; arguments are those of `ImageSampler`."""
        return ImageSampler(
            self.task, self.params, self.description, sampling,
            image_size=image_size, autoencoder=autoencoder, norm_groups=norm_groups,
        )  # fmt: skip

    def sample(
        self,
        labels: Sequence[int] | np.ndarray,
        *,
        seed: int = 0,
        first: int = 0,
        sampler: str = "",
        num_steps: int = 0,
        guidance: float = 1.0,
        interval: tuple[float, float] | None = None,
        guided_channels: int | None = None,
        image_size: tuple[int, int] | None = None,
        autoencoder: str = "",
        batch_size: int = 100,
    ) -> np.ndarray:
        """Draws an image for each label.

        Args:
            labels: (B,) integers in 0..num_classes - 1.
            seed: seed of the noise. Image n depends on the seed and on `first` + n, not on the batch.
            first: number of the first image.
            sampler, num_steps, guidance, interval, guided_channels: see `gspn_jax.sampling.Sampling`.
            image_size: (H, W) of the images in pixels; None takes the size of training.
            autoencoder: file of the autoencoder; required if the network denoises latents.
            batch_size: images at a time.

        Returns:
            uint8 (B, H, W, 3).

        Raises:
            ValueError: an argument out of range, or images with NaN or Inf.
        """
        sampling = Sampling(sampler, num_steps, guidance, interval, guided_channels, seed)
        drawing = self.sampler(sampling, image_size=image_size, autoencoder=autoencoder)
        labels = np.asarray(labels)
        if labels.ndim != 1:
            raise ValueError(f"labels: expected one integer for each image, got shape {labels.shape}")
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        size = min(batch_size, max(len(labels), 1))
        parts = [
            drawing.images(
                labels[start : start + size], np.arange(first + start, first + len(labels))[:size], rows=size
            )
            for start in range(0, len(labels), size)
        ]
        return np.concatenate(parts) if parts else np.zeros((0, *drawing.shape), np.uint8)

    def computation(self) -> dict[str, Any]:
        """Returns the objective, the mixer and, for GSPN mixers, alignment and chunks."""
        options, mixer = sizes_of(self.description), mixer_of(self.description)
        values = {"objective": self.description.get("objective"), "model.mixer": mixer}
        if mixer == "gspn":
            values["model.alignment"] = options.get("alignment", "aligned")
            if network_of(self.description) == "generator":
                depth = options["depth"]
                values["model.chunk"] = options.get("chunk", 2)
                values["model.global_blocks"] = options.get("global_blocks", (depth - 1, depth))
        return values

    @classmethod
    def summary(cls, numbers: Mapping[str, float]) -> list[str]:
        """Returns the losses on held-out images."""
        lines = [f"parameters: loss {numbers['loss']:.4f}"]
        return [*lines, f"moving average: loss {numbers['ema_loss']:.4f}"] if "ema_loss" in numbers else lines
