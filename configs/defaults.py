"""Configuration values that all tasks share, and the function that applies a preset's overrides."""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict


def shared() -> Any:
    """Returns the values that every task has, as a ConfigDict; each task's file adds its own."""
    return ConfigDict(
        {
            "seed": 0,
            "accumulate": 1,  # number of parts of a batch, computed one after the other (gradient accumulation)
            "steps": 0,  # optimiser steps; if not 0, they replace epochs
            "init_from": "",  # workdir whose parameters are loaded at the start; a head of another size starts fresh
            "data": {
                "path": "",
                "resize": 0,  # short side before the centre crop of evaluation; 0: image_size / 0.875
                "num_threads": 8,
                "num_workers": 0,
                "on_corrupt": "stop",  # or "drop"
                "exif_rotation": False,  # turns photographs upright by their EXIF data; off in ImageNet's protocols
            },
            "optimizer": {
                "b1": 0.9,
                "b2": 0.999,
                "eps": 1e-8,
                "ema_decay": 0.9999,
                "ema_warmup": False,
            },
            "mesh": {"data": -1, "model": 1, "fsdp": False},
            "keep": 3,  # number of checkpoints
            "profile_steps": "",  # FIRST:END, such as 10:15
            "compilation_cache": "",  # folder of compiled programs
        }
    )


def preset_of(config: Any, presets: Mapping[str, Mapping[str, Any]], name: str) -> Any:
    """Returns `config` with the values of a preset, locked, so that it refuses unknown keys.

    Args:
        config: ConfigDict with the defaults of a task; changed in place.
        presets: preset name -> {dotted key: value}.
        name: name of the preset.

    Raises:
        ValueError: an unknown preset.
    """
    if name not in presets:
        raise ValueError(f"preset: expected one of {', '.join(presets)}, got {name!r}")
    config.update_from_flattened_dict(presets[name])
    return config.lock()
