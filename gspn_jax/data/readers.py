"""Threads and worker processes that make batches, on grain."""

import dataclasses
import weakref
from collections.abc import Callable
from typing import Any

import grain
import numpy as np
from absl import flags
from grain.python import SharedMemoryArray

from gspn_jax.data.arguments import check_integer


@dataclasses.dataclass(frozen=True)
class Readers:
    """The rows of each batch that this process makes, and its number of threads or worker processes.

    Attributes:
        batch_size: rows of a batch, over all processes.
        process_index: number of this process.
        process_count: number of processes.
        num_threads: threads that make batches ahead; 0 makes them in the caller's thread.
        num_workers: worker processes; 0 for none.

    Raises:
        ValueError: an argument that is not an integer, or is out of range.
    """

    batch_size: int
    process_index: int
    process_count: int
    num_threads: int
    num_workers: int

    def __post_init__(self) -> None:
        least = {"batch_size": 1, "process_count": 1, "process_index": 0, "num_threads": 0, "num_workers": 0}
        for name, bound in least.items():
            check_integer(name, getattr(self, name), bound)
        if self.process_index >= self.process_count:
            raise ValueError(f"process_index: expected 0 to {self.process_count - 1}, got {self.process_index}")
        if self.batch_size % self.process_count:
            raise ValueError(
                f"batch_size: expected a multiple of process_count={self.process_count}, got {self.batch_size}"
            )

    @property
    def share(self) -> int:
        """Rows of each batch that belong to this process."""
        return self.batch_size // self.process_count

    def iterate(self, samples: grain.MapDataset, load: Callable[[Any], dict[str, Any]]) -> "Stream":
        """Returns batches in order. One thread makes a whole batch: it writes each image once, into its row."""
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
        return Stream(iter(dataset))


class Stream:
    """Batches of a grain iterator, as arrays of this process.

    Worker processes send arrays in shared memory (files in /dev/shm). grain removes such a file when its array is
    deleted, which never happens to arrays that something still refers to when the program ends, for example JAX arrays
    on the CPU. So arrays are copied, and their files removed, as they come.
    """

    def __init__(self, iterator: grain.DatasetIterator):
        self._iterators = [iterator]
        self._finalizer = weakref.finalize(self, _close, self._iterators)  # at the end of the program at the latest

    def __next__(self) -> dict[str, Any]:
        return {name: _own(value) for name, value in next(self._iterators[0]).items()}

    def close(self) -> None:
        """Ends threads and worker processes."""
        self._finalizer()


def _own(value: Any) -> Any:
    """Returns a copy of an array in shared memory, whose file is removed; any other value as it is."""
    if not isinstance(value, SharedMemoryArray):
        return value
    copy = np.array(value, subok=False)
    assert value.shm is not None
    value.shm.unlink()
    value._unlink_on_del = False  # it is done
    return copy


def _close(iterators: list[grain.DatasetIterator]) -> None:
    iterators.pop().close()  # no reference remains: grain's own cleanup fails when the interpreter shuts down
    pool = SharedMemoryArray._del_thread_pool
    if pool is not None:
        pool.apply(int)  # the arrays that were read ahead are deleted in this pool: wait for it
