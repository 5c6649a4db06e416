"""Samplers as a published folder's scheduler_config.json sets them, with diffusers' meaning of its keys.

Timesteps, noise levels and samples are those of diffusers, but for three cases in which diffusers loses accuracy:

- PNDM of a cut list (image-to-image): diffusers takes the second call for the repeated one, though that was cut off,
  and its samples are one step behind from there on. Here no call of a cut list is a repeated one.
- PNDM of velocities: diffusers combines the velocities of several steps and converts their sum at the newest step,
  which is first-order accurate only. Here each velocity is converted to noise at its own step.
- DDIM and PNDM with "linspace" or "trailing" timesteps: diffusers steps by T // n, even if the next timestep is at
  another distance. Here a step ends at the next timestep.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from gspn_jax.diffusion import samplers
from gspn_jax.diffusion.gaussian import Denoiser, GaussianDiffusion
from gspn_jax.diffusion.samplers import Progress, Steps

CLASSES = {
    "pndm": "PNDMScheduler",
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "dpmpp": "DPMSolverMultistepScheduler",
    "deis": "DEISMultistepScheduler",
}

_PROCESS = {
    "num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear", "trained_betas": None,
    "prediction_type": "epsilon", "timestep_spacing": "linspace", "steps_offset": 0,
}  # fmt: skip
_SIGMAS = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
_SOLVER = {
    "solver_order": 2, "thresholding": False, "lower_order_final": True, "use_flow_sigmas": False,
    "use_dynamic_shifting": False,
}  # fmt: skip

# What each class reads from a configuration, and its own defaults. Other keys of a file belong to other classes.
DEFAULTS: dict[str, dict[str, Any]] = {
    "pndm": _PROCESS | {"timestep_spacing": "leading", "skip_prk_steps": False, "set_alpha_to_one": False},
    "ddim": _PROCESS | {
        "timestep_spacing": "leading", "clip_sample": True, "set_alpha_to_one": True, "thresholding": False,
        "rescale_betas_zero_snr": False,
    },
    "euler": _PROCESS | _SIGMAS | {
        "interpolation_type": "linear", "sigma_min": None, "sigma_max": None, "timestep_type": "discrete",
        "rescale_betas_zero_snr": False, "final_sigmas_type": "zero",
    },
    "dpmpp": _PROCESS | _SIGMAS | _SOLVER | {
        "algorithm_type": "dpmsolver++", "solver_type": "midpoint", "euler_at_final": False, "use_lu_lambdas": False,
        "final_sigmas_type": "zero", "lambda_min_clipped": -math.inf, "variance_type": None,
        "rescale_betas_zero_snr": False,
    },
    "deis": _PROCESS | _SIGMAS | _SOLVER | {"algorithm_type": "deis", "solver_type": "logrho"},
}  # fmt: skip

_OFF = (False, None)
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "beta_schedule": ("linear", "scaled_linear"),
    "trained_betas": (None,),
    "prediction_type": ("epsilon", "v_prediction"),
    "timestep_spacing": ("leading", "linspace", "trailing"),
    "skip_prk_steps": (True,),
    "final_sigmas_type": ("zero", "sigma_min"),
    "interpolation_type": ("linear",),
    "timestep_type": ("discrete",),
    "solver_order": (2,),
    "lambda_min_clipped": (-math.inf,),
    **dict.fromkeys(("sigma_min", "sigma_max", "variance_type"), (None,)),
    **dict.fromkeys(("clip_sample", "thresholding", "rescale_betas_zero_snr", "use_lu_lambdas"), _OFF),
    **dict.fromkeys(("use_exponential_sigmas", "use_beta_sigmas", "use_flow_sigmas", "use_dynamic_shifting"), _OFF),
}
# The classes take each other's names for their own, so that one file serves both.
_SOLVERS = {
    "dpmpp": {"algorithm_type": ("dpmsolver++", "deis"), "solver_type": ("midpoint", "logrho", "bh1", "bh2")},
    "deis": {
        "algorithm_type": ("deis", "dpmsolver", "dpmsolver++"),
        "solver_type": ("logrho", "midpoint", "heun", "bh1", "bh2"),
    },
}


@dataclasses.dataclass(frozen=True, eq=False)
class Scheduler:
    """A sampler with its settings.

    Attributes:
        name: "pndm", "ddim", "euler", "dpmpp" or "deis".
        process: T steps.
        prediction: the network's output, "epsilon" (noise) or "v_prediction" (velocity).
        spacing: "leading", "linspace" or "trailing" (arXiv 2305.08891, table 2).
        offset: added to "leading" timesteps.
        final_alpha_bar: abar at the end of the last step.
        karras: noise levels as in arXiv 2206.00364, equation 5, in place of those at evenly spaced timesteps.
        first_order_below: "dpmpp" and "deis" end with a first-order step if they make fewer steps than this.
    """

    name: str
    process: GaussianDiffusion
    prediction: str
    spacing: str
    offset: int
    final_alpha_bar: float
    karras: bool
    first_order_below: float

    def steps(self, num_steps: int, strength: float | None = None) -> Steps:
        """Returns the steps to visit.

        Args:
            num_steps: n, at least 1. PNDM calls the network n + 1 times (once if n is 1).
            strength: for image-to-image, above 0 and at most 1: the last int(n strength) steps are kept. None keeps
                all. PNDM keeps one step more, as its list is one longer, but never a repeated call without its first.

        Raises:
            ValueError: a number out of range, or n for which timesteps would repeat or leave the process.
        """
        last = self.process.num_steps - 1
        if not 1 <= num_steps <= last + 1:
            raise ValueError(f"num_steps: expected 1 to {last + 1}, got {num_steps}")
        if strength is not None and not (strength <= 1 and int(num_steps * strength) >= 1):
            raise ValueError(
                f"strength: expected at most 1, and enough to keep one of {num_steps} steps, got {strength}"
            )
        timesteps = self._timesteps(num_steps)
        if timesteps[0] > last or timesteps[-1] < 0 or np.any(np.diff(timesteps) >= 0):
            raise ValueError(
                f"num_steps: expected a number whose {self.spacing} timesteps differ and lie in 0..{last}, "
                f"got {num_steps}"
            )
        timesteps, sigmas = self._levels(timesteps)
        alphas_bar = np.append(1 / (1 + sigmas**2), self.final_alpha_bar)
        cut = 0 if strength is None else num_steps - int(num_steps * strength)
        if self.name == "pndm" and num_steps > 1:
            timesteps, alphas_bar = (np.insert(values, 1, values[1]) for values in (timesteps, alphas_bar))
            cut = 2 if cut == 1 else cut
        first_order_end = num_steps < self.first_order_below
        return Steps(timesteps[cut:], alphas_bar[cut:], self.prediction == "v_prediction", first_order_end)

    def started(self, noise: jax.Array, steps: Steps) -> jax.Array:
        """Returns the sample that a whole run starts from: standard normal noise (B, ...) in the sampler's scale."""
        if self.name != "euler":
            return noise
        variance = 1 / steps.alphas_bar[0] - 1
        return noise * math.sqrt(variance + 1 if self.spacing == "leading" else variance)

    def noised(self, x_start: jax.Array, noise: jax.Array, steps: Steps) -> jax.Array:
        """Returns the sample that a cut run starts from: data (B, ...) with noise (B, ...), in the sampler's scale."""
        alpha_bar = steps.alphas_bar[0]
        if self.name == "euler":
            return x_start + math.sqrt(1 / alpha_bar - 1) * noise
        return math.sqrt(alpha_bar) * x_start + math.sqrt(1 - alpha_bar) * noise

    def sample(self, denoiser: Denoiser, x: jax.Array, steps: Steps, *, progress: Progress | None = None) -> jax.Array:
        """Returns data, (B, ..., C), in the dtype of x. Traceable.

        Args:
            denoiser: the network: (x_t (B, ..., C), timestep (B,)) to noise or velocity, as `prediction` says.
            x: from `started` or `noised`, (B, ..., C).
            steps: from `steps`.
            progress: called on the host after each call of the network.
        """
        run = {
            "pndm": samplers.pndm, "ddim": samplers.ddim, "euler": samplers.exploding_euler,
            "dpmpp": samplers.dpm_solver, "deis": samplers.deis,
        }[self.name]  # fmt: skip
        return run(denoiser, x, steps, progress=progress)

    def _timesteps(self, count: int) -> np.ndarray:
        """Returns (count,) timesteps from noise to data, integers except for "euler" with "linspace"."""
        total = self.process.num_steps
        if self.spacing == "trailing":
            return np.round(total - np.arange(count) * (total / count)).astype(int) - 1
        # The multistep solvers leave the smallest of count + 1 timesteps to the end of the last step.
        left = 1 if self.name in ("dpmpp", "deis") else 0
        if self.spacing == "leading":
            kept = np.arange(count + left) * (total // (count + left)) + self.offset
        else:
            kept = np.linspace(0, total - 1, count + left)
            kept = kept if self.name == "euler" else np.round(kept).astype(int)
        return kept[left:][::-1]

    def _levels(self, timesteps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns timesteps and their sigma = sqrt(1 / abar - 1), both (n,): Karras' levels if they are asked for."""
        table, numbers = np.sqrt(1 / self.process.alphas_bar - 1), np.arange(self.process.num_steps)
        sigmas = np.interp(timesteps, numbers, table)
        if not self.karras:
            return timesteps, sigmas
        # Euler's levels lie between the first and the last of its list, the others' between the ends of the process.
        first, last = sigmas[[0, -1]] if self.name == "euler" else table[[-1, 0]]
        sigmas = np.linspace(first ** (1 / 7), last ** (1 / 7), len(timesteps)) ** 7
        timesteps = np.interp(np.log(sigmas), np.log(table), numbers)
        return timesteps if self.name == "euler" else np.round(timesteps).astype(int), sigmas


def from_config(config: Mapping[str, Any], sampler: str | None = None) -> Scheduler:
    """Returns the sampler that a scheduler_config.json describes.

    Args:
        config: the file's mapping. An absent key takes the default of the sampler's class in diffusers; a key that the
            class does not know is ignored.
        sampler: a name of `CLASSES`; None takes that of the file's "_class_name".

    Raises:
        ValueError: an unknown sampler, or a value that is not supported; the message names the key.
    """
    if sampler is None:
        names = {class_name: name for name, class_name in CLASSES.items()}
        given = config.get("_class_name")
        if given not in names:
            raise ValueError(f"_class_name: expected one of {', '.join(names)}; got {given!r}")
        sampler = names[given]
    if sampler not in CLASSES:
        raise ValueError(f"sampler: expected one of {', '.join(CLASSES)}; got {sampler!r}")
    chosen = {key: config.get(key, default) for key, default in DEFAULTS[sampler].items()}
    for key, values in (_SUPPORTED | _SOLVERS.get(sampler, {})).items():
        if key in chosen and chosen[key] not in values:
            expected = " or ".join(map(repr, values))
            origin = "" if key in config else f", the default of {CLASSES[sampler]}"
            raise ValueError(f"{key}: expected {expected}, got {chosen[key]!r}{origin}")
    for key in ("num_train_timesteps", "steps_offset"):
        if not isinstance(chosen[key], int) or chosen[key] < 0:
            raise ValueError(f"{key}: expected a whole number, got {chosen[key]!r}")
    for key in ("beta_start", "beta_end"):
        if not isinstance(chosen[key], float) or not 0 < chosen[key] < 1:
            raise ValueError(f"{key}: expected a number between 0 and 1, got {chosen[key]!r}")
    make = GaussianDiffusion.linear if chosen["beta_schedule"] == "linear" else GaussianDiffusion.scaled_linear
    process = make(chosen["beta_start"], chosen["beta_end"], chosen["num_train_timesteps"])
    ends_at_data = chosen.get("set_alpha_to_one", chosen.get("final_sigmas_type") == "zero")
    return Scheduler(
        name=sampler,
        process=process,
        prediction=chosen["prediction_type"],
        spacing=chosen["timestep_spacing"],
        offset=chosen["steps_offset"],
        final_alpha_bar=1.0 if ends_at_data else float(process.alphas_bar[0]),
        karras=bool(chosen.get("use_karras_sigmas")),
        first_order_below=(
            math.inf if ends_at_data or chosen.get("euler_at_final") else 15 if chosen.get("lower_order_final") else 0
        ),
    )
