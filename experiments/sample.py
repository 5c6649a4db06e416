"""Samples images of a trained generator.

    python -m experiments.sample --workdir=runs/digits_generator --output=samples.png
    python -m experiments.sample --workdir=... --classes=3,7 --count=64 --guidance=1.5 --sampler=ddim --steps=50

Writes a grid as PNG and, with --npz, all images as `arr_0` uint8 (N, H, W, 3) and their labels as `arr_1`. An image
depends on the seed and its number alone, not on the batch that it is drawn in.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from tqdm import tqdm

from experiments import command_line, generation
from experiments.show_batch import contact_sheet
from gspn_jax.diffusion import Interpolant, SampleNoise, guided, interpolant_samplers, samplers
from gspn_jax.training import load_parameters
from gspn_jax.training.generation import Generation
from gspn_jax.training.state import Parameters

NOISE_SAMPLERS = ("ddpm", "ddim", "euler", "dpm_solver")  # of objective "ddpm"
VELOCITY_SAMPLERS = ("heun", "euler", "sde")  # of interpolants
SHOWN = 100  # images of a grid


def draw(
    task: Generation,
    params: Parameters,
    labels: jax.Array,
    noise: SampleNoise,
    *,
    shape: tuple[int, ...],
    sampler: str,
    num_steps: int,
    guidance: float = 1.0,
    interval: tuple[float, float] | None = None,
    progress: samplers.Progress | None = None,
) -> jax.Array:
    """Samples of the labels (B,), (B, *shape) float32. Traceable.

    Raises:
        ValueError: a sampler that the objective has not.
    """
    known = VELOCITY_SAMPLERS if isinstance(task.objective, Interpolant) else NOISE_SAMPLERS
    if sampler not in known:
        raise ValueError(f"sampler: expected one of {', '.join(known)}; got {sampler!r}")
    denoiser = guided(
        functools.partial(task.denoise, params), labels, scale=guidance, no_class=task.num_classes, interval=interval
    )
    start = noise.draw(0, shape)
    if isinstance(task.objective, Interpolant):
        if sampler == "sde":
            options: Any = dict(interpolant=task.objective, progress=progress)
            return interpolant_samplers.sde(denoiser, start, num_steps, noise, **options)
        run = interpolant_samplers.heun if sampler == "heun" else interpolant_samplers.euler
        return run(denoiser, start, num_steps, progress=progress)
    if sampler == "ddpm":
        return samplers.ddpm(denoiser, start, task.objective.respaced(num_steps), noise, progress=progress)
    run = {"ddim": samplers.ddim, "euler": samplers.euler, "dpm_solver": samplers.dpm_solver}[sampler]
    return run(denoiser, start, samplers.steps(task.objective, num_steps), progress=progress)


def run(
    workdir: str,
    *,
    classes: Sequence[int] = (),
    count: int = SHOWN,
    sampler: str = "",
    num_steps: int = 0,
    guidance: float = 1.0,
    interval: tuple[float, float] | None = None,
    seed: int = 0,
    batch_size: int = 100,
    step: int | None = None,
    ema: bool = True,
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Images uint8 (count, H, W, 3), their labels (count,), and the names of all classes.

    Args:
        workdir: of a run of generation.
        classes: labels that take turns; all by default.
        sampler: by default "ddpm", or "heun" of an interpolant.
        num_steps: by default 250, or 25 of Heun's method.

    Raises:
        ValueError, OSError, CheckpointError: in one line, what is wrong.
    """
    params, meta = load_parameters(workdir, step, ema=ema)
    if "objective" not in meta:
        raise ValueError(f"workdir: expected a run of generation, got one of another task: {workdir}")
    task = generation.make_task(meta)
    number = meta["num_classes"]
    if not all(0 <= label < number for label in classes):
        raise ValueError(f"classes: expected labels in 0..{number - 1}, got {tuple(classes)}")
    for name, value in (("count", count), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    is_velocity = isinstance(task.objective, Interpolant)
    sampler = sampler or ("heun" if is_velocity else "ddpm")
    num_steps = num_steps or (25 if sampler == "heun" else 250)
    side = meta["data"]["image_size"]
    turns = np.asarray(classes or range(number), np.int32)
    labels = turns[np.arange(count) % len(turns)]
    batches = range(0, count, batch_size)
    with tqdm(total=len(batches) * num_steps, unit="step", disable=jax.process_index() != 0) as bar:

        @jax.jit
        def images_of(params: Parameters, labels: jax.Array, samples: jax.Array) -> jax.Array:
            x = draw(
                task, params, labels, SampleNoise(seed, samples), shape=(side, side, 3), sampler=sampler,
                num_steps=num_steps, guidance=guidance, interval=interval, progress=bar.update,
            )  # fmt: skip
            return jnp.clip(jnp.round((x + 1) * 127.5), 0, 255).astype(jnp.uint8)

        drawn = []
        for start in batches:
            samples = np.minimum(np.arange(start, start + batch_size), count - 1)  # of one shape, to compile once
            drawn.append(np.asarray(images_of(params, jnp.asarray(labels[samples]), jnp.asarray(samples))))
        jax.effects_barrier()
    return np.concatenate(drawn)[:count], labels, meta["class_names"]


def define_flags() -> None:
    flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)
    flags.DEFINE_string("output", "samples.png", "The grid to write.")
    flags.DEFINE_string("npz", "", "File for all images and labels.")
    flags.DEFINE_list("classes", [], "Labels that take turns; by default all.")
    flags.DEFINE_integer("count", SHOWN, "Images.")
    flags.DEFINE_string("sampler", "", f"{', '.join(NOISE_SAMPLERS)}; of interpolants {', '.join(VELOCITY_SAMPLERS)}.")
    flags.DEFINE_integer("steps", 0, "Of the sampler; 0: 250, or 25 of Heun's method.")
    flags.DEFINE_float("guidance", 1.0, "Scale of classifier-free guidance; 1 for none.")
    flags.DEFINE_list("interval", [], "FROM,TO: times between which guidance acts; by default always.")
    flags.DEFINE_integer("seed", 0, "Of the noise.")
    flags.DEFINE_integer("batch_size", 100, "Images at a time.")
    flags.DEFINE_integer("step", None, "Checkpoint; by default the newest good one.")
    flags.DEFINE_bool("ema", True, "The moving average of the parameters.")


def main(argv: Sequence[str]) -> None:
    if argv:
        raise ValueError(f"expected flags only, got {' '.join(argv)}")
    chosen = flags.FLAGS
    if len(chosen.interval) not in (0, 2):
        raise ValueError(f"interval: expected FROM,TO, got {','.join(chosen.interval)}")
    images, labels, names = run(
        chosen.workdir,
        classes=[int(label) for label in chosen.classes],
        count=chosen.count,
        sampler=chosen.sampler,
        num_steps=chosen.steps,
        guidance=chosen.guidance,
        interval=(float(chosen.interval[0]), float(chosen.interval[1])) if chosen.interval else None,
        seed=chosen.seed,
        batch_size=chosen.batch_size,
        step=chosen.step,
        ema=chosen.ema,
    )
    contact_sheet(images[:SHOWN], [names[label] for label in labels[:SHOWN]]).save(chosen.output)
    if chosen.npz:
        np.savez(chosen.npz, images, labels)
    print(f"{chosen.output}: {min(len(images), SHOWN)} of {len(images)} images")


if __name__ == "__main__":
    command_line.start(main, define_flags)
