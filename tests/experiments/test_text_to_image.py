"""The command: one image, a grid, and a folder of captions that goes on after an interruption."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from experiments import text_to_image
from gspn_jax.text_to_image.picture_folder import PictureFolder


class Stand:
    """Draws a flat image whose brightness is the image's number; stands in for a pipeline."""

    def __init__(self) -> None:
        self.drawn: list[int] = []

    def settings(self, **call: Any) -> dict[str, Any]:
        return {"parameters": "hash", "mixer": "gspn", **call}

    def __call__(self, prompts: list[str], *, numbers: list[int], progress: bool, **call: Any) -> np.ndarray:
        if len(self.drawn) > 3:
            raise KeyboardInterrupt
        self.drawn += numbers
        return np.stack([np.full((8, 8, 3), number / 255, np.float32) for number in numbers])


FOLDER = Path(__file__).parents[1] / "golden" / "text_to_image" / "sd15_folder"
CAPTIONS = ["a cat", "a dog", "a cow", "naïve café", "a fox"]


def test_a_folder_goes_on_where_it_was_interrupted(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder, first, second = tmp_path / "pictures", Stand(), Stand()
    call: dict[str, Any] = dict(batch_size=2, num_steps=3, seed=0)
    with pytest.raises(KeyboardInterrupt):
        text_to_image.draw_captions(first, CAPTIONS, str(folder), **call)  # pyright: ignore[reportArgumentType]
    assert first.drawn == [0, 1, 2, 3] and len(list(folder.glob("*.png"))) == 4
    (folder / "00000001.png").unlink()
    text_to_image.draw_captions(second, CAPTIONS, str(folder), **call)  # pyright: ignore[reportArgumentType]
    assert second.drawn == [1, 4]
    for number in range(5):
        with Image.open(folder / f"{number:08d}.png") as image:
            assert np.all(np.asarray(image) == number)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["num_steps"] == 3 and manifest["count"] == 5 and manifest["parameters"] == "hash"
    assert json.loads((folder / "captions.json").read_text())["00000003.png"] == "naïve café"
    assert capsys.readouterr().out.splitlines()[-1] == f"{folder}: 5 images"
    for captions, changes, words in (
        (CAPTIONS, {"seed": 1}, r"made with \(seed=0\), got seed=1"),
        ([*CAPTIONS[:-1], "a bee"], {}, "made with .captions="),
    ):
        with pytest.raises(ValueError, match=f"output_folder: expected the settings that .* {words}"):
            text_to_image.draw_captions(Stand(), captions, str(folder), **{**call, **changes})  # pyright: ignore[reportArgumentType]


def test_a_folder_of_other_files_is_refused(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="output_folder: expected a new folder"):
        with PictureFolder.opened(tmp_path, CAPTIONS, {}):
            pass
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.full
def test_one_image_and_a_grid(tmp_path: Path, command: Any, capsys: pytest.CaptureFixture[str]):
    one, grid = tmp_path / "one.png", tmp_path / "grid.png"
    words = [f"--model={FOLDER}", "--num_steps=1", "--guidance=1", "--prompt=a cat"]
    command(text_to_image, *words, f"--output={one}")
    with Image.open(one) as image:
        assert image.size == (64, 64) and np.asarray(image).std() > 10
    command(
        text_to_image, *words, "--prompt=a dog", f"--output={grid}", f"--image={one}", "--strength=1", "--size=72x64"
    )
    with Image.open(grid) as image:
        assert image.size[0] > 144
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"{one}: 1 images of 64x64 pixels", f"{grid}: 2 images of 72x64 pixels"]


@pytest.mark.parametrize("words,message", [
    ([], "prompt, prompts: expected one of the two, got none"),
    (["--prompt=a", "--prompts=b.txt"], "prompt, prompts: expected one of the two, got both"),
    (["--prompts=b.txt"], "output_folder: expected a folder with --prompts"),
    (["--prompt=a", "--strength=0.5"], "strength: expected none without --image, got 0.5"),
    (["--prompt=a", "--crop=1"], "crop: expected two numbers, got 1"),
    (["--prompt=a", "--output=a.txt"], "output: expected the name of an image file"),
    (["--prompt=a", "--model=/nowhere"], "source: .*/nowhere"),
])  # fmt: skip
def test_mistakes_are_named(words: list[str], message: str, command: Any):
    with pytest.raises(ValueError, match=message):
        command(text_to_image, f"--model={FOLDER}", *words)


@pytest.mark.parametrize("text,size", [("", None), ("768x512", (768, 512))])
def test_sizes(text: str, size: tuple[int, int] | None):
    assert text_to_image._size(text) == size


@pytest.mark.parametrize("text", ["768", "axb", "1x2x3", "-8x8"])
def test_sizes_that_are_none(text: str):
    with pytest.raises(ValueError, match=f"size: expected WIDTHxHEIGHT, such as 768x512, got {text}"):
        text_to_image._size(text)
