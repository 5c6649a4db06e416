"""Synthetic images for tests and benchmarks: nothing to download, and classes that a network can learn."""

import dataclasses

import numpy as np

from gspn_jax.data.arguments import check_integer, image_shape
from gspn_jax.data.sources.protocol import Dataset, check_class_names


@dataclasses.dataclass(frozen=True)
class Stripes:
    """Coloured stripes with noise: the class sets direction and colour, a random number the phase.

    Sample i has label i % num_classes and is the same on every access, in every process.
    """

    size: int
    image_size: tuple[int, int]
    num_classes: int
    seed: int
    noise: float = 40.0

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int, /) -> tuple[np.ndarray, int]:
        if not 0 <= index < self.size:
            raise IndexError(f"index: expected 0 to {self.size - 1}, got {index}")
        label = index % self.num_classes
        rng = np.random.Generator(np.random.Philox(key=np.array([self.seed, index], np.uint64)))
        height, width = self.image_size
        turn = np.pi * label / self.num_classes
        along = np.cos(turn) * np.arange(width) / width + np.sin(turn) * np.arange(height)[:, None] / height
        wave = np.sin(2 * np.pi * (2 * along + rng.random()))
        colour = np.cos(2 * turn + np.array([0.0, 2.0, 4.0]))
        image = 128 + 50 * wave[:, :, None] * colour + 20 * colour
        image += rng.normal(0, self.noise, (height, width, 3))
        return np.clip(np.round(image), 0, 255).astype(np.uint8), label

    def describe(self, index: int, /) -> str:
        return f"fake, seed {self.seed}, sample {index}"


def fake(
    path: str | None = None,
    *,
    image_size: int | tuple[int, int] = 32,
    num_classes: int = 10,
    train_size: int = 1024,
    test_size: int = 256,
    seed: int = 0,
) -> Dataset:
    """Makes synthetic images, uint8 (H, W, 3), on access from (seed, index); see `Stripes`.

    Args:
        path: None; nothing is read.
        image_size: side, or (height, width), in pixels.
        num_classes: number of classes, each with its own stripes.
        train_size: number of training samples.
        test_size: number of held-out samples.
        seed: another seed gives other images.

    Raises:
        ValueError: a path, or a number out of range.
    """
    if path is not None:
        raise ValueError(f"path: expected None, because fake images are made on access, got {path!r}")
    size = image_shape(image_size)
    check_integer("num_classes", num_classes, 1)
    check_integer("train_size", train_size, 1)
    check_integer("test_size", test_size, 1)
    check_integer("seed", seed, 0)
    return Dataset(
        name="fake",
        num_classes=num_classes,
        class_names=check_class_names(None, num_classes),
        train=Stripes(train_size, size, num_classes, seed=2 * seed),
        test=Stripes(test_size, size, num_classes, seed=2 * seed + 1),
    )
