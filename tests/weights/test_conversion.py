import json
import pathlib
from typing import Any

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from gspn_jax import models
from gspn_jax.data import IMAGENET_MEAN, IMAGENET_STD
from gspn_jax.models.autoencoder import LATENT_FACTOR, LATENT_SCALE
from gspn_jax.training import CheckpointError, load_parameters
from gspn_jax.training.functional import to_nested
from gspn_jax.weights import conversion, convert, facebook_dit, nvlabs_classifier, nvlabs_generator, read_arrays

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
TORCH_FILES = pathlib.Path(__file__).parent / "torch_files"


def golden(name):
    with np.load(GOLDEN / f"{name}.npz") as saved:
        return {key.removeprefix("param/"): saved[key] for key in saved.files if key.startswith("param/")}


def source(folder, arrays):
    path = folder / "source.safetensors"
    save_file({f"module.{name}": np.ascontiguousarray(array) for name, array in arrays.items()}, path)
    return path


def parameters(model):
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return to_nested({tuple(map(str, path)): np.asarray(variable.get_value()) for path, variable in flat})


def assert_same_parameters(got, want):
    got, want = (dict(nnx.to_flat_state(nnx.State(tree))) for tree in (got, want))
    assert got.keys() == want.keys()
    for path, array in want.items():
        np.testing.assert_array_equal(np.asarray(got[path]), array, err_msg=str(path), strict=True)


def test_classifier_from_a_file_of_pytorch(tmp_path):
    path = TORCH_FILES / "gspn_classifier.pth"
    converted = convert(path, tmp_path, class_names=["a", "b", "c"], image_size=64, global_stages=(1,))
    params, description = load_parameters(tmp_path)
    arrays = read_arrays(path)
    assert_same_parameters(params, parameters(nvlabs_classifier(arrays, global_stages=(1,))))
    np.testing.assert_array_equal(params["head"]["bias"], arrays["classifier.head.bias"])
    assert converted.parameters == sum(array.size for array in arrays.values())
    sizes = {"widths": [4, 8], "depths": [1, 1], "proxy_rank": 2, "expansion": 1.5, "mlp_ratio": 4.0}
    chosen = {"alignment": "unturned", "chunk": 2, "global_stages": [1], "stem_stride": 4}
    want = {
        "task": "classification",
        "model": {"name": "custom", "network": "classifier", "options": sizes | chosen},
        "num_classes": 3,
        "class_names": ["a", "b", "c"],
        "data": {
            "name": "image_folder",
            "path": "",
            "image_size": 64,
            "resize": 0,
            "mean": list(IMAGENET_MEAN),
            "std": list(IMAGENET_STD),
        },
    }
    assert {key: description[key] for key in want} == want
    assert json.loads(json.dumps(converted.description)) == want


@pytest.mark.full
@pytest.mark.parametrize("file,load,network,options", [
    ("generator_tiny", nvlabs_generator, "generator",
     dict(width=64, depth=4, patch=2, in_channels=4, proxy_rank=4, alignment="unturned", chunk=2, global_blocks=[])),
    ("dit_tiny", lambda arrays: facebook_dit(arrays, num_heads=4), "dit",
     dict(width=48, depth=2, patch=2, in_channels=4, mlp_ratio=4.0, num_heads=4)),
])  # fmt: skip
def test_denoisers(tmp_path, file, load, network, options):
    arrays = golden(file)
    given = {"num_heads": 4, "objective": "linear"} if network == "dit" else {}
    convert(source(tmp_path, arrays), tmp_path / "run", image_size=64, **given)
    params, description = load_parameters(tmp_path / "run")
    assert_same_parameters(params, parameters(load(arrays)))
    want = {
        "task": "generation",
        "model": {"name": "custom", "network": network, "options": options},
        "objective": given.get("objective", "ddpm"),
        "label_dropout": 0.1,
        "input": {"shape": [8, 8, 4], "scale": 0.18215, "autoencoder": ""},
        "num_classes": 10,
        "class_names": [f"class {number}" for number in range(10)],
        "data": {"name": "latents", "path": "", "image_size": 64, "resize": 0},
    }
    assert {key: description[key] for key in want} == want
    assert (LATENT_SCALE, LATENT_FACTOR) == (0.18215, 8)


def test_moving_averages_from_a_checkpoint_of_pytorch(tmp_path):
    convert(TORCH_FILES / "dit_checkpoint.pt", tmp_path, num_heads=2)
    params, _ = load_parameters(tmp_path)
    arrays = read_arrays(TORCH_FILES / "dit_checkpoint.pt")
    assert_same_parameters(params, parameters(facebook_dit(arrays, num_heads=2)))
    np.testing.assert_array_equal(params["conditioning"]["first"]["bias"], 110 + np.arange(4) / 64)


