"""Encodes the images of a dataset once, so that generators train on their latents.

    python -m experiments.encode_latents --data=image_folder --path=ROOT --autoencoder=vae.safetensors --output=LATENTS
    python -m experiments.train --config=configs/generator.py:gspn_b2 --config.data.path=LATENTS --workdir=runs/gspn_b2

The autoencoder is a safetensors file of Stable Diffusion's (such as stabilityai/sd-vae-ft-ema). Mean and log variance
are kept, so that training draws the latents anew each time; mirror images are a second copy of each record (--noflip
leaves them out). Images are resized so that their short side is the image size, and their centre is taken.

A shard is written under another name first and renamed when it is complete: the same command goes on where it was
interrupted. Several processes, each with the same command, share the shards.
"""

import functools
import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from array_record.python.array_record_module import ArrayRecordWriter
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from tqdm import tqdm

from experiments import command_line
from experiments.image_batches import sha256
from gspn_jax import data
from gspn_jax.data.sources.latents import MANIFEST, SPLITS, LatentRecord, read_manifest, shard_files
from gspn_jax.models.autoencoder import Autoencoder
from gspn_jax.training.sharding import local_mesh, place_batch
from gspn_jax.weights import diffusers_autoencoder, read_arrays

SCALE = 0.18215  # of Stable Diffusion's latents, so that they have about unit variance
IMAGES_PER_SHARD = 10_000


class _Part:
    """Images start to stop - 1 of a source."""

    def __init__(self, source: data.Source, start: int, stop: int):
        self._source, self._start, self._stop = source, start, stop

    def __len__(self) -> int:
        return self._stop - self._start

    def __getitem__(self, index: int, /) -> tuple[np.ndarray, int]:
        return self._source[self._start + index]

    def describe(self, index: int, /) -> str:
        return self._source.describe(self._start + index)


def load_autoencoder(path: str, *, norm_groups: int = 32, dtype: str = "float32") -> tuple[Autoencoder, str]:
    """The autoencoder of a safetensors file, and the file's SHA-256."""
    arrays = read_arrays(path, argument="autoencoder")
    try:
        return diffusers_autoencoder(arrays, norm_groups=norm_groups, dtype=jnp.dtype(dtype)), sha256(path)
    except ValueError as error:
        raise ValueError(f"autoencoder: {path}: {error}") from error


