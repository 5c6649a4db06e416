"""Replacements of self-attention against outputs and gradients of the programs that they come from, in float64."""

import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gspn_jax.mixers import MIXERS, GSPNMixer, SoftmaxAttention
from gspn_jax.models.stack import stacked
from gspn_jax.weights.replacements import (
    attention_replacement,
    replacement_arrays,
    replacement_options,
    replacement_rows,
)
from gspn_jax.weights.torch_layouts import filled

FILES = dict(
    gspn="attention_replacement_pure", gspn_qkv="attention_replacement_qkv", linfusion="linfusion_attention",
    mamba="mamba_mixer", mamba2="mamba2_mixer",
)  # fmt: skip


@functools.cache
def golden(mixer: str) -> dict[str, np.ndarray]:
    with np.load(pathlib.Path(__file__).parents[1] / "golden" / "text_to_image" / f"{FILES[mixer]}.npz") as saved:
        return dict(saved)


def starting(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


@pytest.fixture
def wide():
    """float64, and flax's promotion: its norms take their statistics' dtype from two."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        yield


def load(mixer: str, **options: Any) -> Any:
    return attention_replacement(
        starting(golden(mixer), "param/"),
        mixer.removesuffix("_qkv"),
        dtype=jnp.float64,
        param_dtype=jnp.float64,
        **options,
    )


def assert_near(got: Any, want: np.ndarray, name: str = "") -> None:
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-9 * np.abs(want).max(), err_msg=name)


@pytest.mark.parametrize("mixer", ["gspn", "gspn_qkv"])
def test_gspn_of_the_release_and_aligned(wide, mixer):
    tokens = golden(mixer)["tokens"]
    maps = jnp.asarray(tokens, jnp.float64).reshape(2, 8, 8, 16)
    for alignment, name in (("unturned", "out_released"), ("aligned", "out_aligned")):
        loaded = load(mixer, chunk=4, alignment=alignment)
        assert_near(jax.jit(lambda x, loaded=loaded: loaded(x))(maps).reshape(tokens.shape), golden(mixer)[name])


def test_linfusion(wide):
    arrays = golden("linfusion")
    graph, state = nnx.split(load("linfusion", num_heads=int(arrays["heads"])))

    @jax.jit
    def both(state, tokens, grad):
        y, pull = jax.vjp(
            lambda state, x: nnx.merge(graph, state)(x.reshape(2, 4, 6, 16)).reshape(x.shape), state, tokens
        )
        return y, *pull(grad)

    y, grads, of_tokens = both(state, *(jnp.asarray(arrays[name], jnp.float64) for name in ("tokens", "grad_out")))
    assert_near(y, arrays["out"])
    assert_near(of_tokens, arrays["grad_tokens"])
    found = replacement_arrays(dict(nnx.to_flat_state(grads)), (), "")
    for name, want in starting(arrays, "grad/").items():
        assert_near(found[name], want, name)


@pytest.mark.parametrize("mixer", ["mamba", "mamba2"])
def test_mambas_one_way_reversed_and_both_ways(wide, mixer):
    arrays = golden(mixer)
    graph, state = nnx.split(load(mixer, bidirectional=False))

    @jax.jit
    def run(state, tokens, grad):
        def mixed(state, x):
            return nnx.merge(graph, state)(x.reshape(-1, 3, 7, 16)).reshape(x.shape)

        y, pull = jax.vjp(lambda state, x: mixed(state, jnp.concatenate([x, x[:, ::-1]])), state, tokens)
        return y, *pull(jnp.concatenate([grad, jnp.zeros_like(grad)]))

    tokens, grad = (jnp.asarray(arrays[name], jnp.float64) for name in ("tokens", "grad_out"))
    y, grads, of_tokens = run(state, tokens, grad)
    assert_near(y[:2], arrays["out"])
    assert_near(y[2:, ::-1], arrays["out_reversed"])
    assert_near(of_tokens, arrays["grad_tokens"])
    found = replacement_arrays(dict(nnx.to_flat_state(grads)), (), "")
    assert set(found) == set(starting(arrays, "grad/"))
    for name, want in starting(arrays, "grad/").items():
        assert_near(found[name], want, name)
    both = load(mixer)
    want = arrays["out"] + arrays["out_reversed"]
    assert_near(jax.jit(lambda x: both(x))(tokens.reshape(2, 3, 7, 16)).reshape(want.shape), want)


@pytest.mark.parametrize("mixer", FILES)
def test_parameters_go_out_as_they_came_in(mixer):
    arrays = starting(golden(mixer), "param/")
    loaded = attention_replacement(arrays, mixer.removesuffix("_qkv"))
    found = replacement_arrays(dict(nnx.to_flat_state(nnx.state(loaded))), (), "")
    assert set(found) == set(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array.astype(np.float32), err_msg=name)
        assert found[name].flags.c_contiguous


def test_sizes_are_read_off_the_tensors():
    read = {
        mixer: replacement_options(mixer.removesuffix("_qkv"), starting(golden(mixer), "param/")) for mixer in FILES
    }
    gspn = dict(weight_channels=16, out_projection=True)
    assert read == dict(
        gspn=gspn | dict(proxy_rank=2, query_key_value=False),
        gspn_qkv=gspn | dict(proxy_rank=4, query_key_value=True),
        linfusion=dict(inner=16),
        mamba=dict(state=4, conv=4, expand=2, rank=2, form="full"),
        mamba2=dict(state=8, conv=4, expand=2, head_dim=8, groups=1, form="full"),
    )


@pytest.mark.parametrize(
    "mixer,options",
    [("mamba", dict(state=3, rank=2, expand=1.5)), ("mamba2", dict(state=3, head_dim=4, groups=2, expand=1))],
)
def test_mambas_without_convolution_are_told_by_their_tensors(mixer, options):
    plain = MIXERS[mixer](8, form="normalised", rngs=nnx.Rngs(0), **options)
    arrays = replacement_arrays(dict(nnx.to_flat_state(nnx.state(plain))), (), "")
    groups = dict(groups=options["groups"]) if "groups" in options else {}
    assert replacement_options(mixer, arrays, **groups) == options | dict(form="plain")
    loaded = attention_replacement(arrays, mixer, form="normalised", **groups)
    assert nnx.graphdef(loaded) == nnx.graphdef(plain)


def test_stacked_mixers_are_numbered():
    build = functools.partial(GSPNMixer, 6, proxy_rank=2, weight_channels=3, query_key_value=True, out_projection=True)

    class Blocks(nnx.Module):
        def __init__(self, *, rngs):
            self.mixers = stacked(build, 2, rngs)

    blocks, numbers = Blocks(rngs=nnx.Rngs(0)), ["3.", "5."]
    state = dict(nnx.to_flat_state(nnx.state(blocks)))
    arrays = replacement_arrays(state, ("mixers",), numbers)
    assert {name.split(".")[0] for name in arrays} == {"3", "5"} and arrays["5.to_v.weight"].shape == (6, 6)
    options = replacement_options("gspn", arrays, "5.")
    assert options == dict(proxy_rank=2, weight_channels=3, query_key_value=True, out_projection=True)
    loaded = filled(Blocks, replacement_rows("gspn", ("mixers",), numbers, options), arrays, kind="stack")
    for path, variable in nnx.to_flat_state(nnx.state(loaded)):
        np.testing.assert_array_equal(variable[...], state[path][...])


def test_bad_input():
    arrays = starting(golden("gspn"), "param/")
    with pytest.raises(ValueError, match="mixer: expected one of gspn, linfusion, mamba, mamba2; got 'attention'"):
        attention_replacement(arrays, "attention")
    with pytest.raises(ValueError, match=r"x_conv_down\.weight, which is missing"):
        attention_replacement(starting(golden("linfusion"), "param/"), "gspn")
    with pytest.raises(ValueError, match=r"u_conv_up\.weight, which is missing"):
        attention_replacement({name: a for name, a in arrays.items() if name != "u_conv_up.weight"}, "gspn")
    for build in (SoftmaxAttention, functools.partial(GSPNMixer, propagation_channels=4)):
        mixer = nnx.eval_shape(lambda build=build: build(8, rngs=nnx.Rngs(0)))
        with pytest.raises(ValueError, match="mixer: expected the parameters of one of gspn, .*, got "):
            replacement_arrays(dict(nnx.to_flat_state(nnx.state(mixer))), (), "")
