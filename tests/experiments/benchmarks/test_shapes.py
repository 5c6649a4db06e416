import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from experiments.benchmarks import unet
from experiments.benchmarks.scans import shrink
from experiments.benchmarks.shapes import GROUPS, SHAPES, select
from gspn_jax import models
from gspn_jax.mixers import gspn
from pallas_kernels import record_choices
from tests.test_layout import REPOSITORY


@pytest.mark.parametrize(
    "name", ["gspn_t", pytest.param("gspn_s", marks=pytest.mark.full), pytest.param("gspn_b", marks=pytest.mark.full)]
)
def test_classifier_shapes_are_those_of_the_model(name):
    model = nnx.eval_shape(lambda: models.create_model(name, num_classes=1000, rngs=nnx.Rngs(0)))
    with record_choices() as choices:
        nnx.eval_shape(lambda m, x: m(x), model, jax.ShapeDtypeStruct((128, 224, 224, 3), jnp.float32))
    listed = [((s.batch, s.height, s.width, s.channels), s.chunk) for s in GROUPS[name]]
    assert list(dict.fromkeys((choice.shape, choice.chunk) for choice in choices)) == listed


@pytest.mark.full
@pytest.mark.parametrize(
    "model, size, mixer",
    [("sdxl", 1024, "gspn_qkv"), ("sdxl", 2048, "gspn"), ("sd15", 512, "gspn"), ("sd15", 1024, "gspn_qkv")],
)
def test_layers_of_the_unets_are_listed(monkeypatch, model, size, mixer):
    found = set()

    def propagate_low_rank(x, proxy, up, merge, *, chunk, **options):
        found.add((x.shape, chunk, proxy.shape[-1]))
        return x

    monkeypatch.setattr(gspn, "propagate_low_rank", propagate_low_rank)
    network = unet.abstract_unet(model, mixer, "float32")
    nnx.eval_shape(lambda m, *inputs: m(*inputs), network, *unet.input_shapes(model, size, 2))
    listed = {((s.batch, s.height, s.width, s.channels), s.chunk, s.rank) for s in GROUPS["unets"]}
    assert found <= listed and len(found) == {"sd15": 4, "sdxl": 2}[model]


def test_other_shapes_follow_from_the_papers():
    assert [s.channels for s in GROUPS["generators"]] == [8 * math.ceil(width / 8) for width in (900, 1200, 1500)]
    images = {"1k": (1024, 1024), "wide_1k": (768, 1344), "2k": (2048, 2048), "4k": (4096, 4096), "8k": (8192, 8192)}
    images["16k"] = (8192, 16384)
    listed = {s.name: (s.height, s.width, s.channels) for s in GROUPS["sdxl"]}
    assert listed == {
        f"sdxl_{name}_level{level}": (height // 8 // 2**level, width // 8 // 2**level, 320 * 2**level)
        for name, (height, width) in images.items() for level in (1, 2)
    }  # fmt: skip
    # SD-1.5 has attention on 1/8 to 1/64 of the image's side, the last with the channels of the one before.
    maps = {(image // 8 // 2**level, 320 * 2 ** min(level, 2)) for image in (512, 1024) for level in range(4)}
    maps |= {(image // 8 // 2**level, 320 * 2**level) for image in (1024, 2048) for level in (1, 2)}
    assert maps == {(s.height, s.channels) for s in GROUPS["unets"]} and len(GROUPS["unets"]) == 2 * len(maps)
    assert len({s.name for s in SHAPES}) == len(SHAPES)
    assert all(s.channels % s.weight_channels == 0 for s in [*SHAPES, *map(shrink, SHAPES)])
    with pytest.raises(ValueError, match="shapes: expected some of gspn2, .*; got 'gspn3'"):
        select(["gspn3"])


def test_shapes_need_nothing_but_the_standard_library():
    code = (
        "import sys; from experiments.benchmarks import shapes; sys.exit({'jax', 'numpy'} & set(sys.modules) != set())"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY).returncode == 0
