import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from experiments import classification, convert, generation
from gspn_jax.training import load_parameters

with np.load(pathlib.Path(__file__).parents[1] / "golden" / "classifier_tiny.npz") as saved:
    GOLDEN = dict(saved)
ARRAYS = {name.removeprefix("param/"): array for name, array in GOLDEN.items() if name.startswith("param/")}
OPTIONS: Any = dict(alignment="unturned", chunk=2, global_stages=(2, 3), image_size=64, resize=0)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("released") / "tiny.safetensors"
    save_file({f"module.{name}": np.ascontiguousarray(array) for name, array in ARRAYS.items()}, path)
    return str(path)


def test_converted_workdir_gives_the_released_logits(source, tmp_path):
    count = convert.classifier(source, str(tmp_path), **OPTIONS)
    assert count == sum(array.size for array in ARRAYS.values())
    params, meta = load_parameters(tmp_path)
    task = classification.make_task(meta)
    # The task normalises images of 0..255: undo it.
    images = GOLDEN["image"].transpose(0, 2, 3, 1) * meta["data"]["std"] + meta["data"]["mean"]
    logits = jax.jit(task.logits)(jax.tree.map(jnp.asarray, params), jnp.asarray(images, jnp.float32))
    np.testing.assert_allclose(logits, GOLDEN["logits_released"], atol=2e-5)  # the detour rounds the images
    assert meta["class_names"][:2] == ["class 0", "class 1"] and meta["num_classes"] == 10


@pytest.mark.parametrize("name,content,words", [
    ("gspn_t.pth", b"", ("safetensors", "torch.load", "gspn_t.pth")),
    ("bad.safetensors", b"nothing", ("safetensors", "bad.safetensors")),
])  # fmt: skip
def test_files_of_another_kind(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as error:
        convert.classifier(str(tmp_path / name), str(tmp_path / "run"), **OPTIONS)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert not (tmp_path / "run").exists()


def test_class_names_must_be_as_many_as_classes(source, tmp_path):
    with pytest.raises(ValueError, match="class_names: expected 10, as the network has classes, got 3"):
        convert.classifier(source, str(tmp_path / "run"), **OPTIONS, class_names=["a", "b", "c"])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("file,out,objective,options", [
    ("generator_tiny", "out_released", "ddpm", {}), ("dit_tiny", "out", "linear", dict(num_heads=4)),
])  # fmt: skip
def test_converted_generator_is_the_released_one(tmp_path, file, out, objective, options):
    with np.load(pathlib.Path(__file__).parents[1] / "golden" / f"{file}.npz") as saved:
        golden = dict(saved)
    arrays = {name.removeprefix("param/"): array for name, array in golden.items() if name.startswith("param/")}
    path = str(tmp_path / "tiny.safetensors")
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, path)
    assert not convert.is_classifier(path)
    more: Any = dict(alignment="unturned", chunk=2, image_size=64)
    convert.generator(path, str(tmp_path / "run"), objective=objective, **more, **options)
    params, meta = load_parameters(tmp_path / "run")
    assert meta["input"] == {"shape": [8, 8, 4], "scale": 0.18215, "autoencoder": ""}
    task = generation.make_task(meta)
    latents, time, label = (jnp.asarray(golden[name]) for name in ("latent", "timestep", "label"))
    inputs = latents.transpose(0, 2, 3, 1), time.astype(jnp.float32), label.astype(jnp.int32)
    output = jax.jit(task.denoise)(jax.tree.map(jnp.asarray, params), *inputs)
    want = golden[out].transpose(0, 2, 3, 1)[..., : output.shape[-1]]  # a velocity has no variance
    np.testing.assert_allclose(output, want, atol=1e-5)


def test_networks_that_are_not_known(tmp_path):
    path = str(tmp_path / "other.safetensors")
    save_file({"conv1.weight": np.zeros((1, 1), np.float32)}, path)
    with pytest.raises(ValueError, match="source: expected a network .* got names such as conv1.weight"):
        convert.is_classifier(path)
    arrays = {f"blocks.0.{name}": np.zeros((8, 8), np.float32) for name in ("adaLN_modulation.1.weight",)}
    save_file(arrays, path)
    with pytest.raises(ValueError, match="objective: expected one of ddpm, linear, gvp; got 'vp'"):
        convert.generator(path, str(tmp_path / "run"), objective="vp", alignment="unturned", chunk=2)
