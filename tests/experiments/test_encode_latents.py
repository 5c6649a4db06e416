"""Images to latents, a generator trained on them, and images from it, with a tiny autoencoder."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from configs import generator
from experiments import encode_latents, train
from gspn_jax import data, load_run
from gspn_jax.sampling import Sampling, draw
from gspn_jax.weights import diffusers_autoencoder

with np.load(Path(__file__).parents[1] / "golden" / "autoencoder_tiny.npz") as saved:
    ARRAYS = {name.removeprefix("param/"): saved[name] for name in saved.files if name.startswith("param/")}
OPTIONS: Any = dict(image_size=8, norm_groups=8, images_per_shard=40, batch_size=40)


def save(path: Path, arrays: dict[str, np.ndarray]) -> str:
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, path)
    return str(path)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    """48 training and 16 held-out images of 8x8 pixels."""
    path = tmp_path_factory.mktemp("images") / "images.npz"
    fake = data.load("fake", image_size=8, train_size=48, test_size=16)
    arrays = {}
    for split in ("train", "test"):
        pixels, labels = zip(*(getattr(fake, split)[n] for n in range(len(getattr(fake, split)))), strict=True)
        arrays |= {f"x_{split}": np.stack(pixels), f"y_{split}": np.array(labels)}
    np.savez(path, allow_pickle=False, **arrays)
    return str(path)


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(tmp_path_factory.mktemp("autoencoder") / "vae.safetensors", ARRAYS)


@pytest.fixture(scope="module")
def latents(images: str, autoencoder: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("latents"))
    assert encode_latents.run("npz", images, autoencoder, folder, **OPTIONS) == 48 + 16
    return folder


def test_latents_are_those_of_the_autoencoder(images: str, latents: str):
    dataset, source = data.load("latents", latents), data.load("npz", images)
    assert len(dataset.train) == 48 and len(dataset.test) == 16 and dataset.class_names == source.class_names
    network = diffusers_autoencoder(ARRAYS, norm_groups=8)
    chosen = [0, 39, 40, 47]
    pixels = np.stack([source.train[index][0] for index in chosen])
    both = np.concatenate([pixels, pixels[:, :, ::-1]]) / np.float32(127.5) - 1
    want = np.stack(jax.jit(network.encode)(both), axis=1)
    for row, index in enumerate(chosen):
        for copy in range(2):
            mean, log_variance, label = dataset.train.latents(index, copy)
            assert label == source.train[index][1]
            np.testing.assert_allclose([mean, log_variance], want[row + 4 * copy], rtol=2e-3, atol=1e-3)  # float16


def test_wrong_autoencoders(images: str, autoencoder: str, latents: str, tmp_path: Path):
    def refuse(words: str, path: str = autoencoder, **changes: Any) -> None:
        with pytest.raises(ValueError, match=words):
            encode_latents.run("npz", images, path, latents, **OPTIONS | changes)

    name = "encoder.conv_in.weight"
    broken = save(tmp_path / "nan.safetensors", ARRAYS | {name: ARRAYS[name] * np.float32(np.nan)})
    refuse(rf"autoencoder: .*nan.safetensors: .*expected finite numbers in {name}, got NaN or Inf", broken)
    refuse("autoencoder: .*: norm_groups: expected a divisor", norm_groups=5)
    refuse("image_size: expected a multiple of ", image_size=9)
    refuse(r"autoencoder: expected .*, got .*\.json", f"{latents}/manifest.json")
    refuse(r"output: expected the settings .*\(copies=2\), got copies=1", flip=False)


@pytest.mark.full
def test_a_generator_of_latents(autoencoder: str, latents: str, tmp_path: Path):
    config = generator.get_config("sit_b2")
    config.data.update({"path": latents, "image_size": 8, "num_threads": 1})
    config.model.update({"width": 8, "depth": 1, "num_heads": 2, "patch": 1, "dtype": "float32"})
    config.update({"batch_size": 48, "steps": 2, "intervals": {"log_steps": 1}})
    workdir = str(tmp_path / "run")
    numbers = train.run(config, workdir)[1].evaluation
    assert numbers["images"] == 16 and 0 < numbers["loss"] < 5
    manifest = json.loads((Path(latents) / "manifest.json").read_text())
    run = load_run(workdir)
    with pytest.raises(ValueError, match="autoencoder: expected a file of weights, since this network draws latents"):
        run.sample([0])
    with pytest.raises(ValueError, match="images: expected a generator of pixels, got one of latents"):
        run.preprocess(np.zeros((8, 8, 3), np.uint8))
    how = Sampling(num_steps=2)
    sampler = run.sampler(how, image_size=(8, 16), autoencoder=autoencoder, norm_groups=8)
    assert sampler.settings["autoencoder"] == manifest["autoencoder"]["sha256"]
    images = sampler.images(np.arange(3), np.arange(3))
    assert images.shape == (3, 8, 16, 3) and images.std() > 1
    # Drawn and decoded by hand.
    params = jax.tree.map(jnp.asarray, run.params)
    drawn = draw(run.task, params, jnp.arange(3), jnp.arange(3), how, shape=(1, 2, 4))
    decoded = diffusers_autoencoder(ARRAYS, norm_groups=8).decode(drawn / manifest["scale"])
    assert np.abs(np.clip((np.asarray(decoded) + 1) * 127.5, 0, 255) - images).max() < 0.6  # rounded
