import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gspn_jax.mixers import Mamba2Mixer, MambaMixer, state_space
from tests.tolerances import assert_close

RNG = np.random.default_rng(0)


def parameter(variable):
    return np.asarray(variable[...], np.float64)


def silu(array):
    return array / (1 + np.exp(-array))


def softplus(array):
    return np.log1p(np.exp(array))


def numpy_scan(u, step, rate, write, read):
    """The state, token by token. u, step: (L, C); rate: (C, N); write, read: (L, C, N)."""
    state, y = np.zeros(rate.shape), np.zeros(u.shape)
    for t in range(len(u)):
        state = np.exp(-step[t][:, None] * rate) * state + (step[t] * u[t])[:, None] * write[t]
        y[t] = (state * read[t]).sum(1)
    return y


def numpy_parts(mixer, tokens):
    """u, step, rate, B and C of a mixer without convolution, with one column for each channel: (L, C) or (L, C, N)."""
    projected = tokens @ parameter(mixer.widen.kernel)
    if isinstance(mixer, MambaMixer):
        u, rank = silu(projected), mixer.step.in_features
        selected = u @ parameter(mixer.select.kernel)
        step = softplus(selected[:, :rank] @ parameter(mixer.step.kernel) + parameter(mixer.step.bias))
        write, read = (array[:, None] for array in np.split(selected[:, rank:], 2, axis=1))
        return u, step, np.exp(parameter(mixer.log_rate)), write, read, parameter(mixer.skip)
    mixed, step = projected[:, : -mixer.heads], projected[:, -mixer.heads :]
    size, states = mixer.inner // mixer.heads, mixer.groups * mixer.state
    u, write, read = np.split(silu(mixed), [mixer.inner, mixer.inner + states], axis=1)
    # head h uses group h // (heads / groups)
    write, read = (
        array.reshape(-1, mixer.groups, mixer.state).repeat(mixer.inner // mixer.groups, axis=1)
        for array in (write, read)
    )
    step = softplus(step + parameter(mixer.step_bias)).repeat(size, axis=1)
    rate = np.tile(np.exp(parameter(mixer.log_rate)).repeat(size)[:, None], mixer.state)
    return u, step, rate, write, read, parameter(mixer.skip).repeat(size)


def numpy_mixer(mixer, x, normalised):
    y = np.zeros_like(x)
    for image, tokens in enumerate(x.reshape(len(x), -1, x.shape[-1])):
        total, weight, skipped = 0, 0, 0
        for order in (slice(None), slice(None, None, -1)):
            u, *parts, skip = numpy_parts(mixer, tokens[order])
            total += numpy_scan(u, *parts)[order]
            weight += numpy_scan(np.ones_like(u), *parts)[order]
            skipped += (skip * u)[order]
        total = total / (weight + 1e-4) if normalised else total
        y[image] = ((total + skipped) @ parameter(mixer.narrow.kernel)).reshape(x.shape[1:])
    return y


@pytest.mark.parametrize(
    "build,options", [(MambaMixer, dict(state=3)), (Mamba2Mixer, dict(state=3, head_dim=4, groups=2))]
)
@pytest.mark.parametrize("form", ["normalised", pytest.param("plain", marks=pytest.mark.full)])
def test_forms_without_convolution_agree_with_a_loop(build, options, form):
    mixer = build(8, form=form, rngs=nnx.Rngs(0), **options)
    x = RNG.normal(size=(2, 3, 5, 8))
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        mixer.dtype = jnp.float64
        for layer in (mixer.widen, mixer.narrow, *([mixer.select, mixer.step] if build is MambaMixer else [])):
            layer.dtype = jnp.float64
        got = jax.jit(lambda x: mixer(x))(jnp.asarray(x))
    np.testing.assert_allclose(got, numpy_mixer(mixer, x, form == "normalised"), rtol=1e-9, atol=1e-12)


def scans(length):
    """Mamba's recurrence of two channels, and Mamba-2's of two heads of two channels, with random arguments."""
    draw = lambda *shape: jnp.asarray(RNG.normal(size=(2, length, *shape)), jnp.float32)  # noqa: E731
    rates = jnp.asarray(RNG.uniform(1, 4, size=(2, 3)), jnp.float32)
    return (
        (state_space.selective_scan, (draw(2), jax.nn.softplus(draw(2)), rates, draw(3), draw(3))),
        (state_space.grouped_scan, (draw(2, 2), jax.nn.softplus(draw(2)), rates[:, 0], draw(1, 3), draw(1, 3))),
    )


@pytest.mark.full
@pytest.mark.parametrize("length,chunk", [(7, 3), pytest.param(8, 4, marks=pytest.mark.full)])
def test_chunks_change_neither_result_nor_gradients(length, chunk):
    for scan, arguments in scans(length):

        def both(chunk, scan=scan, arguments=arguments):
            y, pull = jax.vjp(lambda *arrays: scan(*arrays, chunk=chunk), *arguments)
            return y, *pull(jnp.cos(y))

        for one, other in zip(*(jax.jit(both, static_argnums=0)(size) for size in (chunk, length)), strict=True):
            assert_close(one, other, tolerance=1e-5)


def test_a_chunk_at_once_equals_a_chunk_token_by_token():
    """The first is what other devices than a CPU run."""
    _, (u, step, rate, write, read) = scans(5)[0]
    state = jnp.asarray(RNG.normal(size=(2, 2, 3)), jnp.float32)
    arrays = state, rate, *(array.swapaxes(0, 1) for array in (u, step, write, read))
    pairs = zip(jax.jit(state_space._at_once)(*arrays), jax.jit(state_space._one_by_one)(*arrays), strict=True)
    for one, other in pairs:
        assert_close(one, other, tolerance=1e-6)


def test_states_within_a_chunk_are_not_kept():
    for scan, arguments in scans(128):
        residuals = jax.eval_shape(lambda *arrays, scan=scan: jax.vjp(scan, *arrays)[1], *arguments)
        given = sum(array.size for array in arguments)
        assert sum(leaf.size for leaf in jax.tree.leaves(residuals)) < given + 2 * 2 * 3 * 3 * 2 + 16


@pytest.mark.parametrize("build", [MambaMixer, Mamba2Mixer])
def test_every_pixel_reaches_every_other(build):
    mixer, x = build(16, state=4, rngs=nnx.Rngs(0)), jnp.asarray(RNG.normal(size=(1, 3, 4, 16)), jnp.float32)
    first, last = (x.at[0, *pixel].add(3.0) for pixel in ((0, 0), (2, 3)))
    same, *others = np.asarray(jax.jit(lambda x: mixer(x))(jnp.concatenate([x, first, last])))
    assert all(np.all(other != same) for other in others)


@pytest.mark.full
@pytest.mark.parametrize("build", [MambaMixer, Mamba2Mixer])
def test_bfloat16_stays_close(build):
    x = jnp.asarray(RNG.normal(size=(1, 3, 4, 16)), jnp.float32)
    wide, narrow = (build(16, state=4, dtype=dtype, rngs=nnx.Rngs(0)) for dtype in (jnp.float32, jnp.bfloat16))
    with jax.numpy_dtype_promotion("standard"):  # flax's layers mix float32 parameters with bfloat16 maps
        got = jax.jit(lambda x: narrow(x))(x)
    assert_close(got, wide(x), dtype="bfloat16", tolerance=0.03)


def test_starts_as_the_released_programs_do():
    abstract = (nnx.eval_shape(lambda b=b: b(320, rngs=nnx.Rngs(0))) for b in (MambaMixer, Mamba2Mixer))
    counts = [sum(leaf.size for leaf in jax.tree.leaves(nnx.state(mixer))) for mixer in abstract]
    assert counts == [675_200, 704_670]
    mamba, mamba2 = MambaMixer(16, state=4, rngs=nnx.Rngs(0)), Mamba2Mixer(16, state=4, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(np.exp(parameter(mamba.log_rate)), [[1, 2, 3, 4]] * 32, rtol=1e-6)
    assert np.all((parameter(mamba2.log_rate) >= 0) & (parameter(mamba2.log_rate) <= np.log(16)))
    for bias in (nnx.state(mamba)["step"]["bias"], mamba2.step_bias):
        step = softplus(parameter(bias))
        assert np.all((step > 0.99e-3) & (step < 0.101))


@pytest.mark.parametrize("build,options,words", [
    (MambaMixer, dict(form="short"), "form: expected one of full, plain, normalised; got 'short'"),
    (MambaMixer, dict(expand=0), "expand: expected a number above 0, got 0"),
    (MambaMixer, dict(rank=0), "rank: expected an integer of at least 1, got 0"),
    (Mamba2Mixer, dict(head_dim=5), "head_dim: expected a divisor of expand . features = 16, got 5"),
    (Mamba2Mixer, dict(head_dim=4, groups=3), "groups: expected a divisor of 4 heads, got 3"),
])  # fmt: skip
def test_bad_arguments(build, options, words):
    with pytest.raises(ValueError, match=words):
        build(8, rngs=nnx.Rngs(0), **options)
