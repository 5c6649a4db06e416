"""Runs: how their evaluation reads images."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from gspn_jax import data
from gspn_jax.runs import make_evaluate
from gspn_jax.training.sharding import MeshOptions, make_mesh


class _Seen:
    """A task whose numbers are two pixels of the first image."""

    def evaluate(self, params: Any, batches: Any) -> dict[str, float]:
        image = next(batches)["image"][0]
        return {"top left": float(image[0, 0, 0]), "top right": float(image[0, -1, 0])}


@pytest.mark.parametrize(("turns", "expected"), [({}, (200, 0)), ({"exif_rotation": True}, (0, 200))])
def test_evaluation_turns_images_as_training_did(tmp_path: Path, turns: dict[str, bool], expected: tuple[int, int]):
    folder = tmp_path / "val" / "only"
    folder.mkdir(parents=True)
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[0, 0] = 200
    exif = Image.Exif()
    exif[0x0112] = 6  # upright after a quarter turn to the right
    Image.fromarray(pixels).save(folder / "image.png", exif=exif)
    source = data.load("image_folder", str(tmp_path)).test
    described: Any = {"data": {"image_size": 8, "resize": 0, **turns}}
    task: Any = _Seen()
    with jax.set_mesh(make_mesh(MeshOptions())):
        numbers = make_evaluate(task, source, described, batch_size=8, num_threads=0)({})
    assert (numbers["top left"], numbers["top right"]) == expected
