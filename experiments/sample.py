"""Draws images from a trained or converted generator.

    python -m experiments.sample --workdir=runs/digits_generator --output=samples.png
    python -m experiments.sample --workdir=... --classes=3,7 --count=64 --guidance=1.5 --sampler=ddim --num_steps=50
    python -m experiments.sample --workdir=runs/gspn_xl2 --autoencoder=vae.safetensors --count=50000 --npz=samples.npz

Writes a grid as PNG and, with --npz, all images as `arr_0` uint8 (N, H, W, 3) and their labels as `arr_1`, as the
reference evaluator of FID takes them, and beside it samples.json: how they were made. Batches are kept in a folder
until all are there: the same command goes on where it was interrupted, and several processes share the work. An image
depends on the seed and its number only, not on the batch, the process or the device.
"""

import io
import os
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from absl import flags
from PIL import Image

from experiments import command_line
from experiments.contact_sheet import contact_sheet
from gspn_jax import load_run
from gspn_jax.sampling import NOISE_SAMPLERS, VELOCITY_SAMPLERS, Sampling, draw_archive, draw_batches

SHOWN = 100  # images of a grid


def define_flags() -> None:
    flags.DEFINE_string("workdir", None, "Folder of the run, or of converted parameters.", required=True)
    flags.DEFINE_string("output", "samples.png", "The grid to write.")
    flags.DEFINE_string("npz", "", "File for all images and labels.")
    flags.DEFINE_list("classes", [], "Labels, used in turn; by default all.")
    flags.DEFINE_integer("count", SHOWN, f"Number of images; more than {SHOWN} need --npz.")
    flags.DEFINE_string("sampler", "", f"{', '.join(NOISE_SAMPLERS)}; of interpolants {', '.join(VELOCITY_SAMPLERS)}.")
    flags.DEFINE_integer("num_steps", 0, "Steps of the sampler; 0: 250, or 25 of Heun's method.")
    flags.DEFINE_float("guidance", 1.0, "Scale of classifier-free guidance; 1 for none.")
    flags.DEFINE_list("interval", [], "FROM,TO: times between which guidance acts; by default always.")
    flags.DEFINE_integer("guided_channels", None, "Guides the first channels only; 3 as DiT's program does.")
    flags.DEFINE_list("image_size", [], "SIDE or HEIGHT,WIDTH in pixels; by default as in training.")
    flags.DEFINE_string("autoencoder", "", "File of the autoencoder that decodes latents.")
    flags.DEFINE_integer("norm_groups", 32, "Groups of the autoencoder's norms.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Seed of the noise.")
    flags.DEFINE_integer("batch_size", 100, "Images at a time, on the devices of a process.", lower_bound=1)
    flags.DEFINE_integer("step", None, "Checkpoint; by default the newest good one.")
    flags.DEFINE_bool("ema", True, "Uses the moving average of the parameters.")


def main() -> None:
    chosen = flags.FLAGS
    check_output(chosen.output)
    if chosen.count < 1 or (chosen.count > SHOWN and not chosen.npz):
        raise ValueError(f"count: expected 1 to {SHOWN}, or any number with --npz, got {chosen.count}")
    size = command_line.integers("image_size", chosen.image_size)
    if len(size) > 2:
        raise ValueError(f"image_size: expected SIDE or HEIGHT,WIDTH, got {','.join(chosen.image_size)}")
    sampling = Sampling(
        sampler=chosen.sampler,
        num_steps=chosen.num_steps,
        guidance=chosen.guidance,
        interval=_interval(chosen.interval),
        guided_channels=chosen.guided_channels,
        seed=chosen.seed,
    )
    run = load_run(chosen.workdir, step=chosen.step, parameters="ema" if chosen.ema else "raw", task="generation")
    classes = command_line.integers("classes", chosen.classes) or tuple(range(run.num_classes))
    if not all(0 <= label < run.num_classes for label in classes):
        raise ValueError(f"classes: expected labels in 0..{run.num_classes - 1}, got {classes}")
    sampler = run.sampler(
        sampling,
        image_size=(size[0], size[-1]) if size else None,
        autoencoder=chosen.autoencoder,
        norm_groups=chosen.norm_groups,
    )
    labels = np.resize(np.asarray(classes, np.int32), chosen.count)
    shown = min(chosen.count, SHOWN)
    if chosen.npz:
        source = {"workdir": str(run.workdir), "step": run.step, "ema": run.parameters == "ema", "classes": classes}
        images = draw_archive(sampler, labels, chosen.npz, batch_size=chosen.batch_size, **source).first(shown)
    else:
        starts = range(0, shown, chosen.batch_size)
        images = np.concatenate([part for _, part in draw_batches(sampler, labels, starts, chosen.batch_size)])
    if jax.process_index() == 0:
        sheet: Image.Image = contact_sheet(images, [run.class_names[label] for label in labels[:shown]])
        sheet.save(chosen.output)
        print(f"{chosen.output}: {len(images)} images" + (f"; {chosen.npz}: {chosen.count}" if chosen.npz else ""))


def check_output(path: str) -> None:
    """Raises ValueError, before anything is drawn, for a file that a picture cannot be written to."""
    output = Path(path)
    try:  # some formats can only be read, or hold no colours
        Image.new("RGB", (1, 1)).save(io.BytesIO(), Image.registered_extensions()[output.suffix.lower()])
    except (KeyError, OSError, ValueError) as error:
        raise ValueError(f"output: expected the name of a picture, such as samples.png, got {path}") from error
    place = output if output.exists() else output.absolute().parent
    if output.is_dir() or not output.absolute().parent.is_dir() or not os.access(place, os.W_OK):
        raise ValueError(f"output: expected a file in a folder that can be written to, got {path}")


def _interval(words: Sequence[str]) -> tuple[float, float] | None:
    if not words:
        return None
    try:
        start, end = map(float, words)
    except ValueError as error:
        raise ValueError(f"interval: expected FROM,TO, got {','.join(words)}") from error
    return start, end


if __name__ == "__main__":
    command_line.start(main, define_flags)
