import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gspn_jax.diffusion import GaussianDiffusion, SampleNoise, guided, samplers
from tests.diffusion.golden import largest_error, read

GOLDEN = read("schedulers")
STABLE = GaussianDiffusion.scaled_linear()
SPACINGS = {
    "ddim": samplers.steps(STABLE, 8, "leading", final_alpha_bar=STABLE.alphas_bar[0]),
    "euler": samplers.steps(STABLE, 8, "leading"),
    "dpmpp": samplers.steps(STABLE, 8, "linspace"),
}
SAMPLERS = {"ddim": samplers.ddim, "euler": samplers.euler, "dpmpp": samplers.dpm_solver}


@pytest.mark.parametrize("name", SAMPLERS)
def test_trajectories_are_those_of_diffusers(name):
    visited, inputs = SPACINGS[name], []
    np.testing.assert_array_equal(visited.timesteps, GOLDEN[f"{name}_timesteps"])
    with jax.enable_x64(True):
        eps, place = jnp.asarray(GOLDEN["eps"]), np.zeros(1000, int)
        place[visited.timesteps] = np.arange(8)

        def denoiser(x, timestep):
            jax.debug.callback(lambda seen: inputs.append(np.asarray(seen)), x, ordered=True)
            return eps[jnp.asarray(place)[timestep[0]]]

        end = jax.jit(functools.partial(SAMPLERS[name], denoiser, visited=visited))(jnp.asarray(GOLDEN["start"]))
        jax.effects_barrier()
    assert largest_error(end, GOLDEN[f"{name}_trajectory"][-1]) < 1e-5
    assert largest_error(np.stack(inputs), GOLDEN[f"{name}_scaled_input"]) < 1e-5


@pytest.mark.parametrize("count", [250, 50])
def test_a_step_of_ddim_is_that_of_dit(count):
    golden = read("diffusion")
    process = GaussianDiffusion.linear().respaced(count)
    with jax.enable_x64(True):
        for k, index in enumerate(golden[f"respaced{count}_index"]):
            before = np.append(1.0, process.alphas_bar)[index]
            step = samplers.Steps(process.timesteps[[index]], np.array([process.alphas_bar[index], before]))
            output = jnp.asarray(golden["model_output"][[k]])
            x = samplers.ddim(lambda x, t, output=output: output, jnp.asarray(golden["x_start"][[k]]), step)
            assert largest_error(x, golden[f"respaced{count}_ddim0"][[k]]) < 2e-6


MEAN, SPREAD = 1.5, 0.5
PROCESS = GaussianDiffusion.linear()


def noise_of_gaussian(x, timestep):
    """Returns the expected noise for normally distributed data."""
    share = jnp.asarray(PROCESS.alphas_bar, x.dtype)[timestep].reshape(-1, *[1] * (x.ndim - 1))
    variance = share * SPREAD**2 + 1 - share
    return jnp.sqrt(1 - share) / variance * (x - jnp.sqrt(share) * MEAN)


def test_deterministic_samplers_turn_noise_into_data():
    start = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3, 2, 1)), jnp.float32)
    want = MEAN + SPREAD * np.asarray(start)

    def error(sampler, count):
        run = functools.partial(sampler, noise_of_gaussian, visited=samplers.steps(PROCESS, count))
        return np.abs(np.asarray(jax.jit(run)(start)) - want).max()

    for sampler in (samplers.ddim, samplers.euler):
        errors = [error(sampler, count) for count in (100, 200)]
        assert errors[1] < 0.03 and 1.7 < errors[0] / errors[1] < 2.4, (sampler, errors)
    for sampler, share in ((samplers.dpm_solver, 0.8), (samplers.pndm, 0.25), (samplers.deis, 0.4)):
        assert error(sampler, 100) < share * error(samplers.ddim, 100), sampler


@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_random_samplers_have_the_distribution_of_the_data(name):
    noise = SampleNoise(0, jnp.arange(4))
    start = noise.draw(0, (50, 50, 1))
    if name == "ddpm":
        sample = functools.partial(samplers.ddpm, noise_of_gaussian, process=PROCESS, noise=noise)
    else:
        visited = samplers.steps(PROCESS, 1000)
        sample = functools.partial(samplers.ddim, noise_of_gaussian, visited=visited, eta=1.0, noise=noise)
    x = np.asarray(jax.jit(lambda start: sample(start=start))(start))
    assert abs(x.mean() - MEAN) < 0.02 and abs(x.std() - SPREAD) < 0.03, (x.mean(), x.std())


