import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gspn_jax.diffusion import GaussianDiffusion, Interpolant
from gspn_jax.training.tasks.generation import Generation


class Affine(nnx.Module):
    """x times a scale, plus what each label has; twice the channels where it learns a variance."""

    def __init__(self, doubles: bool):
        self.doubles = doubles
        self.scale, self.label = nnx.Param(jnp.ones(())), nnx.Param(jnp.arange(4.0))

    def __call__(self, x, time, label, *, key=None):
        y = x * self.scale[...] + self.label[...][label].reshape(-1, 1, 1, 1)
        return jnp.concatenate([y, jnp.zeros_like(y)], axis=-1) if self.doubles else y


def task(objective, doubles=False, **options):
    return Generation(lambda rngs: Affine(doubles), num_classes=3, objective=objective, **options)


def batch(count=4000):
    rng = np.random.default_rng(0)
    return {"image": jnp.asarray(rng.integers(0, 256, (count, 2, 2, 3), np.uint8)), "label": jnp.arange(count) % 3}


@pytest.mark.parametrize("objective,doubles", [
    (GaussianDiffusion.linear(), False), (GaussianDiffusion.linear(), True), (Interpolant(), True),
    (Interpolant("gvp"), False),
])  # fmt: skip
def test_loss_is_that_of_the_objective(objective, doubles):
    """Drawn again with NumPy from the same moments: x uniform on -1..1, times uniform."""
    one = task(objective, doubles, label_dropout=0.0)
    params = one.init(jax.random.key(0))
    loss, numbers = jax.jit(one.loss)(params, batch(), jax.random.key(1))
    if isinstance(objective, Interpolant):
        assert not numbers
        t = np.random.default_rng(1).uniform(size=200_000)
        a, s, da, ds = (
            np.asarray(value, np.float64) for value in objective.coefficients(jnp.asarray(t, jnp.float32), jnp.zeros(1))
        )
        # E (a x + s n + label - a' x - s' n)^2 with E x^2 = 1/3, E n^2 = 1.
        want = ((a - da) ** 2 / 3 + (s - ds) ** 2).mean() + 5 / 3
    else:
        assert set(numbers) == ({"mse", "vb"} if doubles else {"mse"})
        share = objective.alphas_bar
        want = (share / 3 + (np.sqrt(1 - share) - 1) ** 2).mean() + 5 / 3
        loss = numbers["mse"]
    assert float(loss) == pytest.approx(want, rel=0.03)


def test_labels_are_dropped_in_training_alone():
    one = task(Interpolant(), label_dropout=0.25)
    params = one.init(jax.random.key(0))
    params["label"] = jnp.array([0.0, 0.0, 0.0, 100.0])
    loss, _ = jax.jit(one.loss)(params, batch(), jax.random.key(1))
    assert float(loss) == pytest.approx(0.25 * 100**2, rel=0.1)
    axes: dict = dict(axis_types=(jax.sharding.AxisType.Auto,) * 2, devices=jax.devices()[:1])
    mesh = jax.make_mesh((1, 1), ("data", "model"), **axes)
    rows = {name: np.asarray(value[:6]) for name, value in batch().items()}
    with jax.set_mesh(mesh):
        whole = one.evaluate(params, [rows | {"mask": np.ones(6, bool)}])
        part = one.evaluate(params, [rows | {"mask": np.arange(6) < 3}])
        again = one.evaluate(params, [rows | {"mask": np.ones(6, bool)}])
        with pytest.raises(ValueError, match="at least one image"):
            one.evaluate(params, [])
    assert whole["loss"] < 10 and whole["images"] == 6 and part["images"] == 3 and whole == again


def test_latents_are_drawn_anew_and_scaled():
    one = task(Interpolant(), latent_scale=0.5)
    mean, log_variance = jnp.full((500, 2, 2, 3), 4.0), jnp.full((500, 2, 2, 3), np.log(9.0))
    latents = {"mean": mean, "log_variance": log_variance}
    x, other = (one.inputs(latents, jax.random.key(seed)) for seed in (0, 1))
    assert float(x.mean()) == pytest.approx(2, abs=0.1) and float(x.std()) == pytest.approx(1.5, abs=0.1)
    assert np.any(np.asarray(x) != np.asarray(other))
    images = one.inputs({"image": jnp.array([0, 255], jnp.uint8).reshape(1, 1, 2, 1)}, jax.random.key(0))
    np.testing.assert_allclose(images.ravel(), [-1, 1])


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"label_dropout: expected a probability in \[0, 1\), got 1"):
        task(Interpolant(), label_dropout=1)
