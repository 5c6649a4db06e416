"""Class-conditional generators: presets of one configuration.

    python -m experiments.train --config=configs/generator.py:PRESET --workdir=runs/PRESET
    python -m experiments.sample --workdir=runs/PRESET --output=samples.png

preset    data                   model                             expected result                       cost
--------  ---------------------  --------------------------------  ------------------------------------  --------------
digits    1,437 + 360 (8x8)      GSPN, 5 blocks of width 96,       99.6% of 500 images recognised by     5 min on two
                                 patch 2; linear interpolant       the classifier of digits (seed 0)     CPU cores
cifar10   50,000 + 10,000        gspn_s2 in pixels, patch 2        not yet run to its end                not measured
gspn_b2   ImageNet-1K latents    GSPN-B/2                          FID 28.70 (paper); not yet run        not measured
gspn_l2   the same               GSPN-L/2                          FID 17.25 (paper); not yet run        not measured
gspn_xl2  the same               GSPN-XL/2                         FID 15.26 (paper); not yet run        not measured
dit_b2    the same               DiT-B/2; dit_l2, dit_xl2          dit_xl2: FID 20.05 (GSPN paper);      not measured
                                                                   not yet run
sit_b2    the same               SiT-B/2: DiT-B/2 as a linear      sit_xl2: FID 18.04 (GSPN paper);      not measured
                                 interpolant; sit_l2, sit_xl2      not yet run

Further flags that the presets need: cifar10 takes --config.data.path=cifar10.npz (arrays x_train, y_train, x_test,
y_test); the ImageNet presets take --config.data.path=LATENTS, a folder written by `python -m
experiments.encode_latents`. They train as DiT and SiT do: 80 epochs with a batch of 256, which are 400,000 steps.
GSPN's stochastic depth is its authors' value.

Learning rates are given for a batch of 512 images and scale linearly with the batch size. GSPN's authors trained with a
batch of 1,024 at 1e-4: --config.batch_size=1024 --config.optimizer.learning_rate=5e-5 --config.epochs=1500
--config.optimizer.min_learning_rate=5e-7 --config.optimizer.warmup_epochs=5. Flags can set any value:
--config.objective=gvp trains the network as another interpolant, --config.model.name=dit_s2 trains another network,
--config.model.remat=True saves memory.
"""

from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs import defaults

_LATENTS = {"data.name": "latents", "data.image_size": 256}

PRESETS: dict[str, dict[str, Any]] = {
    "digits": {
        "data.name": "digits",
        "data.image_size": 8,
        "data.num_threads": 2,
        "augmentation.flip": False,
        "objective": "linear",
        "model.dtype": "float32",
        "model.width": 96,
        "model.depth": 4,
        "model.global_blocks": (0, 1, 2, 3, 4),
        "batch_size": 64,
        "epochs": 75,
        "optimizer.learning_rate": 1.6e-2,
        "optimizer.min_learning_rate": 1e-5,
        "optimizer.warmup_epochs": 2.0,
        "optimizer.ema_decay": 0.995,
        "optimizer.ema_warmup": True,
        "intervals.log_steps": 44,
        "intervals.evaluate_epochs": 25.0,
        "intervals.checkpoint_epochs": 25.0,
    },
    "cifar10": {"data.path": "cifar10.npz"},
    "gspn_b2": _LATENTS | {"model.name": "gspn_b2", "model.drop_path": 0.1},
    "gspn_l2": _LATENTS | {"model.name": "gspn_l2", "model.drop_path": 0.1},
    "gspn_xl2": _LATENTS | {"model.name": "gspn_xl2", "model.drop_path": 0.1},
    "dit_b2": _LATENTS | {"model.name": "dit_b2"},
    "dit_l2": _LATENTS | {"model.name": "dit_l2"},
    "dit_xl2": _LATENTS | {"model.name": "dit_xl2"},
    "sit_b2": _LATENTS | {"model.name": "dit_b2", "objective": "linear"},
    "sit_l2": _LATENTS | {"model.name": "dit_l2", "objective": "linear"},
    "sit_xl2": _LATENTS | {"model.name": "dit_xl2", "objective": "linear"},
}


def get_config(preset: str = "digits") -> Any:
    """Returns the configuration of a preset, a locked ConfigDict, which refuses unknown keys.

    Raises:
        ValueError: an unknown preset.
    """
    return defaults.preset_of(_defaults(), PRESETS, preset)


def _defaults() -> Any:
    """Returns the values of generation that presets override."""
    config = defaults.shared()
    config.task = "generation"
    config.batch_size = 256  # images per optimiser step, over all devices
    config.epochs = 80
    config.objective = "ddpm"  # or an interpolant: "linear", "gvp"
    config.label_dropout = 0.1
    config.model = ConfigDict(
        {
            "name": "gspn_s2",  # or dit_s2, ...
            "mixer": placeholder(str),  # "gspn" or "attention"; default: the mixer of the model's preset
            "dtype": "bfloat16",  # dtype of the computation; parameters are float32
            "remat": False,  # recomputes blocks in the backward pass instead of keeping their inner maps
            # The model's preset supplies these unless they are set.
            "width": placeholder(int),
            "depth": placeholder(int),
            "patch": placeholder(int),
            "drop_path": placeholder(float),
            "chunk": placeholder(int),
            "global_blocks": placeholder(tuple),
            "num_heads": placeholder(int),
            # Options of the GSPN mixer, which supplies the defaults.
            "alignment": placeholder(str),  # "aligned" or "unturned"
            "proxy_rank": placeholder(int),
            "implementation": placeholder(str),  # of the propagation; default: the fastest that can run
            "variant": placeholder(str),  # of its Mosaic kernels; default: the fastest by their table
            "keep_states": placeholder(bool),  # keeps hidden states for the gradient (default), or recomputes them
        }
    )
    config.data.update({"name": "npz", "image_size": 32})
    config.augmentation = ConfigDict({"crop": "none", "flip": True})
    config.optimizer.update(
        {
            "learning_rate": 2e-4,  # for a batch of 512, which is 1e-4 for a batch of 256
            "warmup_learning_rate": 0.0,
            "min_learning_rate": 2e-4,
            "warmup_epochs": 0.0,
            "weight_decay": 0.0,
            "clip": 1.0,
        }
    )
    config.intervals = ConfigDict({"log_steps": 100, "evaluate_epochs": 5.0, "checkpoint_epochs": 1.0})
    return config