def test_a_sample_does_not_depend_on_its_batch():
    def sample(numbers):
        noise = SampleNoise(7, jnp.asarray(numbers))
        start = noise.draw(0, (3, 3, 2))
        return samplers.ddpm(noise_of_gaussian, start, PROCESS.respaced(5), noise)

    whole = np.asarray(sample(range(6)))
    np.testing.assert_allclose(np.concatenate([sample([0, 1]), sample([2, 3, 4, 5])]), whole, atol=1e-6)
    assert np.abs(whole[0] - whole[1]).max() > 0.1
    one, other = (SampleNoise(seed, jnp.arange(1)).draw(0, (9,)) for seed in (7, 8))
    assert np.abs(np.asarray(one - other)).max() > 0.1


def test_progress_is_called_after_each_step():
    calls = []
    start = jnp.zeros((1, 2, 2, 1))
    visited = samplers.steps(PROCESS, 7)
    run = jax.jit(lambda x: samplers.euler(noise_of_gaussian, x, visited, progress=lambda: calls.append(1)))
    jax.block_until_ready(run(start))
    jax.effects_barrier()
    assert len(calls) == 7


def test_steps_by_hand():
    process = GaussianDiffusion.linear(num_steps=10)
    for spacing, want in {
        "ends": [9, 6, 3, 0], "leading": [7, 5, 3, 1], "trailing": [9, 7, 4, 1], "linspace": [9, 7, 4, 2],
    }.items():  # fmt: skip
        visited = samplers.steps(process, 4, spacing)
        np.testing.assert_array_equal(visited.timesteps, want, err_msg=spacing)
        np.testing.assert_array_equal(visited.alphas_bar, [*process.alphas_bar[want], 1])
    np.testing.assert_array_equal(samplers.steps(process, 1).timesteps, [9])


def linear_denoiser(x, time, labels):
    """Returns eight channels from x's four; labels and times change each."""
    size = (labels.astype(time.dtype) + 1.0 + time).reshape(-1, 1, 1, 1)
    return jnp.concatenate([x * size, x + size], axis=-1)


def test_guidance_by_hand():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 3, 4)), jnp.float32)
    labels, time = jnp.array([0, 2]), jnp.array([1.0, 5.0])
    conditional = np.asarray(linear_denoiser(x, time, labels))
    unconditional = np.asarray(linear_denoiser(x, time, jnp.array([9, 9])))
    mixed = unconditional + 3 * (conditional - unconditional)
    run = functools.partial(guided, linear_denoiser, labels, no_class=9)
    np.testing.assert_array_equal(run(scale=1.0)(x, time), conditional)
    for count, channels in ((4, None), (3, 3)):
        got = np.asarray(run(scale=3.0, channels=channels)(x, time))
        np.testing.assert_allclose(got[..., :count], mixed[..., :count], rtol=1e-5)
        np.testing.assert_array_equal(got[..., count:], conditional[..., count:])
    got = np.asarray(run(scale=3.0, interval=(2, 6))(x, time))
    np.testing.assert_allclose(got[0], conditional[0], rtol=1e-6)
    np.testing.assert_allclose(got[1, ..., :4], mixed[1, ..., :4], rtol=1e-5)


def test_bad_arguments():
    with pytest.raises(ValueError, match="count: expected 1 to 1000 steps, got 1001"):
        samplers.steps(PROCESS, 1001)
    with pytest.raises(ValueError, match="spacing: expected one of ends, leading, trailing, linspace; got 'even'"):
        samplers.steps(PROCESS, 10, "even")
    with pytest.raises(ValueError, match=r"noise: expected a SampleNoise, since eta is 0\.5"):
        samplers.ddim(noise_of_gaussian, jnp.zeros((1, 1)), samplers.steps(PROCESS, 2), eta=0.5)
    with pytest.raises(ValueError, match="interval: expected a smaller and a larger time"):
        guided(linear_denoiser, jnp.zeros(1, int), scale=2.0, no_class=1, interval=(5, 2))