def run(
    name: str,
    path: str | None,
    autoencoder: str,
    output: str,
    *,
    image_size: int = 256,
    batch_size: int = 64,
    flip: bool = True,
    scale: float = SCALE,
    norm_groups: int = 32,
    dtype: str = "float32",
    stored: str = "float16",
    images_per_shard: int = IMAGES_PER_SHARD,
    num_threads: int = 8,
    on_corrupt: str = "stop",
) -> int:
    """Writes the shards that are missing; returns how many images this process encoded.

    Args:
        name, path: of the dataset, as `data.load` takes them.
        autoencoder: safetensors file.
        output: folder; one that holds latents of other settings is refused.
        image_size: side of the images, which the autoencoder's factor divides.
        batch_size: images at a time, on the devices of this process.
        flip: whether mirror images are encoded too.
        scale: what networks will multiply the latents with; recorded, not applied.
        norm_groups: of the autoencoder.
        dtype: of its computation.
        stored: dtype of the records.
        images_per_shard: of a file.
        on_corrupt: "stop", or "drop" images that cannot be read.

    Raises:
        ValueError, OSError: in one line, what is wrong.
    """
    dataset = data.load(name, path)
    if dataset.latents is not None:
        raise ValueError(f"data: expected images, got latents: {path}")
    for argument, value in (("batch_size", batch_size), ("images_per_shard", images_per_shard)):
        if value < 1:
            raise ValueError(f"{argument}: expected at least 1, got {value}")
    if not 0 < scale < math.inf:
        raise ValueError(f"scale: expected a positive number, got {scale}")
    model, digest = load_autoencoder(autoencoder, norm_groups=norm_groups, dtype=dtype)
    if image_size < 1 or image_size % model.factor:
        raise ValueError(f"image_size: expected a multiple of {model.factor}, got {image_size}")
    side = image_size // model.factor
    layout = LatentRecord((side, side, model.latent_channels), stored, 1 + flip)
    sources: dict[str, Any] = {split: getattr(dataset, split) for split in SPLITS}
    shards = {split: -(-len(source) // images_per_shard) for split, source in sources.items()}
    manifest = {
        "autoencoder": {"file": Path(autoencoder).name, "sha256": digest, "dtype": dtype},
        "class_names": list(dataset.class_names),
        "copies": layout.copies,
        "data": name,
        "dtype": stored,
        "image_size": image_size,
        "images_per_shard": images_per_shard,
        "norm_groups": norm_groups,
        "on_corrupt": on_corrupt,
        "images": {split: len(source) for split, source in sources.items()},
        "scale": scale,
        "shape": list(layout.shape),
        "shards": shards,
    }
    folder = Path(output)
    _claim(folder, manifest)
    missing = [
        (source, number * images_per_shard, file)
        for split, source in sources.items()
        for number, file in enumerate(shard_files(folder, split, shards[split]))
        if number % jax.process_count() == jax.process_index() and not file.is_file()
    ]
    parts = [
        (_Part(source, start, min(start + images_per_shard, len(source))), file) for source, start, file in missing
    ]
    mesh = local_mesh()
    state = jax.device_put(nnx.state(model), NamedSharding(mesh, PartitionSpec()))  # once, not with each batch
    encode = functools.partial(_moments, jax.jit(functools.partial(_encode, nnx.graphdef(model))), state)
    written = 0
    with jax.set_mesh(mesh), tqdm(total=sum(len(part) for part, _ in parts), unit="image") as bar:
        for part, file in parts:
            batches = data.evaluation_batches(
                part,
                batch_size=-(-batch_size // mesh.size) * mesh.size,
                image_size=image_size,
                resize=image_size,
                num_threads=num_threads,
                on_corrupt=on_corrupt,  # pyright: ignore[reportArgumentType]
            )
            try:
                written += _write(file, _records(batches, encode, layout, bar))
            finally:
                batches.close()
    return written


def _claim(folder: Path, manifest: dict[str, Any]) -> None:
    """Writes the manifest, or checks that the one that is there is the same."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output: expected a folder, got a file: {folder}")
    if (folder / MANIFEST).exists():
        there = read_manifest(folder)
        other = sorted(key for key in manifest if there.get(key) != manifest[key])
        if other:
            raise ValueError(
                f"output: {folder} holds latents of other settings; take a new folder or set back: "
                + ", ".join(f"{key} (there {there.get(key)})" for key in other)
            )
        return
    for split in SPLITS:
        (folder / split).mkdir(parents=True, exist_ok=True)
    part = folder / f"{MANIFEST}.{jax.process_index()}"
    part.write_text(json.dumps(manifest, indent=2) + "\n")
    os.replace(part, folder / MANIFEST)


def _encode(graph: nnx.GraphDef, state: Any, images: jax.Array) -> jax.Array:
    mean, log_variance = nnx.merge(graph, state).encode(images.astype(jnp.float32) / 127.5 - 1)
    return jnp.stack([mean, log_variance], axis=1)


def _moments(encode: Any, state: Any, images: np.ndarray, copies: int) -> np.ndarray:
    """(B, copies, 2, h, w, c) float32 of images uint8 (B, H, W, 3)."""
    mesh = jax.sharding.get_mesh()
    sides = [images, images[:, :, ::-1]][:copies]
    placed = [place_batch({"image": np.ascontiguousarray(side)}, mesh)["image"] for side in sides]
    return np.stack([np.asarray(encode(state, side)) for side in placed], axis=1)


def _records(batches: data.EvaluationBatches, encode: Any, layout: LatentRecord, bar: tqdm) -> Iterator[bytes]:
    for batch in batches:
        moments = encode(batch["image"], layout.copies)
        for row in np.flatnonzero(batch["mask"]):
            yield layout.packed(moments[row], batch["label"][row])
        bar.update(int(batch["mask"].sum()))


def _write(file: Path, records: Iterator[bytes]) -> int:
    """Writes a file that is there only when it is whole."""
    part, count = file.with_suffix(".part"), 0
    writer = ArrayRecordWriter(str(part), "group_size:1")
    try:
        for record in records:
            writer.write(record)
            count += 1
    finally:
        writer.close()
    os.replace(part, file)
    return count


def define_flags() -> None:
    flags.DEFINE_string("data", "image_folder", f"Dataset: one of {', '.join(data.SOURCES)}.")
    flags.DEFINE_string("path", None, "Where it is.")
    flags.DEFINE_string("autoencoder", None, "Safetensors file of Stable Diffusion's autoencoder.", required=True)
    flags.DEFINE_string("output", None, "Folder of latents.", required=True)
    flags.DEFINE_integer("image_size", 256, "Side of the images, in pixels.")
    flags.DEFINE_integer("batch_size", 64, "Images at a time, on the devices of a process.")
    flags.DEFINE_bool("flip", True, "Encode mirror images too.")
    flags.DEFINE_float("scale", SCALE, "What networks multiply the latents with.")
    flags.DEFINE_integer("norm_groups", 32, "Groups of the autoencoder's norms.", lower_bound=1)
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of the autoencoder's computation.")
    flags.DEFINE_enum("stored", "float16", ["float16", "float32"], "Dtype of the records.")
    flags.DEFINE_integer("images_per_shard", IMAGES_PER_SHARD, "Images of a file.")
    flags.DEFINE_integer("num_threads", 8, "Threads that read images.")
    flags.DEFINE_enum("on_corrupt", "stop", ["stop", "drop"], "Images that cannot be read.")


def main(argv: Sequence[str]) -> None:
    if argv:
        raise ValueError(f"expected flags only, got {' '.join(argv)}")
    names = "autoencoder output image_size batch_size flip scale norm_groups dtype stored images_per_shard num_threads"
    chosen: dict[str, Any] = {name: flags.FLAGS[name].value for name in [*names.split(), "on_corrupt"]}
    count = run(flags.FLAGS.data, flags.FLAGS.path, **chosen)
    print(f"{count:,} images encoded into {chosen['output']}")


if __name__ == "__main__":
    command_line.start(main, define_flags)
