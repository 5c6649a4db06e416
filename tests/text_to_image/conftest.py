"""The tiny published folders, loaded once, and the runs of the programs that everybody uses."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gspn_jax import TextToImage

GOLDEN = Path(__file__).parents[1] / "golden" / "text_to_image"
KINDS = ("sd15", "sdxl")


class Golden:
    """A folder's pipeline and the arrays of the runs with it, channels last."""

    def __init__(self, kind: str):
        self.kind, self.folder = kind, GOLDEN / f"{kind}_folder"
        self.pipeline = TextToImage.load(self.folder)
        with np.load(GOLDEN / f"pipeline_{kind}.npz") as file:
            self.arrays = {
                name: np.moveaxis(array, -3, -1) if "latents" in name or name.endswith("noise") else array
                for name, array in file.items()
            }
        arrays = self.arrays
        self.prompts, self.negatives = list(map(str, arrays["prompt"])), list(map(str, arrays["negative_prompt"]))
        self.call: dict[str, Any] = dict(
            noise=arrays["noise"], num_steps=int(arrays["steps"]), guidance=float(arrays["guidance"]),
            height=int(arrays["height"]), width=int(arrays["width"]), progress=False,
        )  # fmt: skip
        if kind == "sdxl":
            names = dict(original_size="original_size", target_size="target_size", crop="crops_coords_top_left")
            self.call |= {ours: tuple(map(int, arrays[theirs])) for ours, theirs in names.items()}


@pytest.fixture(scope="session")
def goldens() -> dict[str, Golden]:
    return {kind: Golden(kind) for kind in KINDS}
