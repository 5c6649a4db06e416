"""Loads batches of latents in one thread: sample numbers to moments and labels."""

import dataclasses
from typing import Any

import numpy as np

from gspn_jax.data import crops
from gspn_jax.data.arguments import check_integer
from gspn_jax.data.augmentation import Augmentation
from gspn_jax.data.sources.protocol import Latents


@dataclasses.dataclass(frozen=True)
class _LatentLoader:
    source: Latents
    image_size: crops.Size

    def __post_init__(self) -> None:
        side = self.source.image_size
        if self.image_size != (side, side):
            raise ValueError(f"image_size: expected {side}, as the images that were encoded, got {self.image_size}")

    def _empty(self, rows: int) -> dict[str, Any]:
        moments = {name: np.zeros((rows, *self.source.shape), np.float32) for name in ("mean", "log_variance")}
        return {**moments, "label": np.zeros(rows, np.int32), "corrupt": []}

    def _fill(self, batch: dict[str, Any], row: int, index: int, copy: int) -> None:
        batch["mean"][row], batch["log_variance"][row], batch["label"][row] = self.source.latents(index, copy)


@dataclasses.dataclass(frozen=True)
class LatentTrainingLoader(_LatentLoader):
    """Loads training batches; if the augmentation flips, a random half of the images are mirror images."""

    augmentation: Augmentation
    seed: int

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("seed", self.seed, 0, 2**63 - 1)
        if self.augmentation != Augmentation(flip=self.augmentation.flip):
            raise ValueError(f"augmentation: expected flip only, because these are latents, got {self.augmentation}")
        if self.augmentation.flip and self.source.copies < 2:
            raise ValueError(
                "augmentation.flip: expected False, because these latents were encoded without mirror images, got True"
            )

    def __call__(self, samples: tuple[np.ndarray, np.ndarray]) -> dict[str, Any]:
        """Returns {"mean", "log_variance", "label", "corrupt": []} for (global positions, indices), both (b,)."""
        positions, indices = samples
        batch = self._empty(len(positions))
        for row, (position, index) in enumerate(zip(positions, indices, strict=True)):
            rng = np.random.Generator(np.random.Philox(key=np.array([self.seed, position], np.uint64)))
            copy = int(self.augmentation.flip and rng.random() < 0.5)
            self._fill(batch, row, int(index), copy)
        return batch


@dataclasses.dataclass(frozen=True)
class LatentEvaluationLoader(_LatentLoader):
    """Loads batches in order; sample numbers past the end of the source give padding."""

    def __call__(self, indices: np.ndarray) -> dict[str, Any]:
        """Returns {"mean", "log_variance", "label", "mask", "corrupt": []} for sample numbers (b,)."""
        batch = self._empty(len(indices))
        batch["mask"] = indices < len(self.source)
        for row, index in enumerate(indices):
            if batch["mask"][row]:
                self._fill(batch, row, int(index), 0)
        return batch
