"""Tests of the generators' presets."""

import dataclasses
from typing import Any

import jax
import pytest

from configs import classifier, generator
from experiments import settings
from gspn_jax import data
from gspn_jax.diffusion import GaussianDiffusion, Interpolant
from gspn_jax.runs import differences, new_run
from gspn_jax.training.optimizer import learning_rate_schedule

IMAGES = 1_281_167


def description(config: Any) -> dict[str, Any]:
    """Returns the description of a run on ImageNet, or on small images of ten classes."""
    dataset = data.load("fake")
    if config.data.name == "latents":
        names = tuple(map(str, range(1000)))
        space = data.LatentSpace((32, 32, 4), 0.18215, autoencoder="")
        dataset = dataclasses.replace(dataset, num_classes=1000, class_names=names, latents=space)
    return dict(settings.describe(config, dataset))


@pytest.mark.parametrize("preset", generator.PRESETS)
def test_every_preset_is_documented_locked_and_builds(preset: str):
    config = generator.get_config(preset)
    assert preset in (generator.__doc__ or "")
    with pytest.raises((KeyError, AttributeError)):
        config.optimizer.lr = 1.0
    described = description(config)
    side = config.data.image_size
    assert described["input"]["shape"] == ([32, 32, 4] if config.data.name == "latents" else [side, side, 3])
    task = new_run(described).make_task()
    assert isinstance(task.objective, Interpolant if config.objective == "linear" else GaussianDiffusion)
    millions = dict(gspn_b2=144.0, gspn_l2=465.2, gspn_xl2=723.5, dit_b2=130.3, dit_l2=457.8, dit_xl2=674.8)
    shapes = jax.eval_shape(task.init, jax.random.key(0))
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert round(count / 1e6, 1) == millions.get(preset.replace("sit", "dit"), round(count / 1e6, 1)) and count > 1e5


@pytest.mark.parametrize("preset", ["gspn_b2", "dit_xl2", "sit_l2"])
def test_imagenet_recipe(preset: str):
    config = generator.get_config(preset)
    epoch = IMAGES // 256
    assert config.batch_size == 256 and abs(config.epochs * epoch - 400_000) < 500
    options = settings.optimizer_options(config, epoch, 400_000)
    rate = learning_rate_schedule(options, num_steps=400_000, batch_size=256)
    assert float(rate(0)) == float(rate(399_999)) == pytest.approx(1e-4)
    assert (options.weight_decay, options.clip, options.ema_decay, options.ema_warmup) == (0, 1, 0.9999, False)
    assert config.model.drop_path == (0.1 if preset == "gspn_b2" else None)
    assert (config.model.dtype, config.label_dropout) == ("bfloat16", 0.1)
    assert config.objective == ("linear" if preset == "sit_l2" else "ddpm")


def test_other_channels_than_those_of_the_data():
    described = description(generator.get_config("dit_b2"))
    described["model"]["options"]["in_channels"] = 3
    with pytest.raises(ValueError, match=r"model.in_channels: expected 4, as the data have, got 3"):
        new_run(described)


def test_runs_that_compute_something_else_with_the_same_shapes_are_told_apart():
    ours, theirs = (description(generator.get_config("gspn_xl2")) for _ in range(2))
    assert differences(new_run(theirs), new_run(ours)) == []
    theirs["model"]["options"] |= dict(alignment="unturned", chunk=2, global_blocks=[])
    assert differences(new_run(theirs), new_run(ours)) == [
        "model.alignment: unturned in the source, aligned in this run; "
        "--config.model.alignment=unturned computes the same",
        "model.global_blocks: () in the source, (55, 56) in this run; "
        "--config.model.global_blocks=() computes the same",
    ]
    dit, sit = (new_run(description(generator.get_config(name))) for name in ("dit_b2", "sit_b2"))
    assert [line.split(";")[0] for line in differences(dit, sit)] == [
        "objective: ddpm in the source, linear in this run"
    ]


def test_unknown_preset():
    with pytest.raises(ValueError, match="preset: expected one of digits, .*got 'dit_s9'"):
        generator.get_config("dit_s9")


def test_classifiers_take_no_latents():
    space = data.LatentSpace((32, 32, 4), 0.18215, autoencoder="")
    dataset = dataclasses.replace(data.load("fake"), latents=space)
    with pytest.raises(ValueError, match="data.name: expected images, which a classifier takes"):
        settings.describe(classifier.get_config("digits"), dataset)
