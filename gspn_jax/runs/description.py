"""Descriptions of runs: JSON from which the model and the task of a run can be built again.

Every checkpoint holds the description, and so does `config.json` in a workdir.
"""

from collections.abc import Callable, Mapping
from typing import Any, NotRequired, TypedDict

from flax import nnx

from gspn_jax.mixers import mixer_options
from gspn_jax.models.registry import NETWORKS, PRESETS, build_network, create_model

CUSTOM = "custom"


class ModelDescription(TypedDict):
    """Describes a model.

    Attributes:
        name: a preset, or "custom" if no preset has these sizes.
        network: custom models only: a key of `gspn_jax.models.NETWORKS`.
        options: options of `gspn_jax.create_model`; complete for a custom model.
    """

    name: str
    network: NotRequired[str]
    options: dict[str, Any]


class DataDescription(TypedDict):
    """Describes the data of a run.

    Attributes:
        name, path: arguments of `gspn_jax.data.load`.
        image_size: side of the images, in pixels.
        resize: short side before the centre crop, in pixels; 0 means image_size / 0.875.
        exif_rotation: whether evaluation turns images upright by their EXIF data, as training did; False if missing.
        mean, std: classifiers only: normalisation of each channel, on the 0..255 scale.
    """

    name: str
    path: str
    image_size: int
    resize: int
    exif_rotation: NotRequired[bool]
    mean: NotRequired[list[float]]
    std: NotRequired[list[float]]


class InputDescription(TypedDict):
    """Describes the pixels or latents that a generator denoises.

    Attributes:
        shape: [H, W, C] in training.
        scale: latents only: factor by which latents are multiplied before the network denoises them.
        autoencoder: latents only: SHA-256 of the autoencoder's file, "" if unknown.
    """

    shape: list[int]
    scale: NotRequired[float]
    autoencoder: NotRequired[str]


class RunDescription(TypedDict):
    """Describes a run.

    Attributes:
        task: "classification" or "generation".
        model: the network and its options.
        num_classes: number of classes.
        class_names: names of the classes, in the order of the labels.
        data: training data, or for converted weights the expected data.
        config: runs of `experiments.train` only: the whole configuration.
        objective: generators only: "ddpm", or the interpolant "linear" or "gvp".
        label_dropout: generators only: share of images that are trained without their class.
        input: generators only: the denoised pixels or latents.
    """

    task: str
    model: ModelDescription
    num_classes: int
    class_names: list[str]
    data: DataDescription
    config: NotRequired[dict[str, Any]]
    objective: NotRequired[str]
    label_dropout: NotRequired[float]
    input: NotRequired[InputDescription]


def upgraded(description: Mapping[str, Any]) -> RunDescription:
    """Converts a description of version 0.1 to this version's form; returns others unchanged.

    Version 0.1 stored no task, called the kernel variant "path", and stored options of the GSPN mixer for every mixer.
    """
    described: Any = dict(description)
    if "task" in described:
        return described
    described["task"] = "generation" if "objective" in described else "classification"
    model = dict(described["model"])
    options = _renamed(model["options"])
    if options.get("mixer", _own_mixer(model["name"])) == "attention":
        kept = mixer_options("attention")[0]
        options = {key: value for key, value in options.items() if key in kept or key not in mixer_options("gspn")[0]}
    described["model"] = model | {"options": options}
    if "config" in described:
        config = dict(described["config"])
        config["task"] = described["task"]
        config["model"] = _renamed(config["model"])
        if config["model"].get("alignment") == "aligned":
            config["model"]["alignment"] = None  # the default of this version
        config["data"] = {"exif_rotation": False, **config["data"]}
        described["config"] = config
    return described


def _renamed(options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns options with "path" renamed to "variant"."""
    return {"variant" if key == "path" else key: value for key, value in options.items()}


def _own_mixer(name: str) -> str:
    """Returns the default mixer of a preset; "gspn" for other names."""
    return NETWORKS[PRESETS[name].network].mixer if name in PRESETS else "gspn"


def network_of(description: RunDescription) -> str:
    """Returns the model's network, a key of `NETWORKS`; ValueError for an unknown name."""
    model = description["model"]
    if model["name"] == CUSTOM:
        return model.get("network", "")
    if model["name"] not in PRESETS:
        raise ValueError(f"model.name: expected one of {', '.join(PRESETS)}; got {model['name']!r}")
    return PRESETS[model["name"]].network


def mixer_of(description: RunDescription) -> str:
    """Returns the model's mixer, a key of `gspn_jax.mixers.MIXERS`."""
    return description["model"]["options"].get("mixer") or NETWORKS[network_of(description)].mixer


def sizes_of(description: RunDescription) -> dict[str, Any]:
    """Returns the options of the model, with its preset's options filled in."""
    model = description["model"]
    preset = PRESETS[model["name"]].options if model["name"] in PRESETS else {}
    return {**preset, **model["options"]}


def model_builder(description: RunDescription, **options: Any) -> Callable[[nnx.Rngs], nnx.Module]:
    """Returns a function NNX rngs -> the described model; `options` replace the description's."""
    model, count = description["model"], description["num_classes"]
    options = {**model["options"], **options}
    if model["name"] == CUSTOM:
        network = network_of(description)
        return lambda rngs: build_network(network, num_classes=count, rngs=rngs, **options)
    return lambda rngs: create_model(model["name"], num_classes=count, rngs=rngs, **options)
