from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gspn_jax.diffusion import Interpolant, SampleNoise, interpolant_samplers
from gspn_jax.diffusion.interpolants import PATHS
from tests.diffusion.golden import largest_error, read

GOLDEN = read("interpolants")


@pytest.mark.parametrize("path", PATHS)
def test_paths_are_those_of_sit(path):
    interpolant = Interpolant(path)
    with jax.enable_x64(True):
        noise, data, t, model = (jnp.asarray(GOLDEN[k]) for k in ("noise", "data", "t", f"{path}_model_velocity"))
        x = interpolant.noised(data, t, noise)
        for name, values in {
            "xt": x, "velocity": interpolant.velocity(data, t, noise), "drift": interpolant.drift(x, t),
            "score_from_velocity": interpolant.score(model, x, t), "diffusion": interpolant.diffusion(t, x),
        }.items():  # fmt: skip
            want = GOLDEN[f"{path}_{name}"]
            assert largest_error(values, want.reshape(np.shape(values))) < 1e-6, name
        losses = interpolant.losses(lambda x, t: model, data, t, noise)["loss"]
        want = ((GOLDEN[f"{path}_model_velocity"] - GOLDEN[f"{path}_velocity"]) ** 2).mean(axis=(1, 2, 3))
        assert largest_error(losses, want) < 1e-6


MEAN, SPREAD = 1.5, 0.5


def velocity_of_gaussian(interpolant):
    """Returns the exact velocity for normally distributed data, for which x_t is normal, too."""

    def denoiser(x, t):
        at = interpolant.coefficients(t, x)
        variance = (at.alpha * SPREAD) ** 2 + at.sigma**2
        change = at.alpha * at.alpha_dt * SPREAD**2 + at.sigma * at.sigma_dt
        return at.alpha_dt * MEAN + change / variance * (x - at.alpha * MEAN)

    return denoiser


@pytest.mark.parametrize("path", PATHS)
def test_the_ode_turns_noise_into_data(path):
    start = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3, 2, 1)), jnp.float32)
    denoiser, want = velocity_of_gaussian(Interpolant(path)), np.asarray(MEAN + SPREAD * start)
    errors = {
        (name, count): np.abs(getattr(interpolant_samplers, name)(denoiser, start, count) - want).max()
        for name in ("euler", "heun") for count in (20, 40)
    }  # fmt: skip
    assert errors["euler", 40] < 0.05 and errors["heun", 40] < 2e-3, errors
    assert 1.7 < errors["euler", 20] / errors["euler", 40] < 2.3  # of first order
    assert 3.3 < errors["heun", 20] / errors["heun", 40] < 4.7  # of second


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("diffusion", interpolant_samplers.DIFFUSIONS)
def test_the_sde_has_the_distribution_of_the_data(path, diffusion):
    interpolant, noise = Interpolant(path), SampleNoise(0, jnp.arange(4))
    start = noise.draw(0, (50, 50, 1))
    sample = jax.jit(
        lambda start: interpolant_samplers.sde(
            velocity_of_gaussian(interpolant), start, 200, noise, interpolant=interpolant, diffusion=diffusion
        )
    )
    x = np.asarray(sample(start))
    assert abs(x.mean() - MEAN) < 0.02 and abs(x.std() - SPREAD) < 0.03, (x.mean(), x.std())


def test_bad_arguments():
    x, noise = jnp.zeros((1, 2)), SampleNoise(0, jnp.arange(1))
    with pytest.raises(ValueError, match="path: expected one of linear, gvp; got 'vp'"):
        Interpolant("vp")
    with pytest.raises(ValueError, match="num_steps: expected at least 1, got 0"):
        interpolant_samplers.euler(lambda x, t: x, x, 0)
    for changes, words in (
        (dict(diffusion="none"), "diffusion: expected one of sigma, path; got 'none'"),
        (dict(last_step=0), "last_step: expected a number between 0 and 1, got 0"),
        (dict(num_steps=1), "num_steps: expected at least 2, got 1"),
    ):
        arguments: Any = dict(num_steps=4, noise=noise, interpolant=Interpolant()) | changes
        with pytest.raises(ValueError, match=words):
            interpolant_samplers.sde(lambda x, t: x, x, **arguments)
