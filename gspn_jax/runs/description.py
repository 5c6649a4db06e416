"""What a run is, as JSON: enough to build its model and its task again, whoever made it.

A description lies in every checkpoint and in `config.json` of a workdir.
"""

from collections.abc import Callable, Mapping
from typing import Any, NotRequired, TypedDict

from flax import nnx

from gspn_jax.mixers import mixer_options
from gspn_jax.models.registry import NETWORKS, PRESETS, build_network, create_model

CUSTOM = "custom"


class ModelDescription(TypedDict):
    """Attributes:
    name: a preset, or "custom" where the sizes are those of no preset.
    network: of a custom model, a key of `gspn_jax.models.NETWORKS`.
    options: of `gspn_jax.create_model`; those of a custom model are complete.
    """

    name: str
    network: NotRequired[str]
    options: dict[str, Any]


class DataDescription(TypedDict):
    """Attributes:
    name, path: as `gspn_jax.data.load` takes them.
    image_size: side of the images, in pixels.
    resize: short side before the centre crop; 0 for image_size / 0.875.
    exif_rotation: whether evaluation turns images upright by their EXIF data, as training did; False if missing.
    mean, std: of a classifier: per channel, on the 0..255 scale.
    """

    name: str
    path: str
    image_size: int
    resize: int
    exif_rotation: NotRequired[bool]
    mean: NotRequired[list[float]]
    std: NotRequired[list[float]]


class InputDescription(TypedDict):
    """What a generator denoises.

    Attributes:
        shape: [H, W, C] in training.
        scale: of latents: what the network multiplies them with.
        autoencoder: of latents: SHA-256 of the autoencoder's file, "" where it is not known.
    """

    shape: list[int]
    scale: NotRequired[float]
    autoencoder: NotRequired[str]


class RunDescription(TypedDict):
    """Attributes:
    task: "classification" or "generation".
    model: the network.
    num_classes: how many classes there are.
    class_names: their names, in the order of the labels.
    data: what the run was trained on, or expects.
    config: of a run that was trained here: its whole configuration.
    objective: of a generator: "ddpm", or the interpolant "linear" or "gvp".
    label_dropout: of a generator: share of images that were trained without their class.
    input: of a generator.
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
    """Returns a description as this version writes it, from one of this version or of 0.1.

    Version 0.1 named no task, called the kernels' variant "path", and gave options of the GSPN mixer to every mixer.
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
    return {"variant" if key == "path" else key: value for key, value in options.items()}


def _own_mixer(name: str) -> str:
    return NETWORKS[PRESETS[name].network].mixer if name in PRESETS else "gspn"


def network_of(description: RunDescription) -> str:
    """Returns the key of `NETWORKS` that the model is; ValueError for a name that is not known."""
    model = description["model"]
    if model["name"] == CUSTOM:
        return model.get("network", "")
    if model["name"] not in PRESETS:
        raise ValueError(f"model.name: expected one of {', '.join(PRESETS)}; got {model['name']!r}")
    return PRESETS[model["name"]].network


def mixer_of(description: RunDescription) -> str:
    """Returns the name of the model's mixer in `gspn_jax.mixers.MIXERS`."""
    return description["model"]["options"].get("mixer") or NETWORKS[network_of(description)].mixer


def sizes_of(description: RunDescription) -> dict[str, Any]:
    """Returns the options of the model, those of its preset included."""
    model = description["model"]
    preset = PRESETS[model["name"]].options if model["name"] in PRESETS else {}
    return {**preset, **model["options"]}


def model_builder(description: RunDescription, **options: Any) -> Callable[[nnx.Rngs], nnx.Module]:
    """Returns NNX rngs -> the model of a description; `options` replace those of the description."""
    model, count = description["model"], description["num_classes"]
    options = {**model["options"], **options}
    if model["name"] == CUSTOM:
        network = network_of(description)
        return lambda rngs: build_network(network, num_classes=count, rngs=rngs, **options)
    return lambda rngs: create_model(model["name"], num_classes=count, rngs=rngs, **options)
