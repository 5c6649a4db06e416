"""A folder with one PNG for each caption, written by interruptible processes."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
from PIL import Image

from gspn_jax import folder_lock, resuming
from gspn_jax.evaluation.image_archive import to_pixels

MANIFEST, CAPTIONS = "manifest.json", "captions.json"


class PictureFolder:
    """Pictures of captions: 00000000.png is that of caption 0, and so on.

        with PictureFolder.opened("pictures", captions, settings) as folder:
            for number in folder.missing():
                folder.write(number, image)

    manifest.json holds the settings and captions.json the caption of each file.

    Attributes:
        path: the folder.
        count: how many captions.
    """

    def __init__(self, path: str | os.PathLike[str], count: int):
        self.path, self.count = Path(path), count

    @classmethod
    @contextmanager
    def opened(
        cls, path: str | os.PathLike[str], captions: Sequence[str], settings: Mapping[str, Any]
    ) -> Iterator[Self]:
        """Opens a folder that is new or was begun with the same captions and settings; a lock keeps other runs out.

        Args:
            path: made if it does not exist.
            captions: of the pictures.
            settings: JSON that says how the pictures are made.

        Raises:
            ValueError: the folder was begun otherwise, or holds other files.
            FolderInUse: another run writes to it.
        """
        folder = cls(path, len(captions))
        digest = hashlib.sha256("\n".join(captions).encode()).hexdigest()
        recorded = {**settings, "count": len(captions), "captions": digest}
        folder._check(recorded)
        with folder_lock.hold(folder.path, "drawing"):
            folder._check(recorded)  # another run may have ended since
            if jax.process_index() == 0:
                named = {folder._file(number).name: caption for number, caption in enumerate(captions)}
                resuming.write_whole(folder.path / CAPTIONS, json.dumps(named, indent=1, ensure_ascii=False) + "\n")
                resuming.write_whole(folder.path / MANIFEST, json.dumps(recorded, indent=2) + "\n")
            yield folder
            resuming.wait_for_all("pictures")

    def missing(self) -> list[int]:
        """Returns the numbers of the pictures that this process must still draw."""
        mine = range(jax.process_index(), self.count, jax.process_count())
        return [number for number in mine if not self._file(number).exists()]

    def write(self, number: int, image: np.ndarray) -> None:
        """Writes a picture, (H, W, 3) floats 0 to 1; its file appears when it is complete."""
        file = self._file(number)
        draft = file.with_suffix(".tmp")
        Image.fromarray(to_pixels(2 * image - 1)).save(draft, "PNG")
        os.replace(draft, file)

    def _file(self, number: int) -> Path:
        return self.path / f"{number:08d}.png"

    def _check(self, recorded: Mapping[str, Any]) -> None:
        manifest = self.path / MANIFEST
        if manifest.exists():
            try:
                there = json.loads(manifest.read_text())
            except ValueError as error:
                raise ValueError(f"output_folder: expected JSON in {manifest}: {error}") from error
            resuming.check_settings("output_folder", self.path, there, recorded)
        elif self.path.exists() and any(file.name != folder_lock.FILE for file in self.path.iterdir()):
            raise ValueError(
                f"output_folder: expected a new folder, or one that was begun by this command: {self.path}"
            )
