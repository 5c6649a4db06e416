"""Batches for training and evaluation, on grain.

Everything follows from one number, the global position n of a sample in the endless training stream: its index is
the n-th of the epochs' permutations, one after the other, its random numbers are keyed by (seed, n), and global batch g
holds positions g*B to (g+1)*B - 1 in order, of which process p of P takes the p-th part. So neither the number of
processes, nor of threads, nor of workers, nor an interruption changes what a training run sees.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import Any, Self

import grain
import numpy as np
from absl import flags

from gspn_jax.data.augmentation import Augmentation
from gspn_jax.data.latent_loading import LatentEvaluationLoader, LatentTrainingLoader
from gspn_jax.data.loading import EvaluationLoader, OnCorrupt, TrainingLoader
from gspn_jax.data.sources.protocol import Latents, Source

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class _Readers:
    """Who makes the batches: this process's share of them, in threads or worker processes."""

    batch_size: int
    process_index: int
    process_count: int
    num_threads: int
    num_workers: int

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("process_count", 1), ("num_threads", 0), ("num_workers", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        if not 0 <= self.process_index < self.process_count:
            raise ValueError(f"process_index: expected 0 to {self.process_count - 1}, got {self.process_index}")
        if self.batch_size % self.process_count:
            raise ValueError(
                f"batch_size: expected a multiple of process_count={self.process_count}, got {self.batch_size}"
            )

    @property
    def share(self) -> int:
        """Rows of each batch that belong to this process."""
        return self.batch_size // self.process_count

    def iterate(self, samples: grain.MapDataset, load: Callable[[Any], dict[str, Any]]) -> grain.DatasetIterator:
        """Batches in order. Each is made whole by one thread: an image is written once, into its row."""
        batches = samples.batch(self.share)[self.process_index :: self.process_count].map(load)
        threads = self.num_threads
        if self.num_workers:
            threads = -(-threads // self.num_workers)
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + 1 if threads else 0)
        dataset = batches.to_iter_dataset(options)
        if self.num_workers:
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()  # grain reads its own flags, which absl parses only in programs
            dataset = dataset.mp_prefetch(
                grain.MultiprocessingOptions(num_workers=self.num_workers, per_worker_buffer_size=1)
            )
        return iter(dataset)


@dataclasses.dataclass(frozen=True)
class _Order:
    """The endless stream of (position, index): every epoch is a permutation of its own."""

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

    def __init__(self, load: TrainingLoader | LatentTrainingLoader, readers: _Readers):
        self._load = load
        self._readers = readers
        self._position = 0
        self._samples = len(load.source)
        self._warned: set[str] = set()
        self._iterator: grain.DatasetIterator | None = None
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
        """What `restore` needs, for a checkpoint (JSON): where the next batch begins, and of which stream."""
        return {"position": self._position, "seed": self._load.seed, "samples": self._samples}

    def restore(self, state: dict[str, int]) -> None:
        """Goes to a saved place, whatever process count, batch size, threads and workers this object has.

        Raises:
            ValueError: the state is of another seed, of a source of another size, or no state.
        """
        here = self.state()
        if set(state) != set(here) or not 0 <= state["position"]:
            raise ValueError(f"state: expected what Batches.state() gave, such as {here}, got {state}")
        for name in ("seed", "samples"):
            if state[name] != here[name]:
                raise ValueError(f"state: expected {name}={here[name]}, as in this run, got {state[name]}")
        self.close()
        self._position = int(state["position"])

    def close(self) -> None:
        """Ends threads and workers. The next batch, if one is asked for, starts new ones."""
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
) -> Batches:
    """An endless stream of shuffled, augmented batches: every sample once per epoch, epochs joined without a gap.

    Args:
        source: where the images come from; may be smaller than a batch.
        batch_size: B, over all processes.
        image_size: S or (H, W) of the result, in pixels.
        augmentation: by default none: the picture is resized and its centre taken, as in evaluation.
        seed: of the order and of the augmentation.
        process_index: this process is the p-th of
        process_count: P, and gets rows p*B/P to (p+1)*B/P - 1 of each batch.
        num_threads: threads that make batches ahead, each one batch: num_threads + 1 batches are in memory. 0 makes
            them in the caller's thread.
        num_workers: processes for it instead, when threads are held up by Python; num_threads is then shared among
            them. They are spawned: the program's main module needs its `if __name__ == "__main__"`. Batches come back
            through shared memory, of which containers often have little (/dev/shm).
        on_corrupt: "stop": CorruptImage, naming the file. "drop": the next sample that can be decoded takes its place;
            a warning names the file once.

    Returns:
        An iterator of {"image": uint8 (B/P, H, W, 3), "label": int32 (B/P,), "replaced": int, how many images of the
        batch were corrupt}; its `state()` and `restore()` go with a checkpoint. Of latents "mean" and "log_variance",
        (B/P, h, w, c) each, stand in the place of "image".

    Raises:
        ValueError: an argument out of range, or an empty source.
    """
    readers = _Readers(batch_size, process_index, process_count, num_threads, num_workers)
    size, augmentation = _size(image_size), augmentation or Augmentation()
    if isinstance(source, Latents):
        return Batches(LatentTrainingLoader(source, size, augmentation, seed), readers)
    return Batches(TrainingLoader(source, size, on_corrupt, augmentation, seed), readers)


