import re

import jax
import jax.numpy as jnp
import pytest
from jax.profiler import ProfileData

from experiments.benchmarks import device_time


def trace(*events):
    """A trace of kernels (name, start, duration) in microseconds, with a second line that shows them again."""
    names = sorted({name for name, _, _ in events})
    listed = " ".join(
        f"events {{ metadata_id: {names.index(n) + 1} offset_ps: {int(s * 1e6)} duration_ps: {int(d * 1e6)} }}"
        for n, s, d in events
    )
    metadata = " ".join(
        f'event_metadata {{ key: {i} value {{ id: {i} name: "{n}" }} }}' for i, n in enumerate(names, 1)
    )
    lines = " ".join(f'lines {{ name: "{name}" {listed} }}' for name in ("Stream #13(Compute)", "XLA Ops"))
    return ProfileData.from_text_proto(f'planes {{ name: "/device:GPU:0" {lines} {metadata} }}')


def test_times_of_runs_in_a_trace():
    events = device_time.device_events(trace(("a", 1, 2), ("b", 4, 3), ("a", 10, 2), ("b", 12.5, 3.5)))
    assert device_time.run_times(events, 2) == pytest.approx([6000, 6000])
    assert device_time.run_times(device_time.device_events(trace(("a", 1, 2), ("a", 10, 3))), 2) == [2000, 3000]
    durations = [(name, nanoseconds) for name, _, nanoseconds in events]
    assert device_time.parts_of_run(durations, 2) == pytest.approx({"a": 2e-3, "b": 3.25e-3})
    with pytest.raises(ValueError, match="4 device events do not divide into 3 equal runs"):
        device_time.run_times(events, 3)
    with pytest.raises(ValueError, match="do not divide"):
        device_time.run_times(device_time.device_events(trace(("a", 1, 2), ("b", 4, 3))), 2)
    with pytest.raises(ValueError, match=r"no device events in \{'/host:CPU': \[\]\}"):
        device_time.device_events(ProfileData.from_text_proto('planes { name: "/host:CPU" }'))


def test_clocks_where_there_is_no_gpu():
    """Fails first when JAX moves what the clocks read."""
    from jax.experimental.mosaic.gpu import profiler

    assert hasattr(profiler, "mosaic_gpu_lib")
    assert device_time.choose_clock()[0] == "host"
    program = jax.jit(lambda x: x + 1)
    for clock, reason in (("profiler", "no device events"), ("cupti", "extension is not installed|CUPTI")):
        timing = device_time.measure(lambda _: program(jnp.ones(8)), clock=clock, most_runs=3)
        assert timing.median_ms is None and timing.host_ms > 0 and re.search(reason, timing.clock)
