"""Presets of the classifiers."""

import jax
import pytest
from flax import nnx

from configs import classifier
from experiments import classification
from gspn_jax import data
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
    optimizer = classification.optimizer_options(config, epoch, 300 * epoch)
    assert optimizer.warmup_steps == 20 * epoch and optimizer.weight_decay == 0.05 and optimizer.clip == 5.0
    options = classification.train_options(config, epoch, "x")
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
    meta = classification.describe(config, dataset)
    assert jax.eval_shape(lambda: nnx.state(classification.model_builder(meta)(nnx.Rngs(0))))
    assert all(value is not None for value in meta["model"]["options"].values())


def test_a_run_cut_short_warms_up_in_the_same_share():
    config = classifier.get_config("gspn_t")
    config.steps = 300
    assert classification.train_options(config, 100, "x").num_steps == 300
    assert classification.optimizer_options(config, 100, 300).warmup_steps == 20


def test_unknown_preset():
    with pytest.raises(ValueError, match="preset: expected one of digits, .* got 'nano'"):
        classifier.get_config("nano")


@pytest.mark.parametrize("text", ["5", "a:b", "5:"])
def test_profile_steps_that_do_not_parse(text: str):
    config = classifier.get_config("digits")
    config.profile_steps = text
    with pytest.raises(ValueError, match="profile_steps: expected FIRST:END"):
        classification.train_options(config, 10, "x")
