"""The pipeline against runs of diffusers: embeddings, latents and images."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging
from flax import nnx

from gspn_jax.text_to_image import pipeline as pipelines
from gspn_jax.training.sharding import local_mesh
from tests.text_to_image.conftest import Golden

QUICK = [("sd15", "ddim")]
full = pytest.mark.full


def assert_latents(got: np.ndarray, want: np.ndarray) -> None:
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * np.abs(want).max())


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_embeddings(goldens: dict[str, Golden], kind: str):
    golden = goldens[kind]
    for texts, prefix in ((golden.prompts, ""), (golden.negatives, "negative_")):
        embeddings, pooled = golden.pipeline.encode(texts)
        np.testing.assert_allclose(embeddings, golden.arrays[f"{prefix}embeds"], rtol=0, atol=2e-5)
        assert (pooled is None) == (kind == "sd15")
        if pooled is not None:
            np.testing.assert_allclose(pooled, golden.arrays[f"{prefix}pooled"], rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind,sampler", [
    *QUICK, *(pytest.param(kind, sampler, marks=full) for kind in ("sd15", "sdxl")
              for sampler in ("pndm", "ddim", "euler", "dpmpp") if (kind, sampler) not in QUICK),
])  # fmt: skip
def test_latents_and_images(goldens: dict[str, Golden], kind: str, sampler: str):
    golden = goldens[kind]
    call: dict[str, Any] = golden.call | dict(negative_prompt=golden.negatives, sampler=sampler)
    latents = golden.pipeline(golden.prompts, output="latents", **call)
    assert_latents(latents, golden.arrays[f"latents_{sampler}"][-1])
    images = golden.pipeline.decode(latents)
    assert images.dtype == np.float32
    np.testing.assert_allclose(images, golden.arrays[f"image_{sampler}"], rtol=0, atol=2e-5)
    default = golden.pipeline.scheduler().name
    assert default == {"sd15": "pndm", "sdxl": "euler"}[kind]


@pytest.mark.parametrize("kind", ["sd15", pytest.param("sdxl", marks=full)])
def test_without_a_negative_prompt(goldens: dict[str, Golden], kind: str):
    golden = goldens[kind]
    sampler = str(golden.arrays["scheduler_default_negative"])
    images = golden.pipeline(golden.prompts, sampler=sampler, **golden.call)
    np.testing.assert_allclose(images, golden.arrays["image_default_negative"], rtol=0, atol=2e-5)


@full
@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_without_guidance(goldens: dict[str, Golden], kind: str):
    golden = goldens[kind]
    sampler = str(golden.arrays["scheduler_default_negative"])
    call: dict[str, Any] = golden.call | {"guidance": 1.0}
    latents = golden.pipeline(golden.prompts, sampler=sampler, output="latents", **call)
    assert_latents(latents, golden.arrays["latents_no_guidance"][-1])


@full
@pytest.mark.parametrize("kind,sampler", [("sd15", "euler"), ("sd15", "ddim"), ("sdxl", "ddim"), ("sdxl", "euler")])
def test_image_to_image(goldens: dict[str, Golden], kind: str, sampler: str):
    golden, arrays = goldens[kind], goldens[kind].arrays
    start = arrays["i2i_init_latents"]
    call = golden.call | dict(
        noise=arrays["i2i_noise"], num_steps=int(arrays["i2i_steps"]), strength=float(arrays["i2i_strength"])
    )
    call |= dict(negative_prompt=golden.negatives, sampler=sampler, image=start, output="latents")
    latents = golden.pipeline(golden.prompts, **call)
    assert_latents(latents, arrays[f"i2i_latents_{sampler}"][-1])


@pytest.mark.parametrize("kind", ["sd15", pytest.param("sdxl", marks=full)])
def test_images_are_encoded(goldens: dict[str, Golden], kind: str):
    """Latents are a sample of the distribution that diffusers finds; their noise depends on seed and number."""
    pipeline, arrays = goldens[kind].pipeline, goldens[kind].arrays
    scale = pipeline.parts.latent_scale
    mean, spread = arrays["i2i_mean"], np.exp(arrays["i2i_logvar"] / 2)
    mean, spread = np.moveaxis(mean, 1, -1), np.moveaxis(spread, 1, -1)
    found = pipeline.encode_image(arrays["i2i_image_in"])
    noise = (found / scale - mean) / spread
    assert abs(noise.mean()) < 0.1 and abs(noise.std() - 1) < 0.1
    other = pipeline.encode_image(arrays["i2i_image_in"][1:], numbers=[1])
    np.testing.assert_allclose(other, found[1:], rtol=0, atol=1e-5)
    assert np.abs(pipeline.encode_image(arrays["i2i_image_in"], seed=1) - found).max() > 0.1


def test_an_image_depends_on_seed_and_number_only(goldens: dict[str, Golden]):
    """Not on its batch, nor on the devices: three and four rows, doubled by guidance, are spread over eight."""
    pipeline = goldens["sd15"].pipeline
    assert local_mesh().size == jax.local_device_count()
    call: dict[str, Any] = goldens["sd15"].call | dict(noise=None, sampler="ddim", output="latents")
    whole = pipeline(["a", "b"], num_images=2, **call)
    assert whole.shape == (4, 8, 12, 4)
    parts = pipeline(["a", "b"], num_images=2, batch_size=3, numbers=range(4), **call)
    assert_latents(parts, whole)
    assert_latents(pipeline(["b", "b", "a"], numbers=[3, 2, 0], **call), whole[[3, 2, 0]])
    other = pipeline(["a", "b"], num_images=2, seed=1, **call)
    assert np.abs(other - whole).max() > 0.1 and np.abs(whole[0] - whole[1]).max() > 0.1


@full
def test_batches_and_sharded_parameters(goldens: dict[str, Golden]):
    golden = goldens["sdxl"]
    call: dict[str, Any] = dict(num_steps=2, output="latents", height=136, width=72, progress=False)
    whole = golden.pipeline(["a", "b", "c"], **call)
    assert whole.shape == (3, 17, 9, 4)  # maps of odd size
    np.testing.assert_allclose(golden.pipeline(["a", "b", "c"], batch_size=2, **call), whole, rtol=0, atol=1e-4)
    sharded = pipelines.TextToImage(golden.pipeline.parts, fsdp=True)
    kernels = [leaf for leaf in jax.tree.leaves(sharded._state) if not leaf.sharding.is_fully_replicated]
    assert kernels
    np.testing.assert_allclose(sharded(["a", "b", "c"], **call), whole, rtol=0, atol=1e-4)


@full
def test_bfloat16_stays_close(goldens: dict[str, Golden]):
    golden = goldens["sd15"]
    narrow = pipelines.TextToImage.load(golden.folder, dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(narrow.parts.unet))} == {jnp.dtype("bfloat16")}
    call: dict[str, Any] = dict(num_steps=2, sampler="ddim", guidance=1, progress=False)
    with jax.numpy_dtype_promotion("standard"):  # flax promotes dtypes
        drawn = narrow("a cat", **call)
    difference = np.abs(drawn - golden.pipeline("a cat", **call))
    assert 0 < difference.mean() < 0.02


def test_cut_words_are_named(goldens: dict[str, Golden], monkeypatch: pytest.MonkeyPatch):
    warned = []
    monkeypatch.setattr(logging, "warning", lambda text, *values: warned.append(text % values))
    monkeypatch.setattr(pipelines.TextToImage, "_latents", lambda self, *args, **kwargs: np.zeros((1, 8, 8, 4)))
    words = " ".join(f"word{number}" for number in range(60))
    goldens["sd15"].pipeline(words, num_steps=1, output="latents", progress=False)
    (line,) = warned
    start = f"the prompt {words[:40]!r} has more than 75 tokens; these words are cut: "
    assert line.startswith(start) and line.endswith("word59") and "word0" not in line.removeprefix(start)


@pytest.mark.parametrize("options,words", [
    (dict(prompt=[]), r"prompt: expected a text or several, got \[\]"),
    (dict(prompt=3), "prompt: expected a text or several, got 3"),
    (dict(negative_prompt=["a", "b"]), "negative_prompt: expected one text or 1, got 2"),
    (dict(guidance=float("nan")), "guidance: expected a finite number, got nan"),
    (dict(guidance="7"), "guidance: expected a finite number, got '7'"),
    (dict(sampler="ddpm"), "sampler: expected one of pndm, ddim, euler, dpmpp, deis; got 'ddpm'"),
    (dict(num_steps=0), "num_steps: expected a whole number of at least 1, got 0"),
    (dict(num_steps=2.5), "num_steps: expected a whole number of at least 1, got 2.5"),
    (dict(num_steps=1001), "num_steps: expected 1 to 1000, got 1001"),
    (dict(height=64.0), "height: expected a multiple of 8, got 64.0"),
    (dict(noise=np.full((1, 8, 8, 4), np.nan)), "noise: expected finite numbers"),
    (dict(image=np.zeros((64, 64, 4))), r"or latents \(B, h, w, 4\), got \(64, 64, 4\)"),
    (dict(seed=-1), r"seed: expected 0 to 2\*\*31 - 1, got -1"),
    (dict(height=60), "height: expected a multiple of 8, got 60"),
    (dict(width=0), "width: expected a multiple of 8, got 0"),
    (dict(noise=np.zeros((1, 4, 8, 8))), r"noise: expected shape \(1, 4, 8, 4\), got \(1, 4, 8, 8\)"),
    (dict(strength=0.5), "strength: expected None without an image, got 0.5"),
    (dict(image=np.zeros((64, 64, 3)), strength=0.0), "strength: expected at least 1 / 50 and at most 1, got 0.0"),
    (dict(image=np.zeros((64, 64))), r"image: expected \(H, W, 3\), \(B, H, W, 3\) or latents .*, got \(64, 64\)"),
    (dict(image=np.full((64, 64, 3), 255)), "image: expected numbers from 0 to 1, got 255.0 to 255.0"),
    (dict(image=np.zeros((64, 64, 3)), height=72), "height: expected 64, as the image has, got 72"),
    (dict(image=np.zeros((2, 64, 64, 3))), "image: expected 1 or 1, as there are images to draw, got 2"),
    (dict(output="pixels"), "output: expected one of image, latents; got 'pixels'"),
    (dict(crop=(0, 1)), r"crop: expected None, since this model takes no sizes, got \(0, 1\)"),
    (dict(num_images=0), "num_images: expected a whole number of at least 1, got 0"),
    (dict(numbers=[0, 1]), r"numbers: expected 1 whole numbers, got int64 \(2,\)"),
])  # fmt: skip
def test_bad_arguments(goldens: dict[str, Golden], options: dict[str, Any], words: str):
    with pytest.raises(ValueError, match=words):
        goldens["sd15"].pipeline(**{"prompt": "a cat", **options})


@pytest.mark.parametrize("options,words", [
    (dict(crop=(0, -1)), r"crop: expected two whole numbers of at least 0, got \(0, -1\)"),
    (dict(original_size=512), "original_size: expected two whole numbers of at least 0, got 512"),
])  # fmt: skip
def test_bad_sizes_of_sdxl(goldens: dict[str, Golden], options: dict[str, Any], words: str):
    with pytest.raises(ValueError, match=words):
        goldens["sdxl"].pipeline("a cat", **options)


def test_settings_tell_what_changes_an_image(goldens: dict[str, Golden]):
    pipeline = goldens["sd15"].pipeline
    settings = pipeline.settings(num_steps=3)
    assert settings["mixer"] == {"name": "attention", "alignment": None, "chunk": 4}
    assert (settings["guidance"], settings["sampler"], settings["size"]) == (7.5, "pndm", [64, 64])
    assert settings["scheduler"]["beta_end"] == 0.012 and len(settings["parameters"]) == 64
