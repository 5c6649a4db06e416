"""Draws images from a generator: samplers by name, guidance, decoding of latents, and archives of many images."""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx
from tqdm import tqdm

from gspn_jax.batching import batched
from gspn_jax.diffusion import Interpolant, SampleNoise, guided, interpolant_samplers, samplers
from gspn_jax.evaluation.image_archive import Store, to_pixels
from gspn_jax.training.checkpoints.fingerprint import sha256_of_arrays
from gspn_jax.training.sharding import local_mesh, pad_rows, place_batch, replicate
from gspn_jax.training.state import Parameters
from gspn_jax.training.tasks.generation import Generation
from gspn_jax.weights.loading import load_autoencoder

NOISE_SAMPLERS = ("ddpm", "ddim", "euler", "dpm_solver")  # for the objective "ddpm"
VELOCITY_SAMPLERS = ("heun", "euler", "sde")  # for interpolants

_DECODED = 8  # latents decoded at a time on each device


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Settings of sampling.

    Attributes:
        sampler: "ddpm", "ddim", "euler" or "dpm_solver"; for an interpolant "heun", "euler" or "sde". "" takes the
            first of these.
        num_steps: steps of the sampler; 0 takes 250, or 25 for Heun's method.
        guidance: scale of classifier-free guidance; 1 switches it off.
        interval: first and last time, in the network's units, at which guidance acts; None for always.
        guided_channels: guides only the first `guided_channels` channels; None guides all.
        seed: seed of the noise, 0 to 2**31 - 1.
    """

    sampler: str = ""
    num_steps: int = 0
    guidance: float = 1.0
    interval: tuple[float, float] | None = None
    guided_channels: int | None = None
    seed: int = 0

    def resolved(self, task: Generation, channels: int | None = None) -> "Sampling":
        """Returns these settings with a task's defaults filled in.

        Args:
            task: the generator's task.
            channels: channels of the drawn pixels or latents, the most that `guided_channels` may be; None skips the
                check.

        Raises:
            ValueError: a sampler for another objective, or a number out of range.
        """
        is_velocity = isinstance(task.objective, Interpolant)
        known = VELOCITY_SAMPLERS if is_velocity else NOISE_SAMPLERS
        sampler = self.sampler or known[0]
        if sampler not in known:
            raise ValueError(f"sampler: expected one of {', '.join(known)}; got {sampler!r}")
        num_steps = self.num_steps or (25 if sampler == "heun" else 250)
        least = 2 if sampler == "ddpm" else 1
        most = math.inf if isinstance(task.objective, Interpolant) else task.objective.num_steps
        if not least <= num_steps <= most:
            expected = f"at least {least}" if is_velocity else f"{least} to {most}"
            raise ValueError(f"num_steps: expected {expected}, or 0 for the sampler's own, got {num_steps}")
        if not math.isfinite(self.guidance):
            raise ValueError(f"guidance: expected a finite number, got {self.guidance}")
        if self.interval is not None and not self.interval[0] <= self.interval[1]:
            raise ValueError(f"interval: expected a smaller and a larger time, got {self.interval}")
        if self.guided_channels is not None and not 1 <= self.guided_channels <= (channels or math.inf):
            expected = f"1 to {channels}" if channels else "at least 1"
            raise ValueError(f"guided_channels: expected {expected}, got {self.guided_channels}")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed: expected 0 to 2**31 - 1, got {self.seed}")
        return dataclasses.replace(self, sampler=sampler, num_steps=num_steps)


def draw(
    task: Generation,
    params: Parameters,
    labels: jax.Array,
    samples: jax.Array,
    sampling: Sampling,
    *,
    shape: tuple[int, ...],
    clip: float | None = None,
    progress: samplers.Progress | None = None,
) -> jax.Array:
    """Draws samples, (B, *shape) float32 on the network's scale. Traceable.

    Args:
        task: the generator's task.
        params: nested dict of arrays.
        labels, samples: (B,) integers, the classes and the numbers of the samples.
        sampling: settings.
        shape: (H, W, C) of a sample.
        clip: bound of the absolute value of the data that "ddpm" and "ddim" predict; None for no bound.
        progress: called on the host after each step.

    Raises:
        ValueError: see `Sampling.resolved`.
    """
    chosen, noise = sampling.resolved(task, shape[-1]), SampleNoise(sampling.seed, samples)
    denoiser = guided(
        functools.partial(task.denoise, params), labels, scale=chosen.guidance, no_class=task.num_classes,
        interval=chosen.interval, channels=chosen.guided_channels,
    )  # fmt: skip
    start = noise.draw(0, shape)
    if isinstance(task.objective, Interpolant):
        if chosen.sampler == "sde":
            options: Any = dict(interpolant=task.objective, progress=progress)
            return interpolant_samplers.sde(denoiser, start, chosen.num_steps, noise, **options)
        run = interpolant_samplers.heun if chosen.sampler == "heun" else interpolant_samplers.euler
        return run(denoiser, start, chosen.num_steps, progress=progress)
    if chosen.sampler == "ddpm":
        process = task.objective.respaced(chosen.num_steps)
        return samplers.ddpm(denoiser, start, process, noise, clip=clip, progress=progress)
    visited = samplers.steps(task.objective, chosen.num_steps)
    if chosen.sampler == "ddim":
        return samplers.ddim(denoiser, start, visited, clip=clip, progress=progress)
    run = samplers.euler if chosen.sampler == "euler" else samplers.dpm_solver
    return run(denoiser, start, visited, progress=progress)


class ImageSampler:
    """Draws images on the devices of this process. An image depends on the seed and its number only.

    Args:
        task: the generator's task.
        params: nested dict of host arrays.
        description: the run's `gspn_jax.runs.RunDescription`.
        sampling: settings; None takes the defaults, without guidance.
        image_size: (H, W) of the images in pixels; None takes the size of training.
        autoencoder: file of the autoencoder; required if the network denoises latents.
        norm_groups: groups of the autoencoder's norms.

    Attributes:
        sampling: settings with the task's defaults filled in.
        shape: (H, W, 3) of the images.
        settings: JSON that defines the images: equal settings make equal images.
        bar: a progress bar that each step of the sampler advances; None for none.

    Raises:
        ValueError: an argument out of range, or an autoencoder that does not fit the network.
        OSError: the autoencoder's file cannot be read.
    """

    def __init__(
        self,
        task: Generation,
        params: Parameters,
        description: Any,
        sampling: Sampling | None = None,
        *,
        image_size: tuple[int, int] | None = None,
        autoencoder: str = "",
        norm_groups: int = 32,
    ):
        self.task, self.num_classes = task, description["num_classes"]
        space, side = description["input"], description["data"]["image_size"]
        height, width = image_size or (side, side)
        self._mesh = local_mesh()
        self._decode, factor, digest = None, 1, None
        if "scale" in space:
            self._decode, factor, digest = self._decoder(autoencoder, norm_groups, space, side)
        elif autoencoder:
            raise ValueError(f"autoencoder: expected none, since this network draws pixels; got {autoencoder}")
        if height < factor or width < factor or height % factor or width % factor:
            raise ValueError(f"image_size: expected multiples of {factor}, got {height}, {width}")
        self.shape = (height, width, 3)
        self._drawn = (height // factor, width // factor, space["shape"][-1])
        self.sampling = (sampling or Sampling()).resolved(task, self._drawn[-1])
        self._check_size(params)
        self._params = replicate(params, self._mesh)
        self._compiled = jax.jit(self._draw)
        self.bar: tqdm | None = None
        self.settings: dict[str, Any] = {
            "parameters": sha256_of_arrays(params),
            "model": description["model"],
            "objective": description["objective"],
            **dataclasses.asdict(self.sampling),
            "image_size": [height, width],
            "autoencoder": digest,
        }

    def images(self, labels: np.ndarray, samples: np.ndarray, *, rows: int | None = None) -> np.ndarray:
        """Draws images.

        Args:
            labels: (B,) integers in 0..num_classes - 1.
            samples: (B,) integers, the numbers of the images.
            rows: batch size after padding; batches padded to the same size share one compiled program.

        Returns:
            uint8 (B, H, W, 3).

        Raises:
            ValueError: a label out of range, or an image with NaN or Inf.
        """
        labels, samples = np.asarray(labels), np.asarray(samples)
        if labels.ndim != 1 or labels.dtype.kind not in "iu" or labels.shape != samples.shape:
            raise ValueError(f"labels: expected integers ({len(samples)},), got {labels.dtype} {labels.shape}")
        wrong = labels[(labels < 0) | (labels >= self.num_classes)]
        if len(wrong):
            raise ValueError(f"labels: expected labels in 0..{self.num_classes - 1}, got {wrong[0]}")
        rows = -(-(rows or len(samples)) // self._mesh.size) * self._mesh.size
        batch = pad_rows({"labels": labels.astype(np.int32), "samples": samples.astype(np.int32)}, rows)
        with jax.set_mesh(self._mesh):
            placed = place_batch(batch, self._mesh)
            drawn = np.asarray(self._compiled(self._params, placed["labels"], placed["samples"]))[: len(samples)]
        return to_pixels(drawn if self._decode is None else self._decode(drawn))

    def _decoder(self, autoencoder: str, norm_groups: int, space: Any, side: int) -> tuple[Any, int, str]:
        """Returns latents (B, h, w, C) -> images (B, H, W, 3) float32, the autoencoder's factor, and its SHA-256."""
        if not autoencoder:
            raise ValueError("autoencoder: expected a file of weights, since this network draws latents; got none")
        model, digest = load_autoencoder(autoencoder, norm_groups=norm_groups)
        graph, state = nnx.split(model)
        given, trained = model.latent_channels, space["shape"]
        if given != trained[-1] or side != trained[0] * model.factor:
            raise ValueError(
                f"autoencoder: expected one that makes {trained} of {side} pixels, as this network was trained, "
                f"got one of {given} channels and {model.factor} pixels a latent: {autoencoder}"
            )
        if space["autoencoder"] not in ("", digest):
            logging.warning("the latents of training were made by another file than %s", autoencoder)

        def decode(state: Any, latents: jax.Array) -> jax.Array:
            return nnx.merge(graph, state).decode(latents / space["scale"])

        return batched(decode, jax.device_get(state), _DECODED * self._mesh.size), model.factor, digest

    def _check_size(self, params: Parameters) -> None:
        """Raises ValueError, before drawing, for an image size that the network does not take."""
        number = jax.ShapeDtypeStruct((1,), jnp.int32)
        try:
            maps = jax.ShapeDtypeStruct((1, *self._drawn), jnp.float32)
            jax.eval_shape(self.task.denoise, params, maps, number, number)
        except ValueError as error:
            raise ValueError(f"image_size: {self.shape[0]}, {self.shape[1]}: {error}") from error

    def _draw(self, params: Parameters, labels: jax.Array, samples: jax.Array) -> jax.Array:
        clip = 1.0 if self._decode is None else None  # latents have no bounds
        return draw(
            self.task, params, labels, samples, self.sampling, shape=self._drawn, clip=clip, progress=self._advance
        )

    def _advance(self) -> None:
        if self.bar is not None:
            self.bar.update()


