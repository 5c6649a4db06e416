"""Batches for training and evaluation.

Everything follows from one number, the global position n of a sample in the endless training stream. Its index is
the n-th of the epochs' permutations, one after the other. Its random numbers are keyed by (seed, n). Global batch g
holds positions g*B to (g+1)*B - 1 in order, and process p of P takes the p-th part. So a training run gets the same
images with any number of processes, threads and workers, and after an interruption.
"""

import dataclasses
import functools
import logging
from typing import Any, Self

import grain
import numpy as np

from gspn_jax.data.arguments import check_integer, image_shape
from gspn_jax.data.augmentation import Augmentation
from gspn_jax.data.latent_loading import LatentEvaluationLoader, LatentTrainingLoader
from gspn_jax.data.loading import EvaluationLoader, OnCorrupt, TrainingLoader
from gspn_jax.data.readers import Readers, Stream
from gspn_jax.data.sources.protocol import Latents, Source

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class _Order:
    """The endless stream of (position, index): each epoch has its own permutation."""

    samples: int
    seed: int

    def __len__(self) -> int:
        return 2**62

    def __getitem__(self, index: int) -> tuple[int, int]:
        epoch, place = divmod(index, self.samples)
        return index, int(_permutation(self.samples, self.seed, epoch)[place])


