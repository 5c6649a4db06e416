"""Class-conditional generators: presets of one configuration.

    python -m experiments.train --config=configs/generator.py:PRESET --workdir=runs/PRESET
    python -m experiments.sample --workdir=runs/PRESET --output=samples.png

preset    data                            model
--------  ------------------------------  --------------------------------------------------------------------------
digits    1,437 + 360 (8x8)               GSPN, 5 blocks of width 96, patch 2: 4x4 tokens; linear interpolant
cifar10   50,000 + 10,000 (32x32)         gspn_s2's skeleton in pixels: patch 2, 16x16 tokens, as on ImageNet
gspn_b2   latents of ImageNet-1K at 256   GSPN-B/2; gspn_l2, gspn_xl2: GSPN-L/2, XL/2
dit_b2    the same                        DiT-B/2; dit_l2, dit_xl2
sit_b2    the same                        SiT-B/2, DiT's network as a linear interpolant; sit_l2, sit_xl2

What the presets need besides: cifar10 takes --config.data.path=cifar10.npz (arrays x_train, y_train, x_test, y_test),
those of ImageNet --config.data.path=LATENTS, a folder that `python -m experiments.encode_latents` wrote. They train as
DiT and SiT do, 80 epochs of batches of 256 being 400,000 steps; GSPN's stochastic depth is that of its authors.
Learning rates are those of a batch of 512 images and are scaled with the batch: what the authors of GSPN ran, 1,024
images at 1e-4, is --config.batch_size=1024 --config.optimizer.learning_rate=5e-5 --config.epochs=1500
--config.optimizer.min_learning_rate=5e-7 --config.optimizer.warmup_epochs=5. Any value can be set on the command line:
--config.objective=gvp trains the same network as another interpolant, --config.model.name=dit_s2 another network,
--config.model.remat=True saves memory.
"""

import functools
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config(preset: str = "digits") -> Any:
    """Returns the configuration of a preset, a ConfigDict, locked: a key that does not exist cannot be set.

    Raises:
        ValueError: unknown preset.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, got {preset!r}")
    config = _defaults()
    PRESETS[preset](config)
    return config.lock()


def _defaults() -> Any:
    config: Any = ConfigDict()
    config.task = "generation"
    config.seed = 0
    config.batch_size = 256  # images per optimiser step, over all devices
    config.accumulate = 1  # parts of a batch that are computed one after the other
    config.epochs = 80
    config.steps = 0  # optimiser steps instead of epochs, where not 0
    config.init_from = ""  # workdir to start from: what fits is loaded
    config.objective = "ddpm"  # or an interpolant: "linear", "gvp"
    config.label_dropout = 0.1
    config.model = ConfigDict(
        {
            "name": "gspn_s2",  # or dit_s2, ...
            "mixer": placeholder(str),  # "gspn" or "attention"; not set: as the model's name says
            "alignment": "aligned",
            "dtype": "bfloat16",  # of the computation; parameters are float32
            "remat": False,  # blocks are computed again in the backward pass
            # Where not set: as the model's name says.
            "width": placeholder(int),
            "depth": placeholder(int),
            "patch": placeholder(int),
            "drop_path": placeholder(float),
            "chunk": placeholder(int),
            "global_blocks": placeholder(tuple),
            "num_heads": placeholder(int),
            "proxy_rank": placeholder(int),
            "implementation": placeholder(str),  # of the propagation; not set: the fastest that can run
            "variant": placeholder(str),  # of its kernels; not set: the fastest by their table
        }
    )
    config.data = ConfigDict(
        {
            "name": "npz",
            "path": "",
            "image_size": 32,
            "resize": 0,
            "num_threads": 8,
            "num_workers": 0,
            "on_corrupt": "stop",  # or "drop"
        }
    )
    config.augmentation = ConfigDict({"crop": "none", "flip": True})
    config.optimizer = ConfigDict(
        {
            "learning_rate": 2e-4,  # of a batch of 512: 1e-4 of 256
            "warmup_learning_rate": 0.0,
            "min_learning_rate": 2e-4,
            "warmup_epochs": 0.0,
            "weight_decay": 0.0,
            "b1": 0.9,
            "b2": 0.999,
            "eps": 1e-8,
            "clip": 1.0,
            "ema_decay": 0.9999,
            "ema_warmup": False,
        }
    )
    config.mesh = ConfigDict({"data": -1, "model": 1, "fsdp": False})
    config.intervals = ConfigDict({"log_steps": 100, "evaluate_epochs": 5.0, "checkpoint_epochs": 1.0})
    config.keep = 3  # checkpoints
    config.profile_steps = ""  # such as 10:15
    config.compilation_cache = ""  # folder for compiled programs
    return config


def _digits(config: Any) -> None:
    config.data.name = "digits"
    config.data.image_size = 8
    config.data.num_threads = 2
    config.augmentation.flip = False
    config.objective = "linear"
    config.model.dtype = "float32"
    config.model.width = 96
    config.model.depth = 4
    config.model.global_blocks = (0, 1, 2, 3, 4)
    config.batch_size = 64
    config.epochs = 75
    config.optimizer.learning_rate = 1.6e-2
    config.optimizer.min_learning_rate = 1e-5
    config.optimizer.warmup_epochs = 2.0
    config.optimizer.ema_decay = 0.995
    config.optimizer.ema_warmup = True
    config.intervals.log_steps = 44
    config.intervals.evaluate_epochs = 25.0
    config.intervals.checkpoint_epochs = 25.0


def _cifar10(config: Any) -> None:
    config.data.path = "cifar10.npz"


def _imagenet(name: str, config: Any) -> None:
    family, _, size = name.partition("_")
    config.data.name = "latents"
    config.data.image_size = 256
    config.model.name = f"dit_{size}" if family == "sit" else name
    if family == "sit":
        config.objective = "linear"
    if family == "gspn":
        config.model.drop_path = 0.1


PRESETS: dict[str, Callable[[Any], None]] = {"digits": _digits, "cifar10": _cifar10} | {
    f"{family}_{size}": functools.partial(_imagenet, f"{family}_{size}")
    for family in ("gspn", "dit", "sit")
    for size in ("b2", "l2", "xl2")
}