def draw_batches(
    sampler: ImageSampler, labels: np.ndarray, starts: Sequence[int], batch_size: int
) -> Iterator[tuple[int, np.ndarray]]:
    """Draws the batches that begin at `starts`, with a progress bar over all steps.

    Args:
        sampler: draws the images.
        labels: (N,) labels of all images.
        starts: numbers of the batches' first images.
        batch_size: images in a batch; the last may have fewer.

    Yields:
        The number of a batch's first image, and uint8 (b, H, W, 3).
    """
    with tqdm(total=len(starts) * sampler.sampling.num_steps, unit="step", disable=not starts) as sampler.bar:
        for start in starts:
            part = labels[start : start + batch_size]
            yield start, sampler.images(part, np.arange(start, start + len(part)), rows=batch_size)
        jax.effects_barrier()
    sampler.bar = None


def draw_archive(
    sampler: ImageSampler, labels: np.ndarray, path: str, *, batch_size: int = 100, **settings: Any
) -> Store:
    """Draws images into an .npz file: `arr_0` uint8 (N, H, W, 3) and `arr_1` int32 (N,), their labels.

    The call resumes interrupted work, and several processes share it. A .json file beside the .npz file records the
    settings.

    Args:
        sampler: draws the images.
        labels: (N,) labels of all images.
        path: FILE.npz.
        batch_size: images at a time.
        settings: further JSON values to record.

    Returns:
        The finished archive; `first(count)` reads images from it.

    Raises:
        ValueError: the file, or batches for it, were made with other settings.
        FolderInUse: another run writes the same file.
    """
    recorded = sampler.settings | {"count": len(labels), "batch_size": batch_size} | settings
    with Store(path, recorded) as store:
        if not store.is_complete():
            for start, images in draw_batches(sampler, labels, store.missing(), batch_size):
                store.write(start, images, labels[start : start + len(images)])
            store.assemble()
    return store