@functools.lru_cache(maxsize=4)  # threads work at the end of one epoch and the beginning of the next
def _permutation(samples: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(np.arange(samples, dtype=np.int32))


class Batches:
    """An endless iterator over this process's training batches; see `training_batches`."""

    def __init__(self, load: TrainingLoader | LatentTrainingLoader, readers: Readers):
        self._load = load
        self._readers = readers
        self._position = 0
        self._samples = len(load.source)
        self._warned: set[str] = set()
        self._iterator: Stream | None = None
        self._stream = grain.MapDataset.source(_Order(self._samples, load.seed))

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> dict[str, Any]:
        if self._iterator is None:
            self._iterator = self._readers.iterate(self._stream[self._position :], self._load)
        try:
            batch = next(self._iterator)
        except BaseException:
            self.close()
            raise
        self._position += self._readers.batch_size
        corrupt = batch.pop("corrupt")
        _warn(corrupt, self._warned, "replaced by its neighbour")
        return {**batch, "replaced": len(corrupt)}

    def state(self) -> dict[str, int]:
        """Returns the state for `restore`, JSON for a checkpoint: next position, seed, number of samples."""
        return {"position": self._position, "seed": self._load.seed, "samples": self._samples}

    def restore(self, state: dict[str, int]) -> None:
        """Continues at a saved state. Number of processes, batch size, threads and workers may differ.

        Raises:
            ValueError: the state has another seed or number of samples, or is not a state.
        """
        here = self.state()
        if set(state) != set(here) or not 0 <= state["position"]:
            raise ValueError(f"state: expected a value of Batches.state(), such as {here}, got {state}")
        for name in ("seed", "samples"):
            if state[name] != here[name]:
                raise ValueError(f"state: expected {name}={here[name]}, as in this run, got {state[name]}")
        self.close()
        self._position = int(state["position"])

    def close(self) -> None:
        """Ends threads and workers. Asking for another batch starts new ones."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None


def training_batches(
    source: Source | Latents,
    *,
    batch_size: int,
    image_size: int | tuple[int, int],
    augmentation: Augmentation | None = None,
    seed: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int = 8,
    num_workers: int = 0,
    on_corrupt: OnCorrupt = "stop",
    exif_rotation: bool = False,
) -> Batches:
    """Returns an endless stream of shuffled, augmented batches: every sample once per epoch, epochs without gaps.

    Args:
        source: images or latents; may be smaller than a batch.
        batch_size: B, over all processes.
        image_size: S or (H, W) of the result, in pixels.
        augmentation: None for none: the image is resized and its centre cropped, as in evaluation.
        seed: sets the order and the augmentation.
        process_index: p: this process gets rows p*B/P to (p+1)*B/P - 1 of each batch.
        process_count: P, the number of processes.
        num_threads: threads that make batches ahead, each one batch: num_threads + 1 batches are in memory. 0 makes
            them in the caller's thread.
        num_workers: worker processes that make batches, for when Python's lock limits threads; they share num_threads.
            They are spawned, so the program's main module needs its `if __name__ == "__main__"`. Batches pass through
            shared memory, of which containers often have little (/dev/shm).
        on_corrupt: "stop": raise CorruptImage, which names the file. "drop": take the next sample that can be decoded
            instead; a warning names the file once.
        exif_rotation: turn images upright by their EXIF orientation (phone photographs). Training on ImageNet
            traditionally ignores it. Latents are turned when they are encoded.

    Returns:
        An iterator of {"image": uint8 (B/P, H, W, 3), "label": int32 (B/P,), "replaced": int, number of corrupt images
        in the batch}. Its `state()` and `restore()` go with a checkpoint. Latents come as "mean" and "log_variance",
        (B/P, h, w, c) each, instead of "image".

    Raises:
        ValueError: an argument out of range, or an empty source.
    """
    readers = Readers(batch_size, process_index, process_count, num_threads, num_workers)
    size, augmentation = image_shape(image_size), augmentation or Augmentation()
    if isinstance(source, Latents):
        return Batches(LatentTrainingLoader(source, size, augmentation, seed), readers)
    return Batches(TrainingLoader(source, size, on_corrupt, exif_rotation, augmentation, seed), readers)


class EvaluationBatches:
    """An iterator over this process's evaluation batches; see `evaluation_batches`.

    Attributes:
        dropped: number of corrupt images masked out so far in this process.
    """

    def __init__(self, load: EvaluationLoader | LatentEvaluationLoader, readers: Readers):
        self._batches = -(-len(load.source) // readers.batch_size)
        samples = grain.MapDataset.range(self._batches * readers.batch_size)
        self._iterator: Stream | None = readers.iterate(samples, load)
        self._warned: set[str] = set()
        self.dropped = 0

    def __len__(self) -> int:
        """Returns the number of batches, which is the same in every process."""
        return self._batches

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> dict[str, Any]:
        if self._iterator is None:
            raise StopIteration
        try:
            batch = next(self._iterator)
        except BaseException:  # the end, most often
            self.close()
            raise
        corrupt = batch.pop("corrupt")
        self.dropped += len(corrupt)
        _warn(corrupt, self._warned, "left out of the evaluation")
        return batch

    def close(self) -> None:
        """Ends the iteration, its threads and workers."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None


def evaluation_batches(
    source: Source | Latents,
    *,
    batch_size: int,
    image_size: int | tuple[int, int],
    resize: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int = 8,
    num_workers: int = 0,
    on_corrupt: OnCorrupt = "stop",
    exif_rotation: bool = False,
) -> EvaluationBatches:
    """Returns batches with every sample once, in order: resized (bicubic, antialiased) and cropped at the centre.

    Args:
        source: images or latents.
        batch_size: B, over all processes. The last batch is padded with black images, mask False.
        image_size: S or (H, W) of the result, in pixels.
        resize: short side in pixels before cropping, such as 256 for 224. None: S / 0.875, but an image that has the
            right size already is not resized.
        process_index: see `training_batches`.
        process_count: see `training_batches`.
        num_threads: see `training_batches`.
        num_workers: see `training_batches`.
        on_corrupt: "stop": raise CorruptImage, which names the file. "drop": mask False; a warning names the file, and
            the iterator's `dropped` counts it.
        exif_rotation: see `training_batches`.

    Returns:
        An iterator of {"image": uint8 (B/P, H, W, 3), "label": int32 (B/P,), "mask": bool (B/P,)}. Its length is the
        same in every process. Latents come as "mean" and "log_variance" instead of "image".

    Raises:
        ValueError: an argument out of range, or an empty source.
    """
    readers = Readers(batch_size, process_index, process_count, num_threads, num_workers)
    size = image_shape(image_size)
    if resize is not None:
        check_integer("resize", resize, 1)
        if resize < min(size):
            raise ValueError(f"resize: expected at least the image size {min(size)}, got {resize}")
    if isinstance(source, Latents):
        return EvaluationBatches(LatentEvaluationLoader(source, size), readers)
    return EvaluationBatches(EvaluationLoader(source, size, on_corrupt, exif_rotation, resize), readers)


def _warn(corrupt: list[str], warned: set[str], fate: str) -> None:
    """Warns once for each corrupt image, not once per epoch."""
    for message in corrupt:
        if message not in warned:
            warned.add(message)
            _log.warning("%s: %s", message, fate)
