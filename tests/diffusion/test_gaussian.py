import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gspn_jax.diffusion import GaussianDiffusion
from tests.diffusion.golden import largest_error, read

GOLDEN = read("diffusion")
PROCESS = GaussianDiffusion.linear()


@pytest.fixture
def arrays():
    with jax.enable_x64(True):
        yield [jnp.asarray(GOLDEN[key]) for key in ("x_start", "t", "noise", "model_output", "x_t")]


def test_tables_are_those_of_dit():
    for key, table in {
        "betas": PROCESS.betas,
        "posterior_variance": PROCESS.posterior_variance,
        "posterior_mean_coef1": PROCESS.posterior_mean_of_start,
        "posterior_mean_coef2": PROCESS.posterior_mean_of_current,
    }.items():
        np.testing.assert_allclose(table, GOLDEN[key], rtol=1e-12, atol=1e-12)


def test_noise_and_loss_are_those_of_dit(arrays):
    x_start, t, noise, output, x_t = arrays
    assert largest_error(PROCESS.noised(x_start, t, noise), GOLDEN["x_t"]) < 2e-6
    told = []
    losses = PROCESS.losses(lambda x, timestep: told.append(timestep) or output, x_start, t, noise)
    np.testing.assert_array_equal(told[0], t)
    for name, values in losses.items():
        assert largest_error(values, GOLDEN[name]) < 2e-6, name
    assert largest_error(PROCESS.start_of(x_t, t, noise), GOLDEN["x_start"]) < 1e-5  # at t = 999 divided by 0.006


@pytest.mark.parametrize("count", [250, 50])
def test_respaced_steps_are_those_of_dit(arrays, count):
    x_t, _, _, output, _ = arrays
    process, index = PROCESS.respaced(count), jnp.asarray(GOLDEN[f"respaced{count}_index"])
    np.testing.assert_array_equal(process.timesteps, GOLDEN[f"respaced{count}_timesteps"])
    np.testing.assert_allclose(process.betas, GOLDEN[f"respaced{count}_betas"], rtol=1e-12)
    found = process.predicted(output, x_t, index)
    for name, values in {
        "mean": found.mean, "log_variance": found.log_variance, "variance": jnp.exp(found.log_variance),
        "pred_xstart": found.x_start,
    }.items():  # fmt: skip
        assert largest_error(values, GOLDEN[f"respaced{count}_{name}"]) < 2e-6, name
    clipped = process.predicted(output, x_t, index, clip=0.5)
    np.testing.assert_allclose(clipped.x_start, np.clip(GOLDEN[f"respaced{count}_pred_xstart"], -0.5, 0.5), atol=2e-6)


def test_the_bound_teaches_the_variance_alone(arrays):
    x_start, t, noise, output, _ = arrays

    def bound(output):
        return PROCESS.losses(lambda x, timestep: output, x_start, t, noise)["vb"].sum()

    gradient = np.asarray(jax.grad(bound)(output))
    assert np.all(gradient[..., :4] == 0) and np.any(gradient[..., 4:] != 0)
    without = PROCESS.losses(lambda x, timestep: output[..., :4], x_start, t, noise)
    assert largest_error(without["loss"], GOLDEN["mse"]) < 2e-6 and "vb" not in without


def test_bad_arguments():
    for count in (1, 1001):
        with pytest.raises(ValueError, match=f"num_steps: expected 2 to 1000, got {count}"):
            PROCESS.respaced(count)
    with pytest.raises(ValueError, match="betas: expected a vector of numbers between 0 and 1"):
        GaussianDiffusion(np.array([0.1, 1.0]), np.arange(2))
    with pytest.raises(ValueError, match="timesteps: expected one for each of 2 betas"):
        GaussianDiffusion(np.array([0.1, 0.2]), np.arange(3))
    x = jnp.zeros((1, 2, 2, 4))
    with pytest.raises(ValueError, match="denoiser: expected 4 or 8 channels"):
        PROCESS.losses(lambda x, t: jnp.zeros((1, 2, 2, 5)), x, jnp.zeros(1, int), x)
