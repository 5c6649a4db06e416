import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gspn_jax.diffusion import schedulers
from tests.diffusion import reference
from tests.diffusion.golden import FOLDER, largest_error, read

ARRAYS: dict[str, dict[str, Any]] = {name: read(f"text_to_image/pipeline_{name}") for name in ("sd15", "sdxl")}
CONFIGS = {
    name: json.loads((FOLDER / "text_to_image" / f"{name}_folder/scheduler/scheduler_config.json").read_text())
    for name in ARRAYS
}
SD15, SDXL = CONFIGS.values()
BOTH = [(name, sampler) for name in ARRAYS for sampler in ("pndm", "ddim", "euler", "dpmpp")]
ABAR = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
SIGMA = np.sqrt(1 / ABAR - 1)


def sampled(scheduler, denoiser, x, steps):
    """Returns the end of a run, and the denoiser's inputs."""
    inputs = []

    def told(x, timestep):
        assert timestep.shape == x.shape[:1]
        jax.debug.callback(lambda seen: inputs.append(np.asarray(seen)), x, ordered=True)
        return denoiser(x, timestep.reshape(-1, *[1] * (x.ndim - 1)))

    end = np.asarray(jax.jit(lambda x: scheduler.sample(told, x, steps))(jnp.asarray(x)))
    jax.effects_barrier()
    assert end.dtype == x.dtype and len(inputs) == len(steps.timesteps)
    return end, np.stack(inputs)


@pytest.mark.parametrize("name, sampler", BOTH)
def test_tables_are_those_of_diffusers(name, sampler):
    arrays, config = ARRAYS[name], CONFIGS[name]
    scheduler = schedulers.from_config(config, sampler)
    steps = scheduler.steps(int(arrays["steps"]))
    np.testing.assert_allclose(steps.timesteps, arrays[f"timesteps_{sampler}"], rtol=1e-6)
    np.testing.assert_allclose(scheduler.started(jnp.ones(1), steps), arrays[f"init_noise_sigma_{sampler}"], rtol=1e-5)
    if sampler in ("euler", "dpmpp"):
        np.testing.assert_allclose(np.sqrt(1 / steps.alphas_bar - 1), arrays[f"sigmas_{sampler}"], rtol=2e-5)
    resolved = json.loads(str(arrays[f"config_{sampler}"]))
    known = schedulers.DEFAULTS[sampler]
    assert {key: config.get(key, default) for key, default in known.items()} == {key: resolved[key] for key in known}
    again = schedulers.from_config(resolved, sampler).steps(int(arrays["steps"]))
    np.testing.assert_array_equal(again.alphas_bar, steps.alphas_bar)


@pytest.mark.parametrize("name, sampler", BOTH)
def test_first_step_of_a_pipeline(name, sampler):
    arrays = ARRAYS[name]
    scheduler = schedulers.from_config(CONFIGS[name], sampler)
    steps = scheduler.steps(int(arrays["steps"]))
    without, given = np.split(arrays[f"unet_out_{sampler}"], 2)
    noise = without + arrays["guidance"].astype(np.float32) * (given - without)
    start = scheduler.started(arrays["noise"], steps)
    _, inputs = sampled(scheduler, lambda x, timestep: jnp.asarray(noise), start, steps)
    assert largest_error(inputs[0], arrays[f"unet_in_{sampler}"][: len(noise)]) < 1e-6
    scale = np.sqrt(steps.alphas_bar[1]) if sampler == "euler" else 1
    assert largest_error(inputs[1], arrays[f"latents_{sampler}"][0] * scale) < 3e-6


