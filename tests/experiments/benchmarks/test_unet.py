from typing import Any

import pytest
from flax import nnx

from experiments import tables
from experiments.benchmarks import unet
from gspn_jax.models import UNET_SIZES

TINY = dict(widths=(32,), depths=(1,), blocks=1, num_heads=2, context_width=8)


def test_small_networks_of_linfusion_are_those_of_the_release():
    def width(model: str) -> int:
        mixer: Any = unet.mixer_of(model, "linfusion")(32, num_heads=2, rngs=nnx.Rngs(0))
        return mixer.query_network.norm.num_features

    assert (width("sd15"), width("sdxl")) == (32, 2)


def test_shapes_of_the_inputs():
    latents, timestep, context, text_embeds, time_ids = unet.input_shapes("sdxl", 1024, 2)
    assert latents.shape == (2, 128, 128, 4) and timestep.shape == (2,)
    assert context.shape == (2, 77, 2048) and (text_embeds.shape, time_ids.shape) == ((2, 1280), (2, 6))
    assert len(unet.input_shapes("sd15", 512, 1)) == 3
    with pytest.raises(ValueError, match="size: expected a multiple of 8, got 100"):
        unet.input_shapes("sd15", 100, 1)


def test_a_mixer_has_a_row(monkeypatch, tmp_path):
    monkeypatch.setitem(UNET_SIZES, "sd15", TINY)
    options = dict(size=16, batch_size=1, dtype="float32", implementation=None, repeats=2)
    (row,) = unet.run("sd15", ["attention"], str(tmp_path / "unet.csv"), **options)
    about, (written,) = tables.read(tmp_path / "unet.csv")
    assert "hardware" in about and written == {key: str(value) for key, value in row.items()}
    assert (row["mixer"], row["implementation"]) == ("attention", "none") and row["gmacs"] > 0
    assert 0 < row["least_s"] <= row["median_s"] < row["compile_s"]
