"""What the configurations of all tasks share, and how a preset overrides it."""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict


def shared() -> Any:
    """Returns the values that every task has, a ConfigDict. The files beside this one add theirs."""
    return ConfigDict(
        {
            "seed": 0,
            "accumulate": 1,  # parts of a batch that are computed one after the other
            "steps": 0,  # optimiser steps instead of epochs, unless 0
            "init_from": "",  # workdir to start from: what fits is loaded, a head of another size is replaced
            "data": {
                "path": "",
                "resize": 0,  # short side before the centre crop of evaluation; 0: image_size / 0.875
                "num_threads": 8,
                "num_workers": 0,
                "on_corrupt": "stop",  # or "drop"
                "exif_rotation": False,  # turns photographs upright by their EXIF data; off as in ImageNet's protocols
            },
            "optimizer": {
                "b1": 0.9,
                "b2": 0.999,
                "eps": 1e-8,
                "ema_decay": 0.9999,
                "ema_warmup": False,
            },
            "mesh": {"data": -1, "model": 1, "fsdp": False},
            "keep": 3,  # checkpoints
            "profile_steps": "",  # such as 10:15
            "compilation_cache": "",  # folder for compiled programs
        }
    )


def preset_of(config: Any, presets: Mapping[str, Mapping[str, Any]], name: str) -> Any:
    """Returns `config` with the values of a preset, locked: a key that does not exist cannot be set.

    Args:
        config: the defaults of a task.
        presets: by name, values by dotted key.
        name: of the preset.

    Raises:
        ValueError: unknown preset.
    """
    if name not in presets:
        raise ValueError(f"preset: expected one of {', '.join(presets)}, got {name!r}")
    config.update_from_flattened_dict(presets[name])
    return config.lock()
