"""Images to latents, a generator trained on them, and images out of it, by a tiny autoencoder."""

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from configs import generator
from experiments import encode_latents, sample, train
from experiments.sample import Generator, Sampling
from gspn_jax import data
from gspn_jax.weights import diffusers_autoencoder

with np.load(Path(__file__).parents[1] / "golden" / "autoencoder_tiny.npz") as saved:
    ARRAYS = {name.removeprefix("param/"): saved[name] for name in saved.files if name.startswith("param/")}
OPTIONS: Any = dict(image_size=8, norm_groups=8, images_per_shard=500, batch_size=240)


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("autoencoder") / "vae.safetensors")
    save_file({name: np.ascontiguousarray(array) for name, array in ARRAYS.items()}, path)
    return path


@pytest.fixture(scope="module")
def latents(autoencoder: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("latents")
    write = encode_latents._write

    def interrupted(file: Path, records: Any) -> int:
        if file.name.startswith("00001"):
            next(records)
            raise KeyboardInterrupt
        return write(file, records)

    encode = functools.partial(encode_latents.run, "digits", None, autoencoder, str(folder), **OPTIONS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode_latents, "_write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            encode()
    with pytest.raises(ValueError, match="3 shards of split train, but 2 are missing"):
        data.load("latents", str(folder))
    assert encode() == 937 + 360  # what the first 500 left
    assert encode() == 0
    return str(folder)


def test_latents_are_those_of_the_autoencoder(latents: str):
    dataset, digits = data.load("latents", latents), data.load("digits")
    assert len(dataset.train) == 1437 and len(dataset.test) == 360 and dataset.class_names == digits.class_names
    network = diffusers_autoencoder(ARRAYS, norm_groups=8)
    for index in (0, 700, 1436):
        image, label = digits.train[index]
        sides = np.stack([image, image[:, ::-1]]) / np.float32(127.5) - 1
        want = np.stack(jax.jit(network.encode)(sides), axis=1)
        for copy in range(2):
            mean, log_variance, found = dataset.train.latents(index, copy)
            assert found == label
            np.testing.assert_allclose([mean, log_variance], want[copy], rtol=2e-3, atol=1e-3)  # float16


def test_other_settings_are_refused(autoencoder: str, latents: str):
    with pytest.raises(ValueError, match=r"output: .* holds latents of other settings.*: copies \(there 2\)"):
        encode_latents.run("digits", None, autoencoder, latents, flip=False, **OPTIONS)
    with pytest.raises(ValueError, match=r"output: .*: images_per_shard \(there 500\)"):
        encode_latents.run("digits", None, autoencoder, latents, **{**OPTIONS, "images_per_shard": 400})
    with pytest.raises(ValueError, match="scale: expected a positive number, got 0"):
        encode_latents.run("digits", None, autoencoder, latents, scale=0, **OPTIONS)
    with pytest.raises(ValueError, match="autoencoder: .*: norm_groups: expected a divisor"):
        encode_latents.run("digits", None, autoencoder, latents, **{**OPTIONS, "norm_groups": 5})
    with pytest.raises(ValueError, match="image_size: expected a multiple of "):
        encode_latents.run("digits", None, autoencoder, latents, **{**OPTIONS, "image_size": 9})
    with pytest.raises(ValueError, match="data: expected images, got latents"):
        encode_latents.run("latents", latents, autoencoder, latents, **OPTIONS)
    with pytest.raises(ValueError, match=r"autoencoder: expected a safetensors, .pt or .pth file, got .*\.json"):
        encode_latents.run("digits", None, f"{latents}/manifest.json", latents, **OPTIONS)


def test_a_generator_of_latents(autoencoder: str, latents: str, tmp_path: Path):
    config = generator.get_config("sit_b2")
    config.data.update({"path": latents, "image_size": 8, "num_threads": 1})
    config.model.update({"width": 8, "depth": 1, "num_heads": 2, "patch": 1, "dtype": "float32"})
    config.update({"batch_size": 96, "steps": 2, "intervals": {"log_steps": 1}})
    workdir = str(tmp_path / "run")
    numbers = train.run(config, workdir).evaluation
    assert numbers["images"] == 360 and 0 < numbers["loss"] < 5
    manifest = json.loads((Path(latents) / "manifest.json").read_text())
    with pytest.raises(ValueError, match="autoencoder: expected a safetensors file, since this network draws latents"):
        Generator(workdir)
    how = Sampling(num_steps=2)
    one = Generator(workdir, how, image_size=(8, 16), autoencoder=autoencoder, norm_groups=8)
    assert one.settings["autoencoder"] == manifest["autoencoder"]["sha256"]
    images = sample.run(one, count=3)
    assert images.shape == (3, 8, 16, 3) and images.std() > 1
    # Drawn and decoded by hand.
    params = jax.tree.map(jnp.asarray, sample.load_parameters(workdir)[0])
    drawn = sample.draw(one.task, params, jnp.arange(3), jnp.arange(3), how, shape=(1, 2, 4))
    decoded = diffusers_autoencoder(ARRAYS, norm_groups=8).decode(drawn / manifest["scale"])
    assert np.abs(np.clip((np.asarray(decoded) + 1) * 127.5, 0, 255) - images).max() < 0.6  # rounded
