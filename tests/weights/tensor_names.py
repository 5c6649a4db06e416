"""Names and shapes of the tensors in the published files of SD-1.5 and SDXL, which are too large for a repository."""

import ast
import pathlib

import numpy as np

_FOLDER = pathlib.Path(__file__).parents[1] / "golden" / "text_to_image" / "tensor_names"


def published_shapes(file: str) -> dict[str, tuple[int, ...]]:
    """Returns shapes by name. file: "sd15" and "sdxl" (UNets), "vae", "clipL" or "bigG" (text towers)."""
    lines = (_FOLDER / f"{file}.keys").read_text().splitlines()
    return {name: ast.literal_eval(shape) for name, shape in (line.split("\t") for line in lines)}


def stand_in(shape: tuple[int, ...]) -> np.ndarray:
    """Returns float32 zeros of a shape that take four bytes."""
    return np.broadcast_to(np.float32(0), shape)
