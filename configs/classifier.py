"""Image classifiers: presets of one configuration.

    python -m experiments.train --config=configs/classifier.py:PRESET --workdir=runs/PRESET

preset         data                model      expected top-1                          cost
-------------  ------------------  ---------  --------------------------------------  ---------------------------------
digits         1,437 + 360 (8x8)   gspn_nano  98.6 (355 of 360; seed 0)               1:46 min on two cores of an EPYC
fashion_mnist  60,000 + 10,000     gspn_nano  not yet measured                        not yet measured
cifar10        50,000 + 10,000     gspn_nano  63.1 after 4.1 epochs at stem_stride 4  17 min on one core of an EPYC
gspn_t         ImageNet-1K at 224  gspn_t     83.0 (paper); not yet measured here     300 epochs; not yet measured
gspn_s         ImageNet-1K at 224  gspn_s     83.8 (paper); not yet measured here     300 epochs; not yet measured
gspn_b         ImageNet-1K at 224  gspn_b     84.3 (paper); not yet measured here     300 epochs; not yet measured

What the presets need besides the command above:

    digits         nothing
    fashion_mnist  Debian's dataset-fashion-mnist, or --config.data.path=FOLDER with the idx files
    cifar10        --config.data.path=cifar10.npz (arrays x_train, y_train, x_test, y_test)
    gspn_t, _s, _b --config.data.path=ROOT with train/CLASS/*.jpg and val/CLASS/*.jpg; or, for a dataset prepared by
                   tensorflow-datasets, --config.data.name=tfds --config.data.path=DATA_DIR/imagenet2012

Any value can be set on the command line, such as --config.optimizer.learning_rate=1e-3. Learning rates are those of a
batch of 512 images and are scaled with the batch.
"""

from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)


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
    config.seed = 0
    config.batch_size = 2048  # images per optimiser step, over all devices
    config.accumulate = 1  # parts of a batch that are computed one after the other
    config.epochs = 300
    config.steps = 0  # optimiser steps instead of epochs, where not 0
    config.init_from = ""  # workdir to start from: what fits is loaded, a head of another size is replaced
    config.model = ConfigDict(
        {
            "name": "gspn_t",
            "mixer": "gspn",  # or "attention"
            "alignment": "aligned",
            "drop_path": 0.0,
            "dtype": "bfloat16",  # of the computation; parameters are float32
            "remat": False,  # blocks are computed again in the backward pass
            "keep_states": True,  # of the propagation, for its gradient; else it is computed again
            "activation": "none",  # between depthwise convolution and propagation; or "silu"
            # Where not set: as the model's name says.
            "widths": placeholder(tuple),
            "depths": placeholder(tuple),
            "global_stages": placeholder(tuple),
            "chunk": placeholder(int),  # lines of a local block
            "expansion": placeholder(float),
            "mlp_ratio": placeholder(float),
            "stem_stride": placeholder(int),
            "proxy_rank": placeholder(int),
            "weight_channels": placeholder(int),
            "propagation_channels": placeholder(int),
            "implementation": placeholder(str),  # of the line scan; not set: the fastest that can run
            "variant": placeholder(str),  # of its kernels in propagation; not set: the fastest by their table
        }
    )
    config.data = ConfigDict(
        {
            "name": "image_folder",
            "path": "",
            "image_size": 224,
            "resize": 0,  # short side before the centre crop of evaluation; 0: image_size / 0.875, which is 256 for 224
            "mean": IMAGENET_MEAN,  # per channel, of 0..255
            "std": IMAGENET_STD,
            "num_threads": 8,
            "num_workers": 0,
            "on_corrupt": "stop",  # or "drop"
        }
    )
    config.augmentation = ConfigDict(
        {
            "crop": "resized",
            "crop_scale": (0.08, 1.0),
            "crop_padding": 0,
            "flip": True,
            "randaugment_magnitude": 9.0,
            "randaugment_std": 0.5,
            "randaugment_increasing": True,
            "randaugment_ops": 2,
            "color_jitter": 0.4,  # only where RandAugment is off
            "erasing": 0.25,
        }
    )
    config.mixing = ConfigDict({"mixup": 0.8, "cutmix": 1.0, "probability": 1.0, "switch": 0.5, "label_smoothing": 0.1})
    config.optimizer = ConfigDict(
        {
            "learning_rate": 5e-4,
            "warmup_learning_rate": 5e-7,
            "min_learning_rate": 5e-6,
            "warmup_epochs": 20.0,
            "weight_decay": 0.05,
            "b1": 0.9,
            "b2": 0.999,
            "eps": 1e-8,
            "clip": 5.0,
            "ema_decay": 0.9999,
            "ema_warmup": False,
        }
    )
    config.mesh = ConfigDict({"data": -1, "model": 1, "fsdp": False})
    config.intervals = ConfigDict({"log_steps": 50, "evaluate_epochs": 1.0, "checkpoint_epochs": 1.0})
    config.keep = 3  # checkpoints
    config.profile_steps = ""  # such as 10:15
    config.compilation_cache = ""  # folder for compiled programs
    return config


