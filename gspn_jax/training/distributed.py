"""Runs of several processes, and SIGTERM."""

import os
import signal
import threading
from types import TracebackType

import jax
from absl import logging
from jax.experimental import multihost_utils

# Variables in which launchers give the number of processes: srun, mpirun, and comma-separated TPU hosts. SLURM_NTASKS
# is not used: it is also set in the shell of an allocation, where a command runs as one process.
_COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
_HOSTS = "TPU_WORKER_HOSTNAMES"


def initialise(
    coordinator_address: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Joins the other processes of a run, if there are any. Call it before anything uses a device.

    Without arguments, the launcher's environment decides (SLURM, Open MPI, Cloud TPU); without a launcher, the run has
    one process.

    Args:
        coordinator_address: host:port of process 0; needs the other two arguments.
        num_processes: number of processes.
        process_id: number of this process, from 0.

    Raises:
        ValueError: only some of the three are given, or they contradict each other.
    """
    given = (coordinator_address, num_processes, process_id)
    if all(value is None for value in given):
        if _launched_with_others(os.environ):
            jax.distributed.initialize()
        return
    if any(value is None for value in given):
        raise ValueError(
            "coordinator_address, num_processes, process_id: expected all three or none, "
            f"got {coordinator_address!r}, {num_processes!r}, {process_id!r}"
        )
    assert num_processes is not None and process_id is not None
    if not 0 <= process_id < num_processes:
        raise ValueError(f"process_id: expected an integer in [0, {num_processes}), got {process_id}")
    jax.distributed.initialize(coordinator_address, num_processes, process_id)


def _launched_with_others(environment: os._Environ[str] | dict[str, str]) -> bool:
    counts = [environment.get(name, "1") for name in _COUNTS]
    return any(count.isdigit() and int(count) > 1 for count in counts) or "," in environment.get(_HOSTS, "")


class StopSignal:
    """Watches for SIGTERM while in its `with` block.

    With several processes JAX agrees with all of them on the step to stop at; its own signal handler must stay.
    """

    def __init__(self) -> None:
        self._received = threading.Event()
        self._before = None
        self._together = jax.distributed.is_initialized()

    def __enter__(self) -> "StopSignal":
        if not self._together:
            if threading.current_thread() is threading.main_thread():
                self._before = signal.signal(signal.SIGTERM, lambda *_: self._received.set())
            else:
                logging.warning("not in the main thread: SIGTERM will not save a checkpoint")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def asked(self, step: int) -> bool:
        """Returns whether to stop after `step`. With several processes, all of them must ask at every step."""
        if self._together:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._received.is_set()