@pytest.mark.parametrize(
    "name, sampler", [("sd15", "ddim"), ("sd15", "euler"), ("sd15", "pndm"), ("sdxl", "ddim"), ("sdxl", "euler")]
)
def test_start_of_image_to_image(name, sampler):
    arrays, scheduler = ARRAYS[name], schedulers.from_config(CONFIGS[name], sampler)
    count, strength = int(arrays["i2i_steps"]), float(arrays["i2i_strength"])
    whole, cut = scheduler.steps(count), scheduler.steps(count, strength)
    np.testing.assert_allclose(whole.timesteps, arrays[f"i2i_all_timesteps_{sampler}"], rtol=1e-6)
    np.testing.assert_allclose(cut.timesteps, arrays[f"i2i_timesteps_{sampler}"], rtol=1e-6)
    np.testing.assert_array_equal(cut.alphas_bar, whole.alphas_bar[-len(cut.alphas_bar) :])
    noised = scheduler.noised(arrays["i2i_init_latents"], arrays["i2i_noise"], cut)
    assert largest_error(noised, arrays[f"i2i_noised_{sampler}"]) < 1e-6


# Configuration, sampler, changes, number of steps, first timesteps, last timestep, and x after one call, two, and all,
# for x = 1 in the sampler's scale and noise 0.5 x + 0.1 sin(t / 100): diffusers 0.42.1.
TRAJECTORIES = [
    (SD15, "pndm", {}, 25, [961, 921, 921, 881], 1, (1.127924, 1.115017, 2.322701)),
    (SD15, "pndm", {}, 50, [981, 961, 961, 941], 1, (1.065857, 1.062647, 2.483377)),
    (SD15, "ddim", {}, 25, [961, 921, 881], 1, (1.127924, 1.252402, 2.432132)),
    (SD15, "ddim", {}, 50, [981, 961, 941], 1, (1.065857, 1.131196, 2.545016)),
    (SDXL, "euler", {}, 25, [961, 921, 881], 1, (10.592867, 9.553601, 2.397467)),
    (SDXL, "euler", {}, 50, [981, 961, 941], 1, (12.490561, 11.846903, 2.508743)),
    (SD15, "dpmpp", {}, 25, [999, 959], 40, (1.145987, 1.278015, 2.598428)),
    (SD15, "dpmpp", {}, 50, [999, 979], 20, (1.069829, 1.136355, 2.600527)),
    (SDXL, "dpmpp", {}, 25, [951, 913], 39, (1.116634, 1.219991, 2.221128)),
    (SD15, "dpmpp", {"use_karras_sigmas": True}, 25, [999], 0, (1.104207, 1.208035, 2.590126)),
    (SDXL, "deis", {}, 25, [951, 913], 39, (1.116634, 1.220316, 2.283437)),
]


def noise_of(x, timestep, xp=jnp):
    return 0.5 * x + 0.1 * xp.sin(timestep / 100)


@pytest.mark.parametrize("config, sampler, changes, count, first, last, want", TRAJECTORIES)
def test_scalar_trajectories_are_those_of_diffusers(config, sampler, changes, count, first, last, want):
    scheduler = schedulers.from_config(config | changes, sampler)
    steps = scheduler.steps(count)
    assert steps.timesteps[: len(first)].tolist() == first and steps.timesteps[-1] == last
    with jax.enable_x64(True):
        end, inputs = sampled(scheduler, noise_of, scheduler.started(jnp.ones((1, 1)), steps), steps)
    scale = 1 / np.sqrt(steps.alphas_bar[1:3]) if sampler == "euler" else np.ones(2)
    np.testing.assert_allclose([*(inputs[1:3, 0, 0] * scale), end[0, 0]], want, rtol=5e-6)  # its tables are float32


def predict(x, timestep, xp=np):
    """A noise that is not linear in x."""
    return noise_of(x, timestep, xp) + 0.2 * xp.tanh(x)


START = np.linspace(-2, 2, 6).reshape(2, 3)


def end_of(config, sampler, count, strength=None):
    scheduler = schedulers.from_config(config, sampler)
    steps = scheduler.steps(count, strength)
    with jax.enable_x64(True):
        return sampled(scheduler, functools.partial(predict, xp=jnp), START, steps)[0], steps


