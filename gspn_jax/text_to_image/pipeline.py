"""Text-to-image generation: prompts to images with Stable Diffusion 1.5, SDXL and their kin."""

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from gspn_jax.batching import batched
from gspn_jax.diffusion import SampleNoise, guided, schedulers
from gspn_jax.text_to_image import arguments
from gspn_jax.text_to_image.conditioning import Condition, TextEncoders
from gspn_jax.text_to_image.loading import load_parts
from gspn_jax.text_to_image.parts import Parts
from gspn_jax.training.checkpoints.fingerprint import sha256_of_arrays
from gspn_jax.training.sharding import local_mesh, pad_rows, tree_shardings

SAMPLERS = ("pndm", "ddim", "euler", "dpmpp", "deis")
OUTPUTS = ("image", "latents")

_ENCODING = 2**30  # the step under which the noise of image encodings is drawn; samplers use the steps below


@dataclasses.dataclass(frozen=True)
class Drawing:
    """What defines the sampling loop of a batch, and with the shapes its compiled program."""

    sampler: str
    num_steps: int
    strength: float | None
    is_guided: bool


class TextToImage:
    """Draws images of prompts on the devices of this process.

        pipeline = gspn_jax.TextToImage.load("stable-diffusion-v1-5")
        images = pipeline("a photo of a cat", num_steps=25)  # (1, 512, 512, 3) float32, 0 to 1

    An image depends on the seed and its number, not on its batch or the number of devices.

    Args:
        parts: networks, tokenizers and settings; `TextToImage.load` reads them.
        fsdp: shards the UNet's large matrices over the devices instead of giving each device a copy.

    Attributes:
        parts: see the arguments.
        size: default (height, width) of images, in pixels.
    """

    def __init__(self, parts: Parts, *, fsdp: bool = False):
        self.parts = parts
        side = parts.sample_size * parts.autoencoder.factor
        self.size = (side, side)
        self._mesh = local_mesh()
        self._texts = TextEncoders(parts)
        self._graph, state = nnx.split(parts.unet)
        self._state = jax.device_put(state, tree_shardings(state, self._mesh, fsdp=fsdp))
        nnx.update(parts.unet, self._state)  # frees the copy that was loaded
        self._compiled = jax.jit(self._draw, static_argnames="drawing")
        self._bar: tqdm | None = None

    @classmethod
    def load(
        cls,
        source: str | os.PathLike[str],
        *,
        mixer: str | None = None,
        replacements: str | os.PathLike[str] | Mapping[str, Any] | None = None,
        alignment: str | None = None,
        chunk: int | None = 4,
        dtype: Any = jnp.float32,
        config: str | os.PathLike[str] | None = None,
        fsdp: bool = False,
        initial: str = "teacher",
        **options: Any,
    ) -> Self:
        """Loads a model.

        Args:
            source: a folder in the layout of diffusers (model_index.json, unet/, vae/, ...), a single file with the
                names of the original programs, a workdir of `experiments.convert`, or hf://owner/name of such a folder
                on the Hugging Face Hub.
            mixer: what takes the place of self-attention: "attention" (as published), "gspn", "linfusion", "mamba" or
                "mamba2". None: "attention", or what the workdir holds.
            replacements: released parameters of the mixers: a file, a folder with one, or arrays by name. Without them,
                the mixers are new; their initial values come from the attention that they replace.
            alignment: of GSPN, "aligned" or "unturned"; None takes "unturned" for released parameters, else "aligned".
            chunk: lines after which GSPN's scans restart; None: never.
            dtype: of parameters and computation: float32, bfloat16, float16 or float64. The autoencoder of a float16
                model is float32.
            config: single files only: a folder with the configurations and tokenizers, in the layout of diffusers. None
                takes those of Stable Diffusion 1.5 and SDXL, and fetches the tokenizers from the hub.
            fsdp: see the class.
            initial: of new mixers: "teacher" takes layers over from the attention, "random" takes none.
            options: further options of the mixers, such as `proxy_rank`.

        Raises:
            ValueError: names the argument, file, key or parameter at fault.
        """
        parts = load_parts(
            source, mixer=mixer, replacements=replacements, alignment=alignment, chunk=chunk, dtype=dtype,
            config=config, options=options, initial=initial,
        )  # fmt: skip
        return cls(parts, fsdp=fsdp)

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] | None = None,
        num_steps: int = 50,
        guidance: float | None = None,
        sampler: str | None = None,
        seed: int = 0,
        noise: np.ndarray | jax.Array | None = None,
        height: int | None = None,
        width: int | None = None,
        image: np.ndarray | jax.Array | None = None,
        strength: float | None = None,
        num_images: int = 1,
        output: str = "image",
        original_size: tuple[int, int] | None = None,
        target_size: tuple[int, int] | None = None,
        crop: tuple[int, int] | None = None,
        numbers: Sequence[int] | np.ndarray | None = None,
        batch_size: int | None = None,
        progress: bool = True,
    ) -> np.ndarray:
        """Draws images.

        Args:
            prompt: one prompt or several.
            negative_prompt: what guidance leads away from: one for all prompts, or one for each. None: the empty
                prompt, or zeros where the model was trained so (SDXL).
            num_steps: steps of the sampler.
            guidance: scale of classifier-free guidance; 1 switches it off and runs the UNet once a step. None: 7.5, or
                5 for SDXL.
            sampler: "pndm", "ddim", "euler", "dpmpp" or "deis"; None takes the model's own.
            seed: of the noise, 0 to 2**31 - 1.
            noise: standard normal, (B, height / 8, width / 8, 4) for the B images; None draws it from the seed.
            height, width: of the images in pixels, multiples of 8. None: those of `image` or `noise`, else as trained.
            image: starts from images instead of noise (SDEdit): (H, W, 3) or (B, H, W, 3), floats 0 to 1; or their
                latents (B, H / 8, W / 8, 4) as the UNet sees them.
            strength: with `image`: share of the steps that run, above 0 and at most 1; None: 0.8.
            num_images: images of each prompt, one after another.
            output: "image", or "latents" as the UNet sees them.
            original_size, target_size, crop: SDXL's micro-conditioning: (height, width) of the training image before
                and after its crop, and the crop's (top, left). None: the size of the images, and no crop.
            numbers: (B,) whole numbers, which with the seed determine the noise of each image; None: 0, 1, ...
            batch_size: images at a time; None: all.
            progress: shows a progress bar.

        Returns:
            float32 (B, height, width, 3), 0 to 1; or latents (B, height / 8, width / 8, 4).

        Raises:
            ValueError: an argument out of range, or images that are not finite.
        """
        prompts, negatives = arguments.prompts(prompt, negative_prompt)
        guidance = self.parts.default_guidance if guidance is None else guidance
        if not isinstance(guidance, Real) or not np.isfinite(guidance):
            raise ValueError(f"guidance: expected a finite number, got {guidance!r}")
        arguments.counts(num_steps=num_steps, num_images=num_images, batch_size=batch_size)
        if output not in OUTPUTS:
            raise ValueError(f"output: expected one of {', '.join(OUTPUTS)}; got {output!r}")
        if not 0 <= seed < 2**31:
            raise ValueError(f"seed: expected 0 to 2**31 - 1, got {seed}")
        count = len(prompts) * num_images
        autoencoder = self.parts.autoencoder
        images = None if image is None else arguments.images(image, count, autoencoder)
        shape = arguments.latent_shape(autoencoder, images, noise, height, width, default=self.size)
        strength = arguments.strength(strength, num_steps, has_image=images is not None)
        drawing = Drawing(self.scheduler(sampler).name, num_steps, strength, guidance != 1)
        noise = None if noise is None else arguments.noise(noise, (count, *shape))
        pixels = (shape[0] * autoencoder.factor, shape[1] * autoencoder.factor)
        takes_sizes = len(self.parts.text_encoders) == 2
        sizes = arguments.sizes(pixels, original_size, crop, target_size, is_used=takes_sizes)
        arguments.warn_of_cut([*prompts, *(negatives or [])], self.parts.tokenizers[0])

        numbers = np.arange(count) if numbers is None else np.asarray(numbers)
        if numbers.shape != (count,) or numbers.dtype.kind not in "iu":
            raise ValueError(f"numbers: expected {count} whole numbers, got {numbers.dtype} {numbers.shape}")
        rows = count if batch_size is None else min(batch_size, count)
        calls = len(self.scheduler(drawing.sampler).steps(num_steps, drawing.strength).timesteps)
        found = []
        with tqdm(total=calls * -(-count // rows), unit="step", disable=not progress) as self._bar:
            for start in range(0, count, rows):
                part = np.minimum(np.arange(start, start + rows), count - 1)  # all batches share one compiled program
                of_prompt = part // num_images
                latents = self._latents(
                    [prompts[n] for n in of_prompt],
                    None if negatives is None else [negatives[n] for n in of_prompt],
                    drawing, guidance, seed, numbers[part], shape, sizes,
                    noise=None if noise is None else noise[part],
                    image=None if images is None else images[part],
                )  # fmt: skip
                latents = latents[: count - start]
                found.append(latents if output == "latents" else self.decode(latents))
            jax.effects_barrier()
        self._bar = None
        return np.concatenate(found)

    def encode(self, prompt: str | Sequence[str]) -> tuple[np.ndarray, np.ndarray | None]:
        """Returns what the UNet sees of prompts: embeddings (B, T, D), and for SDXL the pooled vectors (B, P)."""
        return self._texts.encode(arguments.prompts(prompt)[0])

    def encode_image(
        self, image: np.ndarray | jax.Array, *, seed: int = 0, numbers: Sequence[int] | np.ndarray | None = None
    ) -> np.ndarray:
        """Returns latents (B, H / 8, W / 8, 4), as the UNet sees them, drawn from the autoencoder's distribution.

        Args:
            image: (B, H, W, 3), floats 0 to 1; H and W are multiples of 8.
            seed, numbers: of the noise, as in a call.
        """
        mean, log_variance = self._encode(np.asarray(image, np.float32))
        numbers = np.arange(len(mean)) if numbers is None else np.asarray(numbers)
        noise = SampleNoise(seed, jnp.asarray(numbers)).draw(_ENCODING, mean.shape[1:])
        return (mean + np.exp(log_variance / 2) * np.asarray(noise)) * self.parts.latent_scale

    def decode(self, latents: np.ndarray | jax.Array) -> np.ndarray:
        """Returns images (B, H, W, 3) float32, 0 to 1, of latents as the UNet sees them, (B, h, w, 4).

        Raises:
            ValueError: an image with NaN or Inf.
        """
        return arguments.finite("images", self._decode(np.asarray(latents)))

    def scheduler(self, sampler: str | None = None) -> schedulers.Scheduler:
        """Returns the schedule of a sampler by the model's settings; ValueError for an unknown name."""
        if sampler is not None and sampler not in SAMPLERS:
            raise ValueError(f"sampler: expected one of {', '.join(SAMPLERS)}; got {sampler!r}")
        return self._scheduler(sampler)

    def settings(
        self,
        *,
        guidance: float | None = None,
        sampler: str | None = None,
        height: int | None = None,
        width: int | None = None,
        **call: Any,
    ) -> dict[str, Any]:
        """Returns what defines the images of a call as JSON values: the networks' hash, mixer, dtype and arguments."""
        return {
            "parameters": self._hash,
            "mixer": {"name": self.parts.mixer, **self.parts.mixer_options},
            "scheduler": dict(self.parts.scheduler),
            "latent_scale": self.parts.latent_scale,
            "dtype": self.parts.unet.dtype.name,
            "sampler": self.scheduler(sampler).name,
            "guidance": self.parts.default_guidance if guidance is None else guidance,
            "size": [self.size[0] if height is None else height, self.size[1] if width is None else width],
            **call,
        }

    @functools.cached_property
    def _hash(self) -> str:
        networks = [self.parts.unet, self.parts.autoencoder, *self.parts.text_encoders]
        return sha256_of_arrays([jax.device_get(nnx.state(network)) for network in networks])

    @functools.cache  # noqa: B019, a pipeline lives as long as its process
    def _scheduler(self, sampler: str | None) -> schedulers.Scheduler:
        return schedulers.from_config(self.parts.scheduler, sampler)

    @functools.cached_property
    def _decode(self) -> Any:
        graph, state = nnx.split(self.parts.autoencoder)

        def decode(state: Any, latents: jax.Array) -> jax.Array:
            images = nnx.merge(graph, state).decode(latents / self.parts.latent_scale)
            return jnp.clip(images / 2 + 0.5, 0, 1)  # NaN stays NaN

        return batched(decode, jax.device_get(state), self._mesh.size)

    @functools.cached_property
    def _encode(self) -> Any:
        graph, state = nnx.split(self.parts.autoencoder)

        def encode(state: Any, images: jax.Array) -> tuple[jax.Array, jax.Array]:
            return nnx.merge(graph, state).encode(2 * images - 1)

        return batched(encode, jax.device_get(state), self._mesh.size)

    def _latents(
        self,
        prompts: Sequence[str],
        negatives: Sequence[str] | None,
        drawing: Drawing,
        guidance: float,
        seed: int,
        numbers: np.ndarray,
        shape: tuple[int, int, int],
        sizes: tuple[int, ...],
        *,
        noise: np.ndarray | None,
        image: np.ndarray | None,
    ) -> np.ndarray:
        """Draws the latents of one batch."""
        condition = self._texts.condition(prompts, sizes)
        negative = self._texts.negative(condition, negatives, sizes) if drawing.is_guided else condition
        if noise is None:
            noise = np.asarray(SampleNoise(seed, jnp.asarray(numbers)).draw(0, shape))
        given: dict[str, Any] = {"condition": condition, "negative": negative, "noise": noise.astype(np.float32)}
        if image is not None:
            is_latents = image.shape[-1] == shape[-1]
            given["start"] = image if is_latents else self.encode_image(image, seed=seed, numbers=numbers)
        # One device's share is whole: half an image where guidance doubles the batch.
        rows, doubled = len(numbers), 1 + drawing.is_guided
        rows += next(n for n in range(self._mesh.size) if (rows + n) * doubled % self._mesh.size == 0)
        given = jax.tree.map(lambda array: jax.device_put(array, self._sharding(rows)), pad_rows(given, rows))
        with jax.set_mesh(self._mesh):
            latents = self._compiled(self._state, given, jnp.float32(guidance), drawing=drawing)
        return arguments.finite("latents", np.asarray(latents)[: len(numbers)])

    def _sharding(self, rows: int) -> NamedSharding:
        return NamedSharding(self._mesh, P("data") if rows % self._mesh.size == 0 else P())

    def _draw(self, state: Any, given: Mapping[str, Any], guidance: jax.Array, *, drawing: Drawing) -> jax.Array:
        unet = nnx.merge(self._graph, state)
        scheduler = self.scheduler(drawing.sampler)
        steps = scheduler.steps(drawing.num_steps, drawing.strength)

        def predict(x: jax.Array, timestep: jax.Array, condition: Condition) -> jax.Array:
            x, condition = jax.lax.with_sharding_constraint((x, condition), self._sharding(len(x)))
            return unet(x, timestep, **condition).astype(jnp.float32)

        scale = guidance if drawing.is_guided else 1
        denoiser = guided(predict, given["condition"], scale=scale, no_class=given["negative"])
        if "start" in given:
            x = scheduler.noised(given["start"], given["noise"], steps)
        else:
            x = scheduler.started(given["noise"], steps)
        return scheduler.sample(denoiser, x, steps, progress=self._advance)

    def _advance(self) -> None:
        if self._bar is not None:
            self._bar.update()
