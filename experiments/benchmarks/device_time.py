"""How long a compiled program keeps the device busy, by the device's own clock.

There are two device clocks. "profiler" reads a trace of jax.profiler: from the first kernel or copy of a run to the end
of its last, gaps included. "cupti" adds up the durations of the kernels, without gaps and copies; it is the clock of
`jax.experimental.mosaic.gpu.profiler`, for machines whose traces hold no device events. Neither includes the host's
launch of a program. The host's clock over queued runs is given beside them, to show where the two disagree.
"""

import dataclasses
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

# Without it the profiler runs loops of XLA launch by launch, and lax.scan would look slower than it is.
GRAPHS_WHILE_PROFILING = "--xla_enable_command_buffers_during_profiling=true"

Event = tuple[str, float, float]  # name, start and duration in nanoseconds


@dataclasses.dataclass(frozen=True)
class Timing:
    """Milliseconds of one run; the device's are None where no clock of the device can be read."""

    clock: str  # "profiler", "cupti" or "host", "host" with the reason where another was asked for
    runs: int
    median_ms: float | None
    spread_ms: float | None  # between the quartiles
    host_ms: float  # mean over queued runs
    parts: Mapping[str, float] = dataclasses.field(default_factory=dict)  # mean of each kernel or copy, by its name


def prepare_environment() -> None:
    """Sets variables that JAX's backend reads when it starts; keeps those that the user has set."""
    flags = os.environ.get("XLA_FLAGS", "")
    if GRAPHS_WHILE_PROFILING.partition("=")[0] not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {GRAPHS_WHILE_PROFILING}".strip()
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")


def choose_clock() -> tuple[str, str]:
    """Returns the first clock that times a small program on this machine, and why those before it do not."""
    if jax.default_backend() == "cpu":
        return "host", "a CPU has no clock of its own"
    program, x = jax.jit(lambda x: x + 1), jnp.ones(2**20)
    jax.block_until_ready(program(x))
    reasons = []
    for clock, read in (("profiler", _profiled_runs), ("cupti", _cupti_runs)):
        try:
            times, _ = read(lambda _: program(x), 3)
            if len(times) == 3 and min(times) > 0:
                return clock, "; ".join(reasons)
            reasons.append(f"{clock}: times of {times} ns")
        except Exception as error:  # whatever a driver or a profiler library raises, try the next clock
            reasons.append(f"{clock}: {type(error).__name__}: {error}")
    return "host", "; ".join(reasons)


def measure(run: Callable[[int], Any], *, clock: str, most_runs: int = 50, seconds: float = 0.5) -> Timing:
    """Times `run(0), run(1), ...`, each of which starts a compiled program and returns its results.

    Args:
        run: takes the number of the run, so that it can walk through several sets of inputs.
        clock: as `choose_clock` returns it.
        most_runs: timed runs, at most; fewer, but at least 3, where they would take longer than `seconds`.
        seconds: length of the measurement, about.

    Returns:
        The times of one run.
    """
    for index in range(2):
        jax.block_until_ready(run(index))
    start = time.perf_counter()
    jax.block_until_ready(run(2))
    runs = max(3, min(most_runs, int(seconds / (time.perf_counter() - start))))
    host_ms = _queued_seconds(run, runs) / runs * 1e3
    if clock == "host":
        return Timing(clock, runs, None, None, host_ms)
    try:
        times, parts = (_profiled_runs if clock == "profiler" else _cupti_runs)(run, runs)
    except ValueError as error:
        return Timing(f"host ({error})", runs, None, None, host_ms)
    low, _, high = statistics.quantiles(times, n=4)
    return Timing(clock, runs, statistics.median(times) / 1e6, (high - low) / 1e6, host_ms, parts)


def _queued_seconds(run: Callable[[int], Any], runs: int) -> float:
    start, out = time.perf_counter(), None
    for index in range(runs):
        out = run(index)  # frees the results of the run before
    jax.block_until_ready(out)
    return time.perf_counter() - start


def _profiled_runs(run: Callable[[int], Any], runs: int) -> tuple[list[float], dict[str, float]]:
    """Returns the nanoseconds of each run, from a trace, and `parts` of a run."""
    options: Any = jax.profiler.ProfileOptions()
    options.host_tracer_level = options.python_tracer_level = 0
    options.enable_hlo_proto = False
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            _queued_seconds(run, runs)
        (path,) = Path(folder).rglob("*.xplane.pb")
        events = device_events(jax.profiler.ProfileData.from_file(str(path)))
    return run_times(events, runs), parts_of_run([(name, ns) for name, _, ns in events], runs)


def parts_of_run(durations: Sequence[tuple[str, float]], runs: int) -> dict[str, float]:
    """Returns the milliseconds of a run by name, from the nanoseconds of all runs' kernels and copies."""
    total = dict.fromkeys([name for name, _ in durations], 0.0)
    for name, nanoseconds in durations:
        total[name] += nanoseconds
    return {name: nanoseconds / 1e6 / runs for name, nanoseconds in total.items()}


def device_events(trace: Any) -> list[Event]:
    """Returns the GPU's kernels and copies in a trace, by their start.

    Raises:
        ValueError: the trace has none; the message names what it holds.
    """
    planes = {plane.name: {line.name: line for line in plane.lines} for plane in trace.planes}
    events = []
    for name, lines in planes.items():
        # Other lines of the plane repeat the same work, summed up by program and by operation.
        streams = [line for key, line in lines.items() if "/device:GPU" in name and key.startswith("Stream")]
        events += [(event.name, event.start_ns, event.duration_ns) for line in streams for event in line.events]
    if not events:
        raise ValueError(f"no device events in { ({name: list(lines) for name, lines in planes.items()}) }")
    return sorted(events, key=lambda event: event[1])


def run_times(events: Sequence[Event], runs: int) -> list[float]:
    """Returns the nanoseconds of each of `runs` consecutive runs of one program, from the events of all runs.

    Raises:
        ValueError: the runs do not consist of the same events, so that they cannot be told apart.
    """
    each, left = divmod(len(events), runs)
    groups = [events[index * each : (index + 1) * each] for index in range(runs)]
    if left or not each or any([e[0] for e in group] != [e[0] for e in groups[0]] for group in groups):
        raise ValueError(f"{len(events)} device events do not divide into {runs} equal runs")
    # Not end minus start: starts may be nanoseconds since 1970 in a double, which leaves steps of 256.
    return [group[-1][1] - group[0][1] + group[-1][2] for group in groups]


def _cupti_runs(run: Callable[[int], Any], runs: int) -> tuple[list[float], dict[str, float]]:
    """Returns the nanoseconds of the kernels of each run, and `parts` of a run.

    Calls the private functions under JAX's `Cupti.measure`, which repeats one set of inputs and so may time the cache.
    """
    from jax.experimental.mosaic.gpu import profiler

    library: Any = getattr(getattr(profiler, "mosaic_gpu_lib"), "_mosaic_gpu_ext", None)  # noqa: B009
    if library is None:
        raise ValueError("jaxlib's Mosaic GPU extension is not installed")
    try:
        library._cupti_init()
        try:
            _queued_seconds(run, runs)
        finally:
            timings = library._cupti_get_timings(True)
    except RuntimeError as error:
        raise ValueError(f"CUPTI: {error}") from error
    each, left = divmod(len(timings), runs)
    if left or not each:
        raise ValueError(f"{len(timings)} kernels do not divide into {runs} equal runs")
    times = [sum(ms for _, ms in timings[index * each : (index + 1) * each]) * 1e6 for index in range(runs)]
    return times, parts_of_run([(name, 1e6 * ms) for name, ms in timings], runs)
