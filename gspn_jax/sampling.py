"""Drawing images from a generator: samplers by name, guidance, latents to pixels, and files of many images."""

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

from gspn_jax.diffusion import Interpolant, SampleNoise, guided, interpolant_samplers, samplers
from gspn_jax.evaluation.image_archive import Store
from gspn_jax.training.checkpoints.fingerprint import sha256_of_arrays
from gspn_jax.training.sharding import local_mesh, pad_rows, place_batch, replicate
from gspn_jax.training.state import Parameters
from gspn_jax.training.tasks.generation import Generation
from gspn_jax.weights.loading import load_autoencoder

NOISE_SAMPLERS = ("ddpm", "ddim", "euler", "dpm_solver")  # of objective "ddpm"
VELOCITY_SAMPLERS = ("heun", "euler", "sde")  # of interpolants

_DECODED = 8  # latents that a device decodes at a time


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How images are drawn.

    Attributes:
        sampler: "ddpm", "ddim", "euler" or "dpm_solver"; of an interpolant "heun", "euler" or "sde"; "" for the first.
        num_steps: 0 for 250, or 25 of Heun's method.
        guidance: scale of classifier-free guidance; 1 for none.
        interval: times, as the network gets them, between which guidance acts; None for always.
        guided_channels: guides the first channels only; None for all.
        seed: of the noise.
    """

    sampler: str = ""
    num_steps: int = 0
    guidance: float = 1.0
    interval: tuple[float, float] | None = None
    guided_channels: int | None = None
    seed: int = 0

    def resolved(self, task: Generation, channels: int | None = None) -> "Sampling":
        """Returns the sampling with the defaults of a task filled in.

        Args:
            task: of the generator.
            channels: of what it draws.

        Raises:
            ValueError: a sampler that the task's objective does not have, or numbers out of range.
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
        task: of the generator.
        params: nested dict.
        labels, samples: (B,) integers, the classes and the numbers of the samples.
        sampling: how they are drawn.
        shape: (H, W, C) of a sample.
        clip: bound of the data that ancestral sampling and DDIM predict.
        progress: called after each step.
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
        task: of the generator.
        params: nested dict of host arrays.
        description: of the run, a `gspn_jax.runs.RunDescription`.
        sampling: how; by default without guidance.
        image_size: (H, W) of the images; by default as in training.
        autoencoder: file of the autoencoder, where the network denoises latents.
        norm_groups: groups of the autoencoder's norms.

    Attributes:
        sampling: with the task's defaults filled in.
        shape: (H, W, 3) of the images.
        settings: JSON that says how the images are made; equal settings make equal images.
        bar: a progress bar to advance with each step of the sampler.

    Raises:
        ValueError, OSError: in one line, what is wrong.
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
            rows: batch size to pad to, so that batches of any size share one compiled program.

        Returns:
            uint8 (B, H, W, 3).

        Raises:
            ValueError: a label out of range, or a drawn image that is not finite.
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
            drawn, finite = jax.device_get(self._compiled(self._params, placed["labels"], placed["samples"]))
            if self._decode is not None and finite.all():
                drawn, finite = self._decoded(drawn)
        if not finite.all():
            broken = batch["samples"][~finite][0]
            raise ValueError(f"parameters: expected finite images, got NaN or Inf in image {broken}")
        return drawn[: len(samples)]

    def _decoder(self, autoencoder: str, norm_groups: int, space: Any, side: int) -> tuple[Any, int, str]:
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
        decode = jax.jit(lambda state, latents: _pixels(nnx.merge(graph, state).decode(latents / space["scale"])))
        return functools.partial(decode, replicate(jax.device_get(state), self._mesh)), model.factor, digest

    def _check_size(self, params: Parameters) -> None:
        """Raises ValueError for maps that the network does not take, before anything is drawn."""
        number = jax.ShapeDtypeStruct((1,), jnp.int32)
        try:
            maps = jax.ShapeDtypeStruct((1, *self._drawn), jnp.float32)
            jax.eval_shape(self.task.denoise, params, maps, number, number)
        except ValueError as error:
            raise ValueError(f"image_size: {self.shape[0]}, {self.shape[1]}: {error}") from error

    def _draw(self, params: Parameters, labels: jax.Array, samples: jax.Array) -> tuple[jax.Array, jax.Array]:
        is_pixels = self._decode is None
        x = draw(
            self.task, params, labels, samples, self.sampling, shape=self._drawn, clip=1.0 if is_pixels else None,
            progress=self._advance,
        )  # fmt: skip
        return _pixels(x) if is_pixels else (x, _finite(x))

    def _decoded(self, latents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        assert self._decode is not None
        size, parts = _DECODED * self._mesh.size, []
        for start in range(0, len(latents), size):
            part = pad_rows(latents[start : start + size], size)
            parts.append(jax.device_get(self._decode(place_batch({"latents": part}, self._mesh)["latents"])))
        images, finite = (np.concatenate(arrays)[: len(latents)] for arrays in zip(*parts, strict=True))
        return images, finite

    def _advance(self) -> None:
        if self.bar is not None:
            self.bar.update()


def _finite(x: jax.Array) -> jax.Array:
    return jnp.isfinite(x).reshape(len(x), -1).all(axis=1)


def _pixels(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(B, H, W, 3) on -1..1 to uint8, and (B,) whether an image is finite."""
    return jnp.clip(jnp.round((x + 1) * 127.5), 0, 255).astype(jnp.uint8), _finite(x)


def draw_batches(
    sampler: ImageSampler, labels: np.ndarray, starts: Sequence[int], batch_size: int
) -> Iterator[tuple[int, np.ndarray]]:
    """Draws the batches that begin at `starts`, with a progress bar over all steps.

    Args:
        sampler: what draws.
        labels: (N,) the label of every image.
        starts: numbers of the first images of the batches.
        batch_size: images of a batch; the last may have fewer.

    Yields:
        The number of the first image, and uint8 (b, H, W, 3).
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
    """Draws images into an .npz file: `arr_0` uint8 (N, H, W, 3) and `arr_1` their labels; goes on where it stopped.

    Several processes share the work. Beside it stands a .json file with the settings.

    Args:
        sampler: what draws.
        labels: (N,) the label of every image.
        path: the file.
        batch_size: images at a time.
        settings: further JSON to record.

    Returns:
        The finished file; `first(count)` reads images from it.

    Raises:
        ValueError: the file, or batches for it, were made with other settings.
        FolderInUse: another run draws into the same file.
    """
    recorded = sampler.settings | {"count": len(labels), "batch_size": batch_size} | settings
    with Store(path, recorded) as store:
        if not store.is_complete():
            for start, images in draw_batches(sampler, labels, store.missing(), batch_size):
                store.write(start, images, labels[start : start + len(images)])
            store.assemble()
    return store