def _gspn_t(config: Any) -> None:
    config.model.drop_path = 0.2


def _gspn_s(config: Any) -> None:
    config.model.name = "gspn_s"
    config.model.drop_path = 0.4
    config.optimizer.learning_rate = 3e-4
    config.optimizer.min_learning_rate = 3e-6


def _gspn_b(config: Any) -> None:
    config.model.name = "gspn_b"
    config.model.drop_path = 0.5
    config.batch_size = 1024


def _small_images(config: Any) -> None:
    """Little data, few pixels, a CPU: float32, light augmentation, a moving average that forgets its start."""
    config.model.name = "gspn_nano"
    config.model.dtype = "float32"
    config.data.num_threads = 2
    config.augmentation.crop = "padded"
    config.augmentation.flip = False
    config.augmentation.randaugment_magnitude = 0.0
    config.augmentation.color_jitter = 0.0
    config.augmentation.erasing = 0.0
    config.mixing.mixup = 0.0
    config.mixing.cutmix = 0.0
    config.optimizer.ema_decay = 0.998
    config.optimizer.ema_warmup = True


def _digits(config: Any) -> None:
    _small_images(config)
    config.data.name = "digits"
    config.data.image_size = 8
    config.model.stem_stride = 1
    config.data.mean = (77.9, 77.9, 77.9)
    config.data.std = (95.9, 95.9, 95.9)
    config.augmentation.crop_padding = 1
    config.batch_size = 128
    config.epochs = 20
    config.optimizer.learning_rate = 8e-3
    config.optimizer.warmup_epochs = 2.0
    config.intervals.log_steps = 11  # an epoch
    config.intervals.evaluate_epochs = 4.0
    config.intervals.checkpoint_epochs = 4.0


def _fashion_mnist(config: Any) -> None:
    _small_images(config)
    config.data.name = "fashion_mnist"
    config.data.image_size = 28
    config.data.mean = (72.94, 72.94, 72.94)
    config.data.std = (90.02, 90.02, 90.02)
    config.augmentation.crop_padding = 2
    config.augmentation.flip = True
    config.batch_size = 128
    config.epochs = 15
    config.optimizer.learning_rate = 4e-3
    config.optimizer.warmup_epochs = 1.0


def _cifar10(config: Any) -> None:
    _small_images(config)
    config.data.name = "npz"
    config.data.path = "cifar10.npz"
    config.data.image_size = 32
    config.data.mean = (125.307, 122.950, 113.866)
    config.data.std = (62.993, 62.089, 66.705)
    config.augmentation.crop_padding = 4
    config.augmentation.flip = True
    config.batch_size = 128
    config.epochs = 30
    config.optimizer.learning_rate = 4e-3
    config.optimizer.warmup_epochs = 2.0


PRESETS: dict[str, Callable[[Any], None]] = {
    "digits": _digits,
    "fashion_mnist": _fashion_mnist,
    "cifar10": _cifar10,
    "gspn_t": _gspn_t,
    "gspn_s": _gspn_s,
    "gspn_b": _gspn_b,
}
