"""Samples images of a trained or converted generator.

    python -m experiments.sample --workdir=runs/digits_generator --output=samples.png
    python -m experiments.sample --workdir=... --classes=3,7 --count=64 --guidance=1.5 --sampler=ddim --steps=50
    python -m experiments.sample --workdir=runs/gspn_xl2 --autoencoder=vae.safetensors --count=50000 --npz=samples.npz

Writes a grid as PNG and, with --npz, all images as `arr_0` uint8 (N, H, W, 3) and their labels as `arr_1`, as the
reference evaluator of FID takes them, and beside it samples.json: how they were made. Batches are kept in a folder
until all are there: the same command goes on where it was interrupted, and several processes share the work. An image
depends on the seed and its number alone, not on the batch, the process or the device that it is drawn in.
"""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags, logging
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from PIL import Image
from tqdm import tqdm

from experiments import command_line, generation, image_batches, provenance
from experiments.contact_sheet import contact_sheet
from experiments.encode_latents import load_autoencoder
from experiments.sampling import NOISE_SAMPLERS, VELOCITY_SAMPLERS, Sampling, draw
from gspn_jax.training import load_parameters
from gspn_jax.training.sharding import local_mesh, place_batch, place_tree
from gspn_jax.training.state import Parameters

SHOWN = 100  # images of a grid
DECODED = 8  # latents that a device decodes at a time