class EvaluationBatches:
    """An iterator over this process's evaluation batches; see `evaluation_batches`.

    Attributes:
        dropped: corrupt images that were masked out so far, in this process.
    """

    def __init__(self, load: EvaluationLoader | LatentEvaluationLoader, readers: _Readers):
        self._batches = -(-len(load.source) // readers.batch_size)
        samples = grain.MapDataset.range(self._batches * readers.batch_size)
        self._iterator: grain.DatasetIterator | None = readers.iterate(samples, load)
        self._warned: set[str] = set()
        self.dropped = 0

    def __len__(self) -> int:
        """Number of batches in all, the same in every process."""
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
) -> EvaluationBatches:
    """Every sample once, in order: resized (bicubic, antialiased), centre cropped.

    Args:
        source: where the images come from.
        batch_size: B, over all processes. The last batch is padded with black images, mask False.
        image_size: S or (H, W) of the result, in pixels.
        resize: short side before cropping, such as 256 for 224. None: S / 0.875, except that an image which already
            has the right size is taken as it is.
        process_index: see `training_batches`.
        process_count: see `training_batches`.
        num_threads: see `training_batches`.
        num_workers: see `training_batches`.
        on_corrupt: "stop": CorruptImage, naming the file. "drop": mask False, a warning names the file, and the
            iterator's `dropped` counts it.

    Returns:
        An iterator of {"image": uint8 (B/P, H, W, 3), "label": int32 (B/P,), "mask": bool (B/P,)}, with the same
        number of batches, its `len`, in every process. Of latents "mean" and "log_variance" stand in the place of
        "image".

    Raises:
        ValueError: an argument out of range, or an empty source.
    """
    readers = _Readers(batch_size, process_index, process_count, num_threads, num_workers)
    size = _size(image_size)
    if resize is not None and resize < min(size):
        raise ValueError(f"resize: expected at least the image size {min(size)}, got {resize}")
    if isinstance(source, Latents):
        return EvaluationBatches(LatentEvaluationLoader(source, size), readers)
    return EvaluationBatches(EvaluationLoader(source, size, on_corrupt, resize), readers)


def _size(image_size: int | tuple[int, int]) -> tuple[int, int]:
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"image_size: expected a positive side or (height, width), got {image_size}")
    return size


def _warn(corrupt: list[str], warned: set[str], fate: str) -> None:
    """Each corrupt image is worth one warning, not one per epoch."""
    for message in corrupt:
        if message not in warned:
            warned.add(message)
            _log.warning("%s: %s", message, fate)
