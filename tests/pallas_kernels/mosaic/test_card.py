"""The GPU that kernels are planned for, why one cannot run them, and that whole models choose the kernels on it."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gspn_jax import models
from gspn_jax.mixers import GSPNMixer
from pallas_kernels import implementations, line_scan, record_choices
from pallas_kernels.mosaic import card, primitives

ENOUGH = 227 * 1024
CPU_ONLY = pytest.mark.skipif(jax.default_backend() != "cpu", reason="JAX has a GPU")


@CPU_ONLY
def test_a_cpu_is_no_card():
    assert card.present() == ("JAX runs on the cpu; the kernels need an NVIDIA GPU of compute capability 9.0 or more")
    assert card.planned_for() == card.H200
    assert implementations() == {"mosaic": card.present(), "xla": None, "mosaic_interpret": None}


def device(kind, capability, **attributes):
    return types.SimpleNamespace(platform="gpu", device_kind=kind, compute_capability=capability, **attributes)


@pytest.mark.parametrize("found,words", [
    (device("NVIDIA A100", "8.0"), "NVIDIA A100 has compute capability 8.0; the kernels need 9.0"),
    (device("NVIDIA L4", "8.9"), "NVIDIA L4 has compute capability 8.9; the kernels need 9.0"),
    (device("AMD Instinct MI300X", "gfx942"), "AMD Instinct MI300X reports no CUDA compute capability"),
    (types.SimpleNamespace(platform="gpu", device_kind="unknown"), "unknown reports no CUDA compute capability"),
    (device("NVIDIA RTX 5090", "12.0", shared_memory_per_block_optin=101376),
     "NVIDIA RTX 5090 gives a CTA 101376 bytes of shared memory; the kernels need 232448"),
])  # fmt: skip
def test_why_a_gpu_cannot_run_the_kernels(monkeypatch, found, words):
    monkeypatch.setattr(card.jax, "devices", lambda: [found])
    assert words in str(card.present())
    assert words in str(implementations()["mosaic"])


@pytest.mark.parametrize("found,expected", [
    (device("NVIDIA H100", "9.0", core_count=114, shared_memory_per_block_optin=ENOUGH), ((9, 0), 114, ENOUGH)),
    (device("NVIDIA B200", "10.0", core_count=148, shared_memory_per_block_optin=ENOUGH), ((10, 0), 148, ENOUGH)),
    (device("NVIDIA H100", "9.0"), ((9, 0), 132, ENOUGH)),
])  # fmt: skip
def test_a_gpu_that_can(monkeypatch, found, expected):
    monkeypatch.setattr(card.jax, "devices", lambda: [found])
    assert card.present() == card.planned_for() == card.Card(found.device_kind, *expected)
    assert implementations()["mosaic"] is None


def choice_of(*arrays):
    with record_choices() as choices:
        jax.eval_shape(lambda *a: line_scan(*a, direction="down"), *arrays)
    return choices[0].implementation


@CPU_ONLY
def test_assuming_a_card_changes_the_choice():
    x = jax.ShapeDtypeStruct((1, 5, 6, 8), jnp.bfloat16)
    arrays = x, jax.ShapeDtypeStruct((1, 5, 6, 3, 8), jnp.float32), x
    assert choice_of(*arrays) == "xla"
    with card.assume(card.H200):
        assert implementations()["mosaic"] is None
        assert choice_of(*arrays) == "mosaic"
        with card.assume(card.Card("NVIDIA A100", (8, 0), 108, 166912)):
            assert choice_of(*arrays) == "xla"
        assert choice_of(*arrays) == "mosaic"
    assert choice_of(*arrays) == "xla"


CLASSIFIERS = [name for name, preset in models.PRESETS.items() if preset.network == "classifier"]


@pytest.mark.full
@pytest.mark.parametrize("name,options", [
    *((name, {}) for name in CLASSIFIERS), ("gspn_t", {"weight_channels": 1}),
])  # fmt: skip
def test_every_layer_of_every_preset_takes_the_kernels(monkeypatch, name, options):
    """The model and its gradient are only traced, at an odd size that is about twice that of training."""
    launched = []

    def launch(body, inputs, outputs, made, scratch, *, name, **options):
        launched.append(name)
        return {name: jnp.zeros(array.shape, array.dtype) for name, array in made.items()}

    monkeypatch.setattr(primitives, "launch", launch)
    # Every kind of block: the first of each stage, and up to the eighth where a stage has global and local blocks.
    preset = models.PRESETS[name].options
    depths = (min(n, 8 if stage in preset["global_stages"] else 1) for stage, n in enumerate(preset["depths"]))
    options |= dict(depths=tuple(depths), dtype="bfloat16")
    model = nnx.eval_shape(lambda: models.create_model(name, num_classes=10, rngs=nnx.Rngs(0), **options))
    mixers = [node for _, node in nnx.iter_graph(model) if isinstance(node, GSPNMixer)]
    size = 32 if name == "gspn_nano" else 224
    pixels = 2 * size - 11
    images = jax.ShapeDtypeStruct((2, pixels, pixels, 3), np.float32)
    launched.clear()
    # flax promotes dtypes.
    with jax.numpy_dtype_promotion("standard"), card.assume(card.H200), record_choices() as choices:
        nnx.eval_shape(nnx.grad(lambda module, images: module(images).sum()), model, images)
    assert len(choices) >= len(mixers) and {choice.implementation for choice in choices} == {"mosaic"}
    # Maps are square: each module takes one launch forward and one backward.
    forward, backward = (sum(kernel in name for name in launched) for kernel in ("forward", "backward"))
    forward += launched.count("low_rank_on_chip")
    assert backward == len(mixers) <= forward
