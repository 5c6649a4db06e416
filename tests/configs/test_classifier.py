"""Tests of the classifiers' presets."""

from typing import Any

import jax
import pytest
from flax import nnx

from configs import classifier
from experiments import settings
from gspn_jax import data
from gspn_jax.runs import differences, new_run
from gspn_jax.training import MixingOptions


@pytest.mark.parametrize(
    ("preset", "drop_path", "rate", "least", "batch"),
    [
        ("gspn_t", 0.2, 5e-4, 5e-6, 2048),
        ("gspn_s", 0.4, 3e-4, 3e-6, 2048),
        ("gspn_b", 0.5, 5e-4, 5e-6, 1024),
    ],
)
def test_imagenet_recipe(preset: str, drop_path: float, rate: float, least: float, batch: int):
    config = classifier.get_config(preset)
    assert (config.model.name, config.model.drop_path, config.batch_size) == (preset, drop_path, batch)
    assert (config.optimizer.learning_rate, config.optimizer.min_learning_rate) == (rate, least)
    assert (config.epochs, config.optimizer.warmup_epochs, config.optimizer.ema_decay) == (300, 20, 0.9999)
    epoch = 1_281_167 // batch
    optimizer = settings.optimizer_options(config, epoch, 300 * epoch)
    assert optimizer.warmup_steps == 20 * epoch and optimizer.weight_decay == 0.05 and optimizer.clip == 5.0
    options = settings.train_options(config, epoch, "x")
    assert (options.num_steps, options.evaluate_steps, options.checkpoint_steps) == (300 * epoch, epoch, epoch)


@pytest.mark.parametrize("preset", classifier.PRESETS)
def test_every_preset_is_documented_locked_and_builds(preset: str):
    config = classifier.get_config(preset)
    assert f"\n{preset} " in (classifier.__doc__ or "")
    with pytest.raises((KeyError, AttributeError)):
        config.optimizer.lr = 1.0
    data.Augmentation(**config.augmentation.to_dict())
    MixingOptions(**config.mixing.to_dict())
    dataset = data.Dataset("x", 10, tuple("0123456789"), train=None, test=None)  # pyright: ignore[reportArgumentType]
    run = settings.make_run(config, dataset)
    assert jax.eval_shape(lambda: nnx.state(run.build(nnx.Rngs(0))))
    assert all(value is not None for value in run.description["model"]["options"].values())


def test_a_run_cut_short_warms_up_in_the_same_share():
    config = classifier.get_config("gspn_t")
    config.steps = 300
    assert settings.train_options(config, 100, "x").num_steps == 300
    assert settings.optimizer_options(config, 100, 300).warmup_steps == 20


def test_unknown_preset():
    with pytest.raises(ValueError, match="preset: expected one of digits, .* got 'nano'"):
        classifier.get_config("nano")


@pytest.mark.parametrize("text", ["5", "a:b", "5:"])
def test_profile_steps_that_do_not_parse(text: str):
    config = classifier.get_config("digits")
    config.profile_steps = text
    with pytest.raises(ValueError, match="profile_steps: expected FIRST:END"):
        settings.train_options(config, 10, "x")


def test_runs_that_compute_something_else_with_the_same_shapes_are_told_apart():
    shared: dict[str, Any] = {"task": "classification", "num_classes": 1, "class_names": ["x"]}
    released = {"alignment": "unturned", "chunk": 4, "global_stages": [2, 3]}
    target = new_run({**shared, "model": {"name": "gspn_t", "options": {}}, "data": {"mean": [1.0], "std": [2.0]}})
    source = new_run(
        {**shared, "model": {"name": "gspn_t", "options": released}, "data": {"mean": (1.0,), "std": (3.0,)}}
    )
    assert differences(target, target) == []
    assert [line.split(";")[0] for line in differences(source, target)] == [
        "model.alignment: unturned in the source, aligned in this run", "model.chunk: 4 in the source, 2 in this run",
        "data.std: (3.0,) in the source, (2.0,) in this run",
    ]  # fmt: skip
    assert "--config.model.alignment=unturned" in differences(source, target)[0]


def test_a_resize_below_the_image_size_is_an_error_before_anything_starts():
    config = classifier.get_config("gspn_t")
    config.data.image_size = 288
    settings.check_sizes(config)
    config.data.resize = 256
    with pytest.raises(ValueError, match=r"data.resize: .* at least image_size = 288, got 256"):
        settings.check_sizes(config)


@pytest.mark.parametrize("key,value,words", [
    ("model.dtype", "bf16", "dtype: expected one of float32, bfloat16, float16, float64; got 'bf16'"),
    ("model.widths", (0, 8, 8), "widths: expected integers of at least 1, got (0, 8, 8)"),
    ("model.depths", (-1, 1, 1), "depths: expected integers of at least 1, got (-1, 1, 1)"),
    ("model.mlp_ratio", 0.0, "mlp_ratio: expected a number above 0, got 0.0"),
    ("task", "dance", "task: expected one of classification, generation, text_to_image; got 'dance'"),
    ("task", "generation", "task: expected classification, as this file configures, got generation"),
    ("epochs", 0, "epochs: expected at least 1, got 0"),
    ("steps", -1, "steps: expected an integer >= 0, got -1"),
    ("optimizer.warmup_epochs", -1.0, "optimizer.warmup_epochs: expected 0 to epochs = 20, got -1.0"),
    ("optimizer.warmup_epochs", 1000.0, "optimizer.warmup_epochs: expected 0 to epochs = 20, got 1000.0"),
    ("optimizer.warmup_epochs", float("nan"), "optimizer.warmup_epochs: expected 0 to epochs = 20, got nan"),
])  # fmt: skip
def test_values_that_make_no_sense(key: str, value: object, words: str):
    config = classifier.get_config("digits")
    config.update_from_flattened_dict({"steps": 2, key: value})
    with pytest.raises(ValueError) as error:
        settings.make_run(config, data.load("digits")).make_task()
        settings.train_options(config, 10, "run")
        settings.optimizer_options(config, 10, 2)
    assert words in str(error.value)


def test_mixer_and_block_options_are_keys_of_the_configuration():
    config = classifier.get_config("digits")
    config.update_from_flattened_dict({"model.chunk": 3, "model.expansion": 2.0, "model.mlp_ratio": 3.0})
    run = settings.make_run(config, data.load("digits"))
    model: Any = nnx.eval_shape(lambda: run.build(nnx.Rngs(0)))
    block = model.stages[0][0]
    assert block.mixer.chunk == 3 and block.widen.out_features == 64 and block.mlp.widen.out_features == 96
