"""Image classifiers: presets of one configuration.

    python -m experiments.train --config=configs/classifier.py:PRESET --workdir=runs/PRESET

preset         data                model      expected top-1                          cost
-------------  ------------------  ---------  --------------------------------------  ---------------------------------
digits         1,437 + 360 (8x8)   gspn_nano  98.6 (355 of 360; seed 0)               1:46 min on two cores of an EPYC
fashion_mnist  60,000 + 10,000     gspn_nano  not yet measured                        not yet measured
cifar10        50,000 + 10,000     gspn_nano  63.1 after 4.1 epochs at stem_stride 4  17 min on one core of an EPYC
gspn_t         ImageNet-1K at 224  gspn_t     83.0 in the paper; not yet reproduced   300 epochs; not yet measured
gspn_s         ImageNet-1K at 224  gspn_s     83.8 in the paper; not yet reproduced   300 epochs; not yet measured
gspn_b         ImageNet-1K at 224  gspn_b     84.3 in the paper; not yet reproduced   300 epochs; not yet measured

Further flags that the presets need:

    digits         none
    fashion_mnist  Debian's dataset-fashion-mnist, or --config.data.path=FOLDER with the idx files
    cifar10        --config.data.path=cifar10.npz (arrays x_train, y_train, x_test, y_test)
    gspn_t, _s, _b --config.data.path=ROOT with train/CLASS/*.jpg and val/CLASS/*.jpg; or, for a dataset prepared by
                   tensorflow-datasets, --config.data.name=tfds --config.data.path=DATA_DIR/imagenet2012

Flags can set any value, such as --config.optimizer.learning_rate=1e-3. Learning rates are given for a batch of 512
images and scale linearly with the batch size.
"""

from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs import defaults

IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)

# For little data, few pixels and a CPU: float32, light augmentation, a moving average with a warm-up.
_SMALL_IMAGES = {
    "model.name": "gspn_nano",
    "model.dtype": "float32",
    "data.num_threads": 2,
    "augmentation.crop": "padded",
    "augmentation.randaugment_magnitude": 0.0,
    "augmentation.color_jitter": 0.0,
    "augmentation.erasing": 0.0,
    "mixing.mixup": 0.0,
    "mixing.cutmix": 0.0,
    "optimizer.ema_decay": 0.998,
    "optimizer.ema_warmup": True,
    "batch_size": 128,
}

PRESETS: dict[str, dict[str, Any]] = {
    "digits": _SMALL_IMAGES
    | {
        "data.name": "digits",
        "data.image_size": 8,
        "data.mean": (77.9, 77.9, 77.9),
        "data.std": (95.9, 95.9, 95.9),
        "model.stem_stride": 1,
        "augmentation.crop_padding": 1,
        "augmentation.flip": False,
        "epochs": 20,
        "optimizer.learning_rate": 8e-3,
        "optimizer.warmup_epochs": 2.0,
        "intervals.log_steps": 11,  # an epoch
        "intervals.evaluate_epochs": 4.0,
        "intervals.checkpoint_epochs": 4.0,
    },
    "fashion_mnist": _SMALL_IMAGES
    | {
        "data.name": "fashion_mnist",
        "data.image_size": 28,
        "data.mean": (72.94, 72.94, 72.94),
        "data.std": (90.02, 90.02, 90.02),
        "augmentation.crop_padding": 2,
        "epochs": 15,
        "optimizer.learning_rate": 4e-3,
        "optimizer.warmup_epochs": 1.0,
    },
    "cifar10": _SMALL_IMAGES
    | {
        "data.name": "npz",
        "data.path": "cifar10.npz",
        "data.image_size": 32,
        "data.mean": (125.307, 122.950, 113.866),
        "data.std": (62.993, 62.089, 66.705),
        "augmentation.crop_padding": 4,
        "epochs": 30,
        "optimizer.learning_rate": 4e-3,
        "optimizer.warmup_epochs": 2.0,
    },
    "gspn_t": {"model.name": "gspn_t", "model.drop_path": 0.2},
    "gspn_s": {
        "model.name": "gspn_s",
        "model.drop_path": 0.4,
        "optimizer.learning_rate": 3e-4,
        "optimizer.min_learning_rate": 3e-6,
    },
    "gspn_b": {"model.name": "gspn_b", "model.drop_path": 0.5, "batch_size": 1024},
}


def get_config(preset: str = "digits") -> Any:
    """Returns the configuration of a preset, a locked ConfigDict, which refuses unknown keys.

    Raises:
        ValueError: an unknown preset.
    """
    return defaults.preset_of(_defaults(), PRESETS, preset)


def _defaults() -> Any:
    """Returns the values of classification that presets override."""
    config = defaults.shared()
    config.task = "classification"
    config.batch_size = 2048  # images per optimiser step, over all devices
    config.epochs = 300
    config.model = ConfigDict(
        {
            "name": "gspn_t",
            "mixer": "gspn",  # or "attention"
            "drop_path": 0.0,
            "dtype": "bfloat16",  # dtype of the computation; parameters are float32
            "remat": False,  # recomputes blocks in the backward pass instead of keeping their inner maps
            "activation": "none",  # between depthwise convolution and propagation; or "silu"
            # The model's preset supplies these unless they are set.
            "widths": placeholder(tuple),
            "depths": placeholder(tuple),
            "global_stages": placeholder(tuple),
            "chunk": placeholder(int),  # lines of a local block
            "expansion": placeholder(float),
            "mlp_ratio": placeholder(float),
            "stem_stride": placeholder(int),
            # Options of the GSPN mixer, which supplies the defaults.
            "alignment": placeholder(str),  # "aligned" or "unturned"
            "proxy_rank": placeholder(int),
            "weight_channels": placeholder(int),
            "propagation_channels": placeholder(int),
            "implementation": placeholder(str),  # of the propagation; default: the fastest that can run
            "variant": placeholder(str),  # of its Mosaic kernels; default: the fastest by their table
            "keep_states": placeholder(bool),  # keeps hidden states for the gradient (default), or recomputes them
        }
    )
    config.data.update({"name": "image_folder", "image_size": 224})
    config.data.mean = IMAGENET_MEAN  # per channel, on the 0..255 scale
    config.data.std = IMAGENET_STD
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
            "color_jitter": 0.4,  # used only if RandAugment is off
            "erasing": 0.25,
        }
    )
    config.mixing = ConfigDict({"mixup": 0.8, "cutmix": 1.0, "probability": 1.0, "switch": 0.5, "label_smoothing": 0.1})
    config.optimizer.update(
        {
            "learning_rate": 5e-4,
            "warmup_learning_rate": 5e-7,
            "min_learning_rate": 5e-6,
            "warmup_epochs": 20.0,
            "weight_decay": 0.05,
            "clip": 5.0,
        }
    )
    config.intervals = ConfigDict({"log_steps": 50, "evaluate_epochs": 1.0, "checkpoint_epochs": 1.0})
    return config
