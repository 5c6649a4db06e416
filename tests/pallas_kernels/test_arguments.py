"""Bad arguments raise a ValueError that names the argument, the expected value and the given one."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import implementations, line_scan, propagate
from pallas_kernels.mosaic.tiles import Tile
from tests.pallas_kernels.test_line_scan import draw as draw_scan
from tests.pallas_kernels.test_propagation import draw as draw_maps

SHAPE = (2, 3, 5, 4)


def scan_with(name, value, **options):
    arrays = dict(zip(("x", "weights", "lam"), draw_scan(SHAPE, dtype=np.float32), strict=True))
    return line_scan(**{**arrays, "direction": "down", **options, name: value})


def propagate_with(name, value):
    names = ("x", "logits", "lam", "gate", "skip", "merge")
    arrays = dict(zip(names, draw_maps(SHAPE, dtype=np.float32), strict=True))
    return propagate(**{**arrays, name: value})


@pytest.mark.parametrize("name,value,words", [
    ("x", np.zeros((3, 5, 4), np.float32), ("(B, H, W, C)", "(3, 5, 4)")),
    ("x", np.zeros((2, 0, 5, 4), np.float32), ("at least 1", "(2, 0, 5, 4)")),
    ("x", np.zeros(SHAPE, np.int32), ("float32", "int32")),
    ("weights", np.zeros((2, 3, 5, 4), np.float32), ("(B, H, W, 3, C_w)", "(2, 3, 5, 4)")),
    ("weights", np.zeros((2, 3, 5, 2, 4), np.float32), ("(2, 3, 5, 3, 4)", "(2, 3, 5, 2, 4)")),
    ("weights", np.zeros((2, 5, 3, 3, 4), np.float32), ("(2, 3, 5, 3, 4)", "(2, 5, 3, 3, 4)")),
    ("weights", np.zeros((2, 3, 5, 3, 3), np.float32), ("divide C = 4", "got 3")),
    ("weights", jnp.zeros((2, 3, 5, 3, 4), jnp.bfloat16), ("float32", "bfloat16")),
    ("lam", np.zeros((2, 3, 5, 1), np.float32), ("(2, 3, 5, 4)", "(2, 3, 5, 1)")),
    ("lam", np.zeros(SHAPE, bool), ("float32", "bool")),
    ("direction", "north", ("right, down, left, up", "'north'")),
    ("chunk", 0, ("at least 1", "0")), ("chunk", 2.0, ("whole number", "2.0")),
    ("chunk", True, ("whole number", "True")),
    ("implementation", "cuda", ("xla", "'cuda'")), ("implementation", "mosaic", ("cannot run here", "NVIDIA")),
    ("tile", 64, ("Tile", "64")), ("tile", Tile(64, 8), ("xla",)),
    ("batch_axis", 0, ("mesh axis", "0")), ("channel_axis", ("a",), ("mesh axis", "('a',)")),
])  # fmt: skip
def test_line_scan(name, value, words):
    with pytest.raises(ValueError) as error:
        scan_with(name, value)
    assert str(error.value).startswith(f"{name}: ")
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize("name,value,words", [
    ("x", np.zeros((5, 4), np.float32), ("(B, H, W, C)", "(5, 4)")),
    ("logits", np.zeros((2, 3, 5, 4, 4), np.float32), ("(B, H, W, 4, 3, C_w)", "(2, 3, 5, 4, 4)")),
    ("logits", np.zeros((2, 3, 5, 3, 4, 4), np.float32), ("(2, 3, 5, 4, 3, 4)", "(2, 3, 5, 3, 4, 4)")),
    ("logits", np.zeros((2, 3, 5, 4, 3, 8), np.float32), ("divide C = 4", "got 8")),
    ("gate", np.zeros((2, 3, 5, 4), np.float32), ("(2, 3, 5, 4, 4)", "(2, 3, 5, 4)")),
    ("skip", np.zeros((2, 3, 5, 4, 4), np.int8), ("float32", "int8")),
    ("merge", np.zeros((1, 4), np.float32), ("(4,)", "(1, 4)")),
    ("chunk", -1, ("at least 1", "-1")),
    ("alignment", "turned", ("aligned, unturned", "'turned'")),
    ("alignment", "unturned", ("square", "(2, 3, 5, 4)")),
    ("variant", "low_rank", ("scans", "'low_rank'")), ("variant", "scans", ("xla", "'scans'")),
])  # fmt: skip
def test_propagate(name, value, words):
    with pytest.raises(ValueError) as error:
        propagate_with(name, value)
    assert str(error.value).startswith(f"{name}: ")
    assert all(word in str(error.value) for word in words), str(error.value)


def test_implementations_say_why_not():
    known = implementations()
    assert known["xla"] is None and known["mosaic_interpret"] is None
    assert "JAX runs on the cpu" in str(known["mosaic"])
