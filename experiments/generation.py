"""Generation as `train` and `sample` see it: configurations to tasks, and what a run writes down about itself.

The meta of a run is as in `experiments.classification`; "model" holds a name of `models.GENERATORS` or `models.DITS`.
Besides there are "objective", "label_dropout" and "input", what the network denoises: {"shape": [H, W, C]} of pixels;
of latents also their "scale" and the SHA-256 of the "autoencoder" that made them.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from experiments import classification
from gspn_jax import data, models
from gspn_jax.diffusion import GaussianDiffusion, Interpolant
from gspn_jax.diffusion.interpolants import PATHS
from gspn_jax.training.generation import Generation, Objective

FREE_KEYS = classification.FREE_KEYS
OBJECTIVES = ("ddpm", *PATHS)


def describe(config: Any, dataset: data.Dataset) -> dict[str, Any]:
    """Returns what a run is, as JSON."""
    values = config.to_dict()
    options = {key: value for key, value in values["model"].items() if value is not None}
    name = options.pop("name")
    kept = ("name", "path", "image_size", "resize")
    return {
        "model": {"name": name, "options": options},
        "objective": values["objective"],
        "label_dropout": values["label_dropout"],
        "input": input_of(dataset.latents, values["data"]["image_size"]),
        "num_classes": dataset.num_classes,
        "class_names": list(dataset.class_names),
        "data": {key: values["data"][key] for key in kept},
        "config": values,
    }


def input_of(latents: data.LatentSpace | None, image_size: int) -> dict[str, Any]:
    """Returns the "input" of a run on latents, or, None, on pixels."""
    if latents is None:
        return {"shape": [image_size, image_size, 3]}
    return {"shape": list(latents.shape), "scale": latents.scale, "autoencoder": latents.autoencoder}


def model_builder(meta: Mapping[str, Any]) -> Callable[[nnx.Rngs], nnx.Module]:
    """Returns NNX rngs -> the network that `meta` describes; ValueError for other channels than the data's."""
    name, options = meta["model"]["name"], classification.model_options(meta)
    known = [*models.GENERATORS, *models.DITS]
    if name not in known:
        raise ValueError(f"model.name: expected one of {', '.join(known)}; got {name!r}")
    channels = meta["input"]["shape"][-1]
    if options.setdefault("in_channels", channels) != channels:
        raise ValueError(f"model.in_channels: expected {channels}, as the data have, got {options['in_channels']}")
    build = models.build_dit if name in models.DITS else models.build_generator
    return lambda rngs: build(name, num_classes=meta["num_classes"], rngs=rngs, **options)


def objective_of(name: str) -> Objective:
    """Raises ValueError for an unknown name."""
    if name not in OBJECTIVES:
        raise ValueError(f"objective: expected one of {', '.join(OBJECTIVES)}; got {name!r}")
    return GaussianDiffusion.linear() if name == "ddpm" else Interpolant(name)


def make_task(meta: Mapping[str, Any]) -> Generation:
    """Returns the task of training the network that `meta` describes, or of sampling from it."""
    return Generation(
        model_builder(meta),
        num_classes=meta["num_classes"],
        objective=objective_of(meta["objective"]),
        label_dropout=meta["label_dropout"],
        latent_scale=meta["input"].get("scale", 1.0),
    )


def layer_lines(meta: Mapping[str, Any], batch_size: int) -> list[str]:
    """Returns what each propagation of the network runs on, with so many images at a time."""
    model = nnx.eval_shape(lambda: model_builder(meta)(nnx.Rngs(0)))
    maps = jax.ShapeDtypeStruct((batch_size, *meta["input"]["shape"]), jnp.float32)
    numbers = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
    return models.layer_report(model, maps, numbers, numbers)


def differences(source: Mapping[str, Any], target: Mapping[str, Any]) -> list[str]:
    """As `classification.differences`."""

    def seen(meta: Mapping[str, Any]) -> dict[str, Any]:
        name, options = meta["model"]["name"], meta["model"]["options"]
        is_dit = name in models.DITS
        values = {"objective": meta.get("objective", "none"), "model.mixer": "attention" if is_dit else "gspn"}
        values |= {"model.mixer": options["mixer"]} if "mixer" in options else {}
        if values["model.mixer"] == "gspn":
            values["model.alignment"] = options.get("alignment", "aligned")
        if values["model.mixer"] == "gspn" and not is_dit:
            depth = options.get("depth") or models.GENERATORS[name]["depth"]
            values["model.chunk"] = options.get("chunk", 2)
            values["model.global_blocks"] = options.get("global_blocks", (depth - 1, depth))
        return values

    return classification.worded_differences(seen(source), seen(target))


def lines_of(numbers: Mapping[str, float]) -> list[str]:
    """Returns the last lines of a run: both losses on held-out images."""
    lines = [f"parameters: loss {numbers['loss']:.4f}"]
    return [*lines, f"moving average: loss {numbers['ema_loss']:.4f}"] if "ema_loss" in numbers else lines


def make_training_task(meta: Mapping[str, Any], config: Any) -> Generation:
    """Returns the task of a run."""
    return make_task(meta)


make_evaluate = classification.make_evaluate