def shapes_of(network, preset):
    """The arrays of a preset that its sizes are read from; they take no memory."""
    shapes: dict[str, tuple[int, ...]]
    if network == "classifier":
        shapes = {"classifier.head.weight": (1000, preset["widths"][-1])}
        for stage, (width, depth) in enumerate(zip(preset["widths"], preset["depths"], strict=True)):
            shapes |= {f"layers.{stage}.blocks.{index}.norm.weight": (width,) for index in range(depth)}
        width = preset["widths"][0]
        shapes["layers.0.blocks.0.op.x_conv_down.weight"] = preset["proxy_rank"], width * 3 // 2, 1, 1
        shapes["layers.0.blocks.0.op.in_proj.weight"] = width * 3 // 2, width
        shapes["layers.0.blocks.0.mlp.fc1.weight"] = 4 * width, width
    else:
        width, depth = preset["width"], preset["depth"]
        shapes = {"x_embedder.proj.weight": (width, 4, preset["patch"], preset["patch"])}
        shapes["y_embedder.embedding_table.weight"] = 1001, width
        if network == "dit":
            shapes |= {f"blocks.{index}.adaLN_modulation.1.weight": (6 * width, width) for index in range(depth)}
            shapes["blocks.0.mlp.fc1.weight"] = 4 * width, width
        else:
            names = [f"in_blocks.{index}.x_conv_down.weight" for index in range(depth // 2)]
            shapes |= {name: (width // 16, width, 1, 1) for name in [*names, "mid_block.x_conv_down.weight"]}
    return {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}


PRESETS = {
    network: {
        name: {**preset.options, **preset.mixer_options}
        for name, preset in models.PRESETS.items()
        if preset.network == network
    }
    for network in models.NETWORKS
}


@pytest.mark.parametrize("network,name", [
    (network, name) for network, presets in PRESETS.items() for name in presets if name != "gspn_nano"
])  # fmt: skip
def test_sizes_of_a_preset_give_its_name(tmp_path, monkeypatch, network, name):
    preset = PRESETS[network][name]
    arrays: dict[str, Any] = shapes_of(network, preset)
    monkeypatch.setattr(conversion, "read_arrays", lambda source: arrays)
    monkeypatch.setattr(conversion, "save_parameters", lambda *_: None)
    for loader in ("nvlabs_classifier", "nvlabs_generator", "facebook_dit"):
        monkeypatch.setattr(conversion, loader, lambda arrays, **options: nnx.Linear(1, 1, rngs=nnx.Rngs(0)))
    model = convert("any", tmp_path).description["model"]
    assert model["name"] == name and "network" not in model
    assert {key: model["options"][key] for key in preset} == preset
    if network != "classifier":
        return
    arrays["layers.0.blocks.0.mlp.fc1.weight"] = np.zeros((5, preset["widths"][0]))
    assert convert("any", tmp_path).description["model"]["name"] == "custom"


@pytest.mark.parametrize("change,options,words", [
    ({}, dict(num_heads=4, alignment="aligned"), "alignment: expected none for a dit, got aligned"),
    ({}, dict(num_heads=4, global_stages=(1,)), r"global_stages: expected none for a dit, got \(1,\)"),
    ({}, dict(num_heads=4, resize=7), "resize: expected none for a dit, got 7"),
    ({}, dict(num_heads=4, objective="vp"), "objective: expected one of ddpm, linear, gvp; got 'vp'"),
    ({}, dict(num_heads=4, image_size=40), "image_size: expected a multiple of 16, got 40"),
    ({}, dict(num_heads=4, image_size=0), "image_size: expected a multiple of 16, got 0"),
    ({}, dict(num_heads=0), "num_heads: expected a divisor of features = 48, got 0"),
    ({}, dict(), "num_heads: expected a number, since no published DiT has width 48; got none"),
    ({}, dict(num_heads=4, class_names=["a"]), "class_names: expected 10, as the network has classes, got 1"),
    ({"x_embedder.proj.bias": np.full(48, np.nan, np.float32)}, dict(num_heads=4),
     "source: .*source.safetensors: arrays: expected finite numbers in x_embedder.proj.bias, got NaN or Inf"),
    ({"blocks.99999999.x": np.zeros(1)}, dict(num_heads=4), "without a gap, got blocks.99999999"),
    ({"blocks.0.adaLN_modulation.1.weight": None}, dict(), "source: expected a network of .* names such as blocks.0"),
])  # fmt: skip
def test_what_cannot_be_converted(tmp_path, change, options, words):
    arrays = {name: array for name, array in (golden("dit_tiny") | change).items() if array is not None}
    with pytest.raises(ValueError, match=words):
        convert(source(tmp_path, arrays), tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_workdirs_that_cannot_be_made(tmp_path):
    path = TORCH_FILES / "dit_checkpoint.pt"
    with pytest.raises(ValueError, match="workdir: expected a folder, got ''"):
        convert(path, "", num_heads=2)
    convert(path, tmp_path / "run", num_heads=2)
    with pytest.raises(CheckpointError, match="holds checkpoints already"):
        convert(path, tmp_path / "run", num_heads=2)