class Generator:
    """A generator of a workdir, ready to draw: numbers of samples to images, on the devices of this process.

    Args:
        workdir: of a run, or of converted parameters.
        sampling: how; by default without guidance.
        classes: labels that take turns; all by default.
        image_size: (H, W) of the images; by default as in training.
        autoencoder: safetensors file, where the network denoises latents.
        norm_groups: of the autoencoder's norms.
        step, ema: which parameters.

    Raises:
        ValueError, OSError, CheckpointError: in one line, what is wrong.
    """

    def __init__(
        self,
        workdir: str,
        sampling: Sampling | None = None,
        *,
        classes: Sequence[int] = (),
        image_size: tuple[int, int] | None = None,
        autoencoder: str = "",
        norm_groups: int = 32,
        step: int | None = None,
        ema: bool = True,
    ):
        params, meta = load_parameters(workdir, step, ema=ema)
        if "objective" not in meta:
            raise ValueError(f"workdir: expected a run of generation, got one of another task: {workdir}")
        self.task, self._meta = generation.make_task(meta), meta
        self.sampling = (sampling or Sampling()).of(self.task)
        self.class_names, number = meta["class_names"], meta["num_classes"]
        if not all(0 <= label < number for label in classes):
            raise ValueError(f"classes: expected labels in 0..{number - 1}, got {tuple(classes)}")
        self._turns = np.asarray(classes or range(number), np.int32)
        space, side = meta["input"], meta["data"]["image_size"]
        height, width = image_size or (side, side)
        self._mesh = local_mesh()
        everywhere = NamedSharding(self._mesh, P())
        self._decode, digest = None, None
        if "scale" in space:
            if not autoencoder:
                raise ValueError("autoencoder: expected a safetensors file, since this network draws latents; got none")
            model, digest = load_autoencoder(autoencoder, norm_groups=norm_groups)
            graph, state = nnx.split(model)
            factor = model.factor
            given, trained = model.latent_channels, space["shape"]
            if given != trained[-1] or side != trained[0] * factor:
                raise ValueError(
                    f"autoencoder: expected one that makes {trained} of {side} pixels, as this network was trained, "
                    f"got one of {given} channels and {factor} pixels a latent: {autoencoder}"
                )
            if space["autoencoder"] not in ("", digest):
                logging.warning("the latents of training were made by another file than %s", autoencoder)
            decode = jax.jit(lambda state, latents: _pixels(nnx.merge(graph, state).decode(latents / space["scale"])))
            self._decode = functools.partial(decode, jax.device_put(state, everywhere))
        else:
            factor = 1
        if height < factor or width < factor or height % factor or width % factor:
            raise ValueError(f"image_size: expected multiples of {factor}, got {height}, {width}")
        self.shape = (height, width, 3)
        self._drawn = (height // factor, width // factor, space["shape"][-1])
        self._check_size()
        self._params = place_tree(params, jax.tree.map(lambda _: everywhere, params))
        self._compiled = jax.jit(self._draw)
        self.bar: tqdm | None = None
        self.settings: dict[str, Any] = {
            "workdir": str(workdir),
            "step": meta["step"],
            "ema": meta["ema"],
            "parameters": provenance.sha256_of_arrays(params),
            "model": meta["model"],
            "objective": meta["objective"],
            **dataclasses.asdict(self.sampling),
            "classes": self._turns.tolist(),
            "image_size": [height, width],
            "autoencoder": digest,
        }

    def _check_size(self) -> None:
        """Before anything is drawn: ValueError for maps that the network does not take."""
        model = nnx.eval_shape(lambda: generation.model_builder(self._meta)(nnx.Rngs(0)))
        numbers = jax.ShapeDtypeStruct((1,), jnp.int32)
        maps = jax.ShapeDtypeStruct((1, *self._drawn), jnp.float32)
        try:
            nnx.eval_shape(lambda model, *inputs: model(*inputs), model, maps, numbers, numbers)
        except ValueError as error:
            raise ValueError(f"image_size: {self.shape[0]}, {self.shape[1]}: {error}") from error

    def labels(self, samples: np.ndarray) -> np.ndarray:
        """The label of each sample, int32."""
        return self._turns[samples % len(self._turns)]

    def images(self, samples: np.ndarray) -> np.ndarray:
        """Images uint8 (B, H, W, 3) of the samples with these numbers (B,)."""
        rows = -(-len(samples) // self._mesh.size) * self._mesh.size
        padded = np.pad(samples, (0, rows - len(samples)), mode="edge")
        with jax.set_mesh(self._mesh):
            batch = place_batch({"labels": self.labels(padded), "samples": padded.astype(np.int32)}, self._mesh)
            drawn = np.asarray(self._compiled(self._params, batch["labels"], batch["samples"]))
            if self._decode is not None:
                drawn = self._decoded(drawn)
        return drawn[: len(samples)]

    def _draw(self, params: Parameters, labels: jax.Array, samples: jax.Array) -> jax.Array:
        is_pixels = self._decode is None
        x = draw(
            self.task, params, labels, samples, self.sampling, shape=self._drawn, clip=1.0 if is_pixels else None,
            progress=self._advance,
        )  # fmt: skip
        return _pixels(x) if is_pixels else x

    def _decoded(self, latents: np.ndarray) -> np.ndarray:
        assert self._decode is not None
        size, images = DECODED * self._mesh.size, []
        for start in range(0, len(latents), size):
            part = latents[start : start + size]
            part = np.concatenate([part, np.repeat(part[-1:], size - len(part), axis=0)])  # of one shape: compiled once
            images.append(np.asarray(self._decode(place_batch({"latents": part}, self._mesh)["latents"])))
        return np.concatenate(images)[: len(latents)]

    def _advance(self) -> None:
        if self.bar is not None:
            self.bar.update()


def _pixels(images: jax.Array) -> jax.Array:
    return jnp.clip(jnp.round((images + 1) * 127.5), 0, 255).astype(jnp.uint8)


def run(generator: Generator, *, count: int = SHOWN, batch_size: int = 100, npz: str = "") -> np.ndarray:
    """Draws samples 0 to count - 1; returns the first images, SHOWN at most.

    Args:
        npz: file for all of them and their labels; what is missing of it is drawn. Without one nothing is kept.

    Raises:
        ValueError: a file, or batches for it, of other settings.
    """
    for name, value in (("count", count), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    shown = min(count, SHOWN)
    if not npz:
        if count > SHOWN:
            raise ValueError(f"count: expected at most {SHOWN} without --npz, got {count}")
        starts = range(0, shown, batch_size)
        parts = _drawn(generator, [_numbers(start, batch_size, shown) for start in starts], batch_size)
        return np.concatenate([images for _, images in parts])
    store = image_batches.Store(npz, generator.settings | {"count": count, "batch_size": batch_size})
    if not store.is_complete():
        missing = [_numbers(start, batch_size, count) for start in store.missing(range(0, count, batch_size))]
        for numbers, images in _drawn(generator, missing, batch_size):
            store.write(int(numbers[0]), images, generator.labels(numbers))
        store.assemble(range(0, count, batch_size), generator.shape)
    return store.first(shown)


def _numbers(start: int, batch_size: int, count: int) -> np.ndarray:
    return np.arange(start, min(start + batch_size, count))


def _drawn(generator: Generator, batches: Sequence[np.ndarray], batch_size: int):
    """(numbers, images) of each batch, with a progress bar of all steps."""
    with tqdm(total=len(batches) * generator.sampling.num_steps, unit="step", disable=not batches) as generator.bar:
        for numbers in batches:
            whole = np.pad(numbers, (0, batch_size - len(numbers)), mode="edge")  # of one shape: compiled once
            yield numbers, generator.images(whole)[: len(numbers)]
        jax.effects_barrier()
    generator.bar = None


def define_flags() -> None:
    flags.DEFINE_string("workdir", None, "Folder of the run, or of converted parameters.", required=True)
    flags.DEFINE_string("output", "samples.png", "The grid to write.")
    flags.DEFINE_string("npz", "", "File for all images and labels.")
    flags.DEFINE_list("classes", [], "Labels that take turns; by default all.")
    flags.DEFINE_integer("count", SHOWN, f"Images; more than {SHOWN} go into --npz alone.")
    flags.DEFINE_string("sampler", "", f"{', '.join(NOISE_SAMPLERS)}; of interpolants {', '.join(VELOCITY_SAMPLERS)}.")
    flags.DEFINE_integer("steps", 0, "Of the sampler; 0: 250, or 25 of Heun's method.")
    flags.DEFINE_float("guidance", 1.0, "Scale of classifier-free guidance; 1 for none.")
    flags.DEFINE_list("interval", [], "FROM,TO: times between which guidance acts; by default always.")
    flags.DEFINE_integer("guided_channels", None, "Guides the first channels alone; 3 as DiT's program does.")
    flags.DEFINE_list("image_size", [], "SIDE or HEIGHT,WIDTH in pixels; by default as in training.")
    flags.DEFINE_string("autoencoder", "", "Safetensors file of the autoencoder that decodes latents.")
    flags.DEFINE_integer("norm_groups", 32, "Groups of its norms.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Of the noise.")
    flags.DEFINE_integer("batch_size", 100, "Images at a time, on the devices of a process.")
    flags.DEFINE_integer("step", None, "Checkpoint; by default the newest good one.")
    flags.DEFINE_bool("ema", True, "The moving average of the parameters.")


def _interval(words: Sequence[str]) -> tuple[float, float] | None:
    if not words:
        return None
    try:
        start, end = map(float, words)
    except ValueError as error:
        raise ValueError(f"interval: expected FROM,TO, got {','.join(words)}") from error
    return start, end


def main(argv: Sequence[str]) -> None:
    if argv:
        raise ValueError(f"expected flags only, got {' '.join(argv)}")
    chosen = flags.FLAGS
    if len(chosen.image_size) > 2:
        raise ValueError(f"image_size: expected SIDE or HEIGHT,WIDTH, got {','.join(chosen.image_size)}")
    if Path(chosen.output).suffix not in Image.registered_extensions():
        raise ValueError(f"output: expected the name of a picture, such as samples.png, got {chosen.output}")
    size = command_line.integers("image_size", chosen.image_size)
    sampling = Sampling(
        sampler=chosen.sampler,
        num_steps=chosen.steps,
        guidance=chosen.guidance,
        interval=_interval(chosen.interval),
        guided_channels=chosen.guided_channels,
        seed=chosen.seed,
    )
    generator = Generator(
        chosen.workdir,
        sampling,
        classes=command_line.integers("classes", chosen.classes),
        image_size=(size[0], size[-1]) if size else None,
        autoencoder=chosen.autoencoder,
        norm_groups=chosen.norm_groups,
        step=chosen.step,
        ema=chosen.ema,
    )
    images = run(generator, count=chosen.count, batch_size=chosen.batch_size, npz=chosen.npz)
    if jax.process_index() == 0:
        names = [generator.class_names[label] for label in generator.labels(np.arange(len(images)))]
        sheet: Image.Image = contact_sheet(images, names)
        sheet.save(chosen.output)
        print(f"{chosen.output}: {len(images)} images" + (f"; {chosen.npz}: {chosen.count}" if chosen.npz else ""))


if __name__ == "__main__":
    command_line.start(main, define_flags)
