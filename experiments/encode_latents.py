"""Encodes the images of a dataset once, so that generators train on their latents.

    python -m experiments.encode_latents --data_path=ROOT --autoencoder=vae.safetensors --output=LATENTS
    python -m experiments.train --config=configs/generator.py:gspn_b2 --config.data.path=LATENTS --workdir=runs/gspn_b2

The autoencoder is a file of Stable Diffusion's (such as stabilityai/sd-vae-ft-ema). Images are resized so that their
short side is the image size, and their centre is cropped. Mirror images are encoded too, unless --noflip is given.

The same command continues an interrupted one, and writes damaged shards again. Several processes, each with the same
command, share the shards.
"""

from pathlib import Path
from typing import Any

from absl import flags

from experiments import command_line
from gspn_jax import data
from gspn_jax.batching import image_encoder
from gspn_jax.data.encoding import encode_dataset
from gspn_jax.models.autoencoder import LATENT_SCALE
from gspn_jax.weights.loading import load_autoencoder


def run(
    data_name: str,
    data_path: str | None,
    autoencoder: str,
    output: str,
    *,
    image_size: int = 256,
    batch_size: int = 64,
    norm_groups: int = 32,
    dtype: str = "float32",
    **options: Any,
) -> int:
    """Writes a folder of latents; returns how many images this process encoded.

    Args:
        data_name: name of the dataset, as in `gspn_jax.data.load`.
        data_path: its path.
        autoencoder: file of the autoencoder.
        output: folder of the latents.
        image_size: side of the images, a multiple of the autoencoder's factor.
        batch_size: images at a time in this process.
        norm_groups: groups of the autoencoder's norms.
        dtype: of the autoencoder's computation.
        options: see `gspn_jax.data.encoding.encode_dataset`.

    Raises:
        ValueError, OSError: a wrong argument or file; the message is one line.
    """
    dataset = data.load(data_name, data_path)
    model, digest = load_autoencoder(autoencoder, norm_groups=norm_groups, dtype=dtype)
    if image_size < 1 or image_size % model.factor:
        raise ValueError(f"image_size: expected a multiple of {model.factor}, got {image_size}")
    side = image_size // model.factor
    return encode_dataset(
        dataset,
        image_encoder(model, batch_size),
        output,
        shape=(side, side, model.latent_channels),
        image_size=image_size,
        batch_size=batch_size,
        origin={
            "autoencoder": {"file": Path(autoencoder).name, "sha256": digest, "dtype": dtype},
            "norm_groups": norm_groups,
        },
        **{"scale": LATENT_SCALE, **options},
    )


def define_flags() -> None:
    flags.DEFINE_string("data_name", "image_folder", f"Dataset: one of {', '.join(data.SOURCES)}.")
    flags.DEFINE_string("data_path", None, "File or folder of the dataset.")
    flags.DEFINE_string("autoencoder", None, "File of Stable Diffusion's autoencoder.", required=True)
    flags.DEFINE_string("output", None, "Folder of the latents.", required=True)
    flags.DEFINE_integer("image_size", 256, "Side of the images in pixels.")
    flags.DEFINE_integer("batch_size", 64, "Images at a time on the devices of one process.", lower_bound=1)
    flags.DEFINE_bool("flip", True, "Encode mirror images too.")
    flags.DEFINE_bool("exif_rotation", False, "Turn images upright by their EXIF orientation.")
    flags.DEFINE_float("scale", LATENT_SCALE, "Networks multiply the latents with this number.")
    flags.DEFINE_integer("norm_groups", 32, "Groups of the autoencoder's norms.", lower_bound=1)
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Dtype of the autoencoder's computation.")
    flags.DEFINE_enum("stored", "float16", ["float16", "float32"], "Dtype of the stored latents.")
    flags.DEFINE_integer("images_per_shard", 10_000, "Images in a file.", lower_bound=1)
    flags.DEFINE_integer("num_threads", 8, "Threads that read images.", lower_bound=0)
    flags.DEFINE_enum("on_corrupt", "stop", ["stop", "drop"], "stop at images that cannot be decoded, or drop them.")


def main() -> None:
    names = "data_name data_path autoencoder output image_size batch_size flip exif_rotation scale norm_groups dtype"
    names += " stored images_per_shard num_threads on_corrupt"
    chosen: dict[str, Any] = {name: flags.FLAGS[name].value for name in names.split()}
    count = run(**chosen)
    print(f"{count:,} images encoded into {flags.FLAGS.output}")


if __name__ == "__main__":
    command_line.start(main, define_flags)
