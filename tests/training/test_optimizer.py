"""Schedule, decay, clipping and moving average against numbers computed by hand in NumPy."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gspn_jax.training.optimizer import OptimizerOptions, decays, learning_rate_schedule, make_optimizer, update_ema


def numpy_schedule(step: int, *, peak: float, first: float, last: float, warmup: int, total: int) -> float:
    if step < warmup:
        return first + (peak - first) * step / warmup
    progress = min((step - warmup) / (total - warmup), 1.0)
    return last + 0.5 * (peak - last) * (1 + math.cos(math.pi * progress))


def test_schedule_matches_numpy_and_scales_with_the_batch():
    options = OptimizerOptions(learning_rate=5e-4, warmup_learning_rate=5e-7, min_learning_rate=5e-6, warmup_steps=20)
    schedule = learning_rate_schedule(options, num_steps=300, batch_size=2048)
    got = np.array([schedule(step) for step in range(310)])
    want = [numpy_schedule(step, peak=2e-3, first=2e-6, last=2e-5, warmup=20, total=300) for step in range(310)]
    np.testing.assert_allclose(got, want, rtol=2e-5)
    np.testing.assert_allclose(got, want, rtol=0, atol=1.2e-7 * 2e-3)
    assert (
        got[0] == pytest.approx(2e-6, rel=2e-5) and got[20] == pytest.approx(2e-3) and got[300] == pytest.approx(2e-5)
    )
    assert got.argmax() == 20


@pytest.mark.parametrize(("warmup", "total"), [(0, 1), (0, 50), (1, 2), (20, 300), (49, 50)])
def test_schedule_is_exact_in_float64(warmup: int, total: int):
    options = OptimizerOptions(
        learning_rate=5e-4, warmup_learning_rate=5e-7, min_learning_rate=5e-6, warmup_steps=warmup
    )
    steps = range(total + 3)
    with jax.enable_x64(True):
        schedule = learning_rate_schedule(options, num_steps=total, batch_size=512)
        got = np.asarray([schedule(step) for step in steps])
    want = [numpy_schedule(step, peak=5e-4, first=5e-7, last=5e-6, warmup=warmup, total=total) for step in steps]
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, want, rtol=1e-7)


def test_schedule_without_warmup_starts_at_the_peak():
    schedule = learning_rate_schedule(OptimizerOptions(learning_rate=1e-3), num_steps=10, batch_size=512)
    assert float(schedule(0)) == pytest.approx(1e-3)


def test_decay_leaves_vectors_alone_whatever_their_singleton_axes():
    shapes = {
        "bias": (8,), "norm": (1, 1, 1, 8), "merge": (4,), "scalar": (), "kernel": (3, 8), "depthwise": (7, 7, 1, 8),
        "pointwise": (1, 1, 8, 16), "column": (8, 1),
    }  # fmt: skip
    got = {name for name, shape in shapes.items() if decays(jax.ShapeDtypeStruct(shape, jnp.float32))}
    assert got == {"kernel", "depthwise", "pointwise"}


def test_three_steps_of_adamw_match_numpy():
    options = OptimizerOptions(learning_rate=1e-2, min_learning_rate=1e-3, weight_decay=0.1, clip=1.0)
    optimizer = make_optimizer(options, num_steps=3, batch_size=512)
    rng = np.random.default_rng(0)
    params = {"kernel": rng.normal(size=(3, 4)), "bias": rng.normal(size=4)}
    ours: Any = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
    state = optimizer.init(ours)
    m = {name: np.zeros_like(leaf) for name, leaf in params.items()}
    v = {name: np.zeros_like(leaf) for name, leaf in params.items()}
    for step in range(3):
        grads = {name: rng.normal(size=leaf.shape) for name, leaf in params.items()}
        updates, state = optimizer.update(jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), grads), state, ours)
        ours = optax.apply_updates(ours, updates)
        norm = math.sqrt(sum((grad**2).sum() for grad in grads.values()))
        assert norm > 1  # so that clipping is tested
        rate = numpy_schedule(step, peak=1e-2, first=0, last=1e-3, warmup=0, total=3)
        for name in params:
            grad = grads[name] / norm
            m[name] = 0.9 * m[name] + 0.1 * grad
            v[name] = 0.999 * v[name] + 0.001 * grad**2
            change = (m[name] / (1 - 0.9 ** (step + 1))) / (np.sqrt(v[name] / (1 - 0.999 ** (step + 1))) + 1e-8)
            decay = 0.1 * params[name] if name == "kernel" else 0.0
            params[name] = params[name] - rate * (change + decay)
    for name in params:
        np.testing.assert_allclose(ours[name], params[name], rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize(("warmup", "decays"), [(False, (0.9, 0.9, 0.9)), (True, (0.1, 2 / 11, 0.25))])
def test_moving_average_numbers(warmup: bool, decays: tuple[float, ...]):
    options = OptimizerOptions(ema_decay=0.9, ema_warmup=warmup)
    ema, want = {"w": jnp.full(2, 1.0)}, 1.0
    for step, (value, decay) in enumerate(zip((3.0, -2.0, 5.0), decays, strict=True)):
        ema = update_ema(ema, {"w": jnp.full(2, value)}, jnp.int32(step), options)
        want = decay * want + (1 - decay) * value
    np.testing.assert_allclose(ema["w"], [want, want], rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        *(
            (name, (-1.0, math.nan, math.inf))
            for name in ("learning_rate", "warmup_learning_rate", "min_learning_rate")
        ),
        *((name, (-5.0, math.nan, math.inf)) for name in ("clip", "weight_decay")),
        *((name, (-0.1, 1, 1.5, math.nan)) for name in ("b1", "b2", "ema_decay")),
        ("eps", (-1.0, 0.0, math.nan, math.inf)),
        ("warmup_steps", (-1, 2.5, math.nan)),
    ],
)
def test_bad_options_are_named(name: str, values: tuple[float, ...]):
    for value in values:
        with pytest.raises(ValueError, match=f"^{name}: expected a.* got {value}$"):
            OptimizerOptions(**{name: value})  # pyright: ignore[reportArgumentType]


def test_warmup_that_leaves_no_step_is_refused():
    with pytest.raises(ValueError, match="warmup_steps: expected fewer than the 10 steps"):
        learning_rate_schedule(OptimizerOptions(warmup_steps=10), num_steps=10, batch_size=512)
