"""Runs of text-to-image models."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gspn_jax.evaluation.image_archive import to_pixels
from gspn_jax.runs.run import Picture, Run
from gspn_jax.text_to_image import TextToImage
from gspn_jax.text_to_image.loading import REPLACEMENTS, as_published, build_parts


class TextToImageRun(Run):
    """A converted text-to-image model; `run.sample(prompts)` draws images, `run.pipeline` returns them as floats.

    Training it is not possible yet.
    """

    task_name = "text_to_image"
    networks = ("unet",)

    @property
    def build(self) -> Callable[[nnx.Rngs], nnx.Module]:
        """A function NNX rngs -> the UNet with the parameters of this run."""
        return lambda rngs: self.model

    @property
    def model(self) -> nnx.Module:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The UNet."""
        return self.pipeline.parts.unet

    @functools.cached_property
    def pipeline(self) -> TextToImage:
        """The model in float32; `gspn_jax.TextToImage.load` takes other dtypes and mixers."""
        published = as_published(self.workdir, self.params, self.description)
        options: Any = self.description["model"]["options"]
        return TextToImage(build_parts(published, released=self.params.get(REPLACEMENTS), **options))

    def sample(self, prompts: str | Sequence[str], **options: Any) -> np.ndarray:
        """Draws images of prompts.

        Args:
            prompts: one text or several.
            options: of a call of `TextToImage`, such as `num_steps`, `guidance` and `seed`.

        Returns:
            uint8 (B, H, W, 3).

        Raises:
            ValueError: an argument out of range, or images that are not finite.
        """
        return to_pixels(2 * self.pipeline(prompts, **options) - 1)

    def make_task(self, **training: Any) -> Any:
        """Raises ValueError: these models are not trained or evaluated yet."""
        raise ValueError(
            f"task: expected classification or generation, got {self.task_name}: draw images and score them"
        )

    def model_inputs(self, batch_size: int) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Returns latents (B, h, w, 4), timesteps (B,) and embeddings (B, T, D); for SDXL pooled text and sizes."""
        parts = self.pipeline.parts
        unet, side = parts.unet, parts.sample_size
        shapes: list[tuple[int, ...]] = [(side, side, unet.in_channels), ()]
        shapes += [(parts.tokenizers[0].length, unet.context_width)]
        shapes += [] if unet.text_width is None else [(unet.text_width,), (6,)]
        return tuple(jax.ShapeDtypeStruct((batch_size, *shape), jnp.float32) for shape in shapes)

    def preprocess(self, images: Picture | Sequence[Picture]) -> jax.Array:
        """Returns images as the argument `image` of the pipeline takes them, (B, S, S, 3) float32, 0 to 1."""
        return jnp.asarray(self.pictures(images), jnp.float32) / 255

    def computation(self) -> dict[str, Any]:
        """Returns mixer, alignment and chunk."""
        return {f"model.{key}": value for key, value in self.description["model"]["options"].items()}

    @classmethod
    def summary(cls, numbers: Mapping[str, float]) -> list[str]:
        """Returns a line for each number."""
        return [f"{name}: {value:.4f}" for name, value in numbers.items()]