@pytest.mark.parametrize("count, strength, timesteps", [
    (1, None, [1]),
    (2, None, [501, 1, 1]),
    (7, None, [853, 711, 711, 569, 427, 285, 143, 1]),
    (7, 1.0, [853, 711, 711, 569, 427, 285, 143, 1]),
    (7, 0.9, [711, 569, 427, 285, 143, 1]),
    (7, 0.8, [711, 569, 427, 285, 143, 1]),
    (7, 0.2, [143, 1]),
])  # fmt: skip
def test_pndm_by_another_program(count, strength, timesteps):
    end, steps = end_of(SD15, "pndm", count, strength)
    assert steps.timesteps.tolist() == timesteps
    repeated = len(timesteps) > 2 and timesteps[1] == timesteps[2]
    want = reference.pndm(predict, START, timesteps, ABAR, 1000 // count, repeated=repeated)
    np.testing.assert_allclose(end, want, rtol=1e-12)


def test_pndm_of_a_cut_list_is_not_late():
    """diffusers takes the second call of a cut list for the repeated one."""
    mean, spread = 1.5, 0.5  # normally distributed data, whose noise and whose path from x to the data are known

    def noise(x, timestep, abar: Any = ABAR):
        share = abar[timestep]
        return (1 - share) ** 0.5 / (share * spread**2 + 1 - share) * (x - share**0.5 * mean)

    def moved(x, before, after):
        variances = [share * spread**2 + 1 - share for share in (before, after)]
        return np.sqrt(after) * mean + np.sqrt(variances[1] / variances[0]) * (x - np.sqrt(before) * mean)

    scheduler = schedulers.from_config(SD15)
    steps = scheduler.steps(50, 0.6)
    with jax.enable_x64(True):
        end, _ = sampled(scheduler, functools.partial(noise, abar=jnp.asarray(ABAR)), START, steps)
    late = reference.pndm(noise, START, steps.timesteps, ABAR, 20, repeated=True)
    errors = [np.abs(x - moved(START, ABAR[steps.timesteps[0]], ABAR[0])).max() for x in (end, late)]
    assert errors[0] < 0.005 and errors[1] > 5 * errors[0], errors


@pytest.mark.parametrize("sampler, program", [("dpmpp", reference.dpm_solver), ("deis", reference.deis)])
@pytest.mark.parametrize("count, changes, strength, first_order_end", [
    (6, {}, None, True),
    (6, {"lower_order_final": False}, None, False),
    (6, {"lower_order_final": False, "euler_at_final": True}, None, True),
    (16, {"timestep_spacing": "trailing"}, None, False),
    (16, {"use_karras_sigmas": True}, 0.3, False),
    (1, {}, None, True),
])  # fmt: skip
def test_solvers_by_another_program(sampler, program, count, changes, strength, first_order_end):
    if sampler == "deis" and "euler_at_final" in changes:
        first_order_end = False  # DEIS has no such key
    config = SD15 | {"final_sigmas_type": "sigma_min"} | changes
    end, steps = end_of(config, sampler, count, strength)
    assert steps.first_order_end == first_order_end
    sigmas = np.sqrt(1 / steps.alphas_bar - 1)
    np.testing.assert_allclose(sigmas[-1], SIGMA[0], rtol=1e-9)
    if "use_karras_sigmas" in changes:
        change = (SIGMA[0] ** (1 / 7) - SIGMA[-1] ** (1 / 7)) / (count - 1)
        np.testing.assert_allclose(np.diff(sigmas[:-1] ** (1 / 7)), change)
    else:
        np.testing.assert_allclose(sigmas[:-1], SIGMA[steps.timesteps], rtol=1e-9)
    want = program(predict, START, steps.timesteps, sigmas, first_order_end=first_order_end)
    np.testing.assert_allclose(end, want, rtol=1e-9)


@pytest.mark.parametrize("sampler", schedulers.CLASSES)
def test_velocity_and_noise_give_the_same(sampler):
    """Euler's timesteps lie between those of the process here."""
    config = SD15 | {"prediction_type": "v_prediction"}
    want, steps = end_of(SD15, sampler, 7)
    scheduler = schedulers.from_config(config, sampler)
    assert scheduler.prediction == "v_prediction"

    def velocity(x, timestep):
        share = jnp.interp(timestep, steps.timesteps[::-1], steps.alphas_bar[-2::-1])
        return (predict(x, timestep, jnp) - jnp.sqrt(1 - share) * x) / jnp.sqrt(share)

    with jax.enable_x64(True):
        end, _ = sampled(scheduler, velocity, START, scheduler.steps(7))
    np.testing.assert_allclose(end, want, rtol=1e-9)


@pytest.mark.parametrize("sampler, spacing, count, want", [
    ("pndm", "leading", 3, [7, 4, 4, 1]),
    ("pndm", "linspace", 4, [9, 6, 6, 3, 0]),
    ("ddim", "leading", 3, [7, 4, 1]),
    ("ddim", "trailing", 4, [9, 7, 4, 1]),
    ("euler", "linspace", 3, [9, 4.5, 0]),
    ("euler", "leading", 3, [7, 4, 1]),
    ("euler", "trailing", 3, [9, 6, 2]),
    ("dpmpp", "leading", 4, [9, 7, 5, 3]),
    ("dpmpp", "linspace", 3, [9, 6, 3]),
    ("deis", "leading", 4, [9, 7, 5, 3]),
    ("deis", "trailing", 4, [9, 7, 4, 1]),
])  # fmt: skip
def test_timesteps_by_hand(sampler, spacing, count, want):
    config = SD15 | {"num_train_timesteps": 10, "timestep_spacing": spacing, "beta_schedule": "linear"}
    scheduler = schedulers.from_config(config, sampler)
    abar = np.cumprod(1 - np.linspace(0.00085, 0.012, 10))
    steps = scheduler.steps(count)
    assert steps.timesteps.tolist() == want
    sigmas = np.sqrt(1 / steps.alphas_bar - 1)
    table = np.sqrt(1 / abar - 1)
    np.testing.assert_allclose(sigmas[:-1], [np.mean(table[[int(t), int(t + 0.5)]]) for t in want], rtol=1e-9)
    np.testing.assert_allclose(sigmas[-1], 0 if sampler in ("euler", "dpmpp") else table[0], rtol=1e-9)


def test_karras_levels_of_euler_lie_between_the_ends_of_its_list():
    steps = schedulers.from_config(SDXL | {"use_karras_sigmas": True}, "euler").steps(5)
    sigmas = np.sqrt(1 / steps.alphas_bar - 1)
    ends = SIGMA[[801, 1]] ** (1 / 7)
    np.testing.assert_allclose(sigmas, [*np.linspace(ends[0], ends[1], 5) ** 7, 0], rtol=1e-9)
    log_sigmas = np.interp(steps.timesteps, np.arange(1000), np.log(SIGMA))
    np.testing.assert_allclose(np.exp(log_sigmas), sigmas[:-1], rtol=1e-9)


def test_absent_keys_take_the_defaults_of_the_class():
    assert schedulers.from_config(SD15).name == "pndm" and schedulers.from_config(SDXL).name == "euler"
    scheduler = schedulers.from_config({"_class_name": "DPMSolverMultistepScheduler"})
    assert (scheduler.spacing, scheduler.offset, scheduler.prediction) == ("linspace", 0, "epsilon")
    np.testing.assert_array_equal(scheduler.process.betas, np.linspace(1e-4, 0.02, 1000))
    ddim = schedulers.from_config({"clip_sample": False}, "ddim")
    assert (ddim.spacing, ddim.final_alpha_bar) == ("leading", 1)
    assert schedulers.from_config({}, "deis").final_alpha_bar == ddim.process.alphas_bar[0]


@pytest.mark.parametrize("sampler, config, message", [
    ("ddpm", {}, "sampler: expected one of pndm, ddim, euler, dpmpp, deis; got 'ddpm'"),
    (None, {}, "_class_name: expected one of PNDMScheduler, .*; got None"),
    (None, {"_class_name": "LCMScheduler"}, "_class_name: .* got 'LCMScheduler'"),
    ("pndm", {}, "skip_prk_steps: expected True, got False, the default of PNDMScheduler"),
    ("ddim", {}, "clip_sample: expected False or None, got True, the default of DDIMScheduler"),
    ("ddim", SD15 | {"thresholding": True}, "thresholding: .* got True$"),
    ("ddim", SD15 | {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr: "),
    ("pndm", SD15 | {"beta_schedule": "squaredcos_cap_v2"}, "beta_schedule: expected 'linear' or 'scaled_linear', got"),
    ("pndm", SD15 | {"trained_betas": [0.1]}, "trained_betas: "),
    ("pndm", SD15 | {"prediction_type": "sample"}, "prediction_type: "),
    ("pndm", SD15 | {"timestep_spacing": "even"}, "timestep_spacing: "),
    ("pndm", SD15 | {"steps_offset": -1}, "steps_offset: expected a whole number, got -1"),
    ("pndm", SD15 | {"num_train_timesteps": "1000"}, "num_train_timesteps: "),
    ("pndm", SD15 | {"beta_end": 12.0}, "beta_end: expected a number between 0 and 1, got 12.0"),
    ("euler", SD15 | {"interpolation_type": "log_linear"}, "interpolation_type: "),
    ("euler", SD15 | {"timestep_type": "continuous"}, "timestep_type: "),
    ("euler", SD15 | {"sigma_min": 0.1}, "sigma_min: "),
    ("euler", SD15 | {"use_beta_sigmas": True}, "use_beta_sigmas: "),
    ("dpmpp", SD15 | {"solver_order": 3}, "solver_order: expected 2, got 3"),
    ("dpmpp", SD15 | {"algorithm_type": "sde-dpmsolver++"}, "algorithm_type: "),
    ("dpmpp", SD15 | {"solver_type": "heun"}, "solver_type: "),
    ("dpmpp", SD15 | {"lambda_min_clipped": -5.1}, "lambda_min_clipped: "),
    ("deis", SD15 | {"use_flow_sigmas": True}, "use_flow_sigmas: "),
])  # fmt: skip
def test_unsupported_values_are_named(sampler, config, message):
    with pytest.raises(ValueError, match=message):
        schedulers.from_config(config, sampler)


@pytest.mark.parametrize("count, strength, message", [
    (0, None, "num_steps: expected 1 to 1000, got 0"),
    (1001, None, "num_steps: expected 1 to 1000, got 1001"),
    (1000, None, r"num_steps: expected a number whose leading timesteps differ and lie in 0\.\.999, got 1000"),
    (10, 0.05, "strength: expected at most 1, and enough to keep one of 10 steps, got 0.05"),
    (10, 1.5, "strength: "),
    (10, float("nan"), "strength: "),
])  # fmt: skip
def test_bad_numbers_of_steps(count, strength, message):
    with pytest.raises(ValueError, match=message):
        schedulers.from_config(SD15).steps(count, strength)


def test_progress_is_called_after_each_call_of_the_network():
    calls, scheduler = [], schedulers.from_config(SD15)
    steps = scheduler.steps(5)
    x = jnp.zeros((1, 2, 2, 4))
    scheduler.sample(lambda x, timestep: x, x, steps, progress=lambda: calls.append(1))
    jax.effects_barrier()
    assert len(calls) == len(steps.timesteps) == 6
