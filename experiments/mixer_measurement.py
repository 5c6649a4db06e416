"""Checks and times whole mixers, and propagations from a proxy or from maps.

The gate: the result and the gradients of parameters and map, against a mixer that `lax.scan` propagates. Of a large map
the reference computes the last images and channels alone. The gradient that comes in is zero outside of this part, so
that the gradients are those of the part and can be compared whole.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import pallas_kernels
from experiments.kernel_cases import with_gradients
from experiments.kernel_contenders import HEAD_WIDTH, attention_heads
from experiments.kernel_gate import TOLERANCES, Verdict, differ, judge, rms_ratio
from experiments.kernel_shapes import KernelShape
from experiments.measurement import Measurement
from experiments.mixer_contenders import (
    CONTENDERS,
    DTYPE,
    Contender,
    bind,
    build,
    bytes_moved,
    columns_of,
    draw_inputs,
    maps_in,
    reason_against,
)

COLUMNS: Sequence[str] = (
    "shape batch height width tokens channels rank chunk dtype scope pass implementation status median_ms spread_ms "
    "runs clock host_ms bytes gb_per_s share compiled_mib process_peak_mib error checked input_sets note"
).split()
PASSES = ("forward", "both")
# Values of a map that the reference computes: it holds some 300 bytes for each in the backward pass.
MOST_VALUES = 2**25


@dataclasses.dataclass(frozen=True)
class Case:
    """One row to be."""

    contender: Contender
    shape: KernelShape
    scope: str
    pass_: str

    def __str__(self) -> str:
        return f"{self.shape.name} {self.scope} {self.pass_} {self.contender.name}"


class MixerBenchmark(Measurement):
    """Of GSPN and attention. GSPN's propagations stand and fall with the check of the mixer that they are part of."""

    columns = COLUMNS

    def describe(self, case: Case) -> dict[str, Any]:
        shape = case.shape
        return {
            "shape": shape.name, "batch": shape.batch, "height": shape.height, "width": shape.width,
            "tokens": shape.height * shape.width, "channels": shape.channels, "rank": shape.rank, "chunk": shape.chunk,
            "dtype": DTYPE, "scope": case.scope, "implementation": case.contender.name, "pass": case.pass_,
        }  # fmt: skip

    def reason_against(self, case: Case) -> str | None:
        return reason_against(case.contender, case.shape, case.scope, case.pass_)

    def judged_by(self, case: Case) -> Case | None:
        # Forward alone is judged by itself: where training does not fit into memory, inference may.
        return dataclasses.replace(case, scope="mixer") if case.contender.propagates else None

    def is_reference(self, case: Case) -> bool:
        return case.contender.implementation == "xla"

    def compare(self, case: Case, program: Callable[..., Any], given: tuple[Any, ...]) -> Verdict:
        return compare(case, program, given)

    def program(self, case: Case) -> Callable[..., Any]:
        function = bind(case.contender, case.shape, case.scope)
        return function if case.pass_ == "forward" else with_gradients(function)

    def draw(self, case: Case, key: jax.Array) -> tuple[Any, ...]:
        given = draw_inputs(case.contender, case.shape, case.scope, key)
        return given[:-1] if case.pass_ == "forward" else given

    def moved(self, case: Case) -> int:
        return bytes_moved(case.contender, case.shape, case.scope, case.pass_)

    def remark(self, case: Case) -> str | None:
        if case.contender.propagates:
            return None
        return f"{attention_heads(case.shape)} heads of {HEAD_WIDTH} for {case.shape.channels} channels"


def checked_part(shape: KernelShape) -> tuple[int, int]:
    """Images and channels that the reference computes: the last ones, at which offsets are largest."""
    pixels = shape.height * shape.width
    images = min(shape.batch, MOST_VALUES // (pixels * shape.channels))
    return (images, shape.channels) if images else (1, max(1, MOST_VALUES // pixels))


def compare(case: Case, program: Callable[..., Any], given: tuple[Any, ...]) -> Verdict:
    """Of a mixer's program, forward or with gradients."""
    shape, (images, channels) = case.shape, checked_part(case.shape)
    whole = (images, channels) == (shape.batch, shape.channels)
    part = f"last {images} of {shape.batch} images, last {channels} of {shape.channels} channels"
    parameters, x, *grad = given
    if grad:
        inside = jnp.zeros(grad[0].shape, bool).at[-images:, ..., -channels:].set(True)
        grad = [jnp.where(inside, grad[0], jnp.zeros_like(grad[0]))]
    found: Any = program(parameters, x, *grad)
    checked = f"{case.pass_}, {'whole' if whole else part}"
    if differ(program, (parameters, x, *grad), found):
        return Verdict(False, None, checked, "two runs on the same inputs differ")

    def cut(array: jax.Array) -> jax.Array:
        return array[-images:, ..., -channels:]

    if grad:
        y, (of_parameters, of_x) = found
        found = cut(y), (of_parameters, of_x[-images:])
    else:
        found = cut(found)
    reference = _reference(shape, channels, case.pass_)
    errors = reference((parameters, x[-images:], *map(cut, grad)), found)
    # A gradient passes one rounding more than the result. In separate passes that of each h is rounded besides, from
    # which the proxy's parameters take the largest error: 1.2e-2 by lax.scan, at 24 x 24 pixels and 64 channels.
    more = 5 if case.contender.kind == "separate" else 2
    tolerances = {name: TOLERANCES[DTYPE] * (1 if name == "y" else more) for name in errors}
    return judge(errors, tolerances, checked)


@functools.cache
def _reference(shape: KernelShape, channels: int, pass_: str) -> Callable[..., dict[str, jax.Array]]:
    """From the part's arguments and its results to their errors, by name: y, or the gradient of x or a parameter."""
    graph, _ = build(CONTENDERS["xla"], shape)

    def mix(parameters: Any, x: jax.Array) -> jax.Array:
        mixer = nnx.merge(graph, parameters)
        maps: Any = maps_in(1, mixer.proxy(x), columns_of(mixer, channels))
        propagate: Any = functools.partial(pallas_kernels.propagate, chunk=shape.chunk, implementation="xla")
        return propagate(x[..., -channels:], *maps[0], mixer.merge[...])

    program = mix if pass_ == "forward" else with_gradients(mix)

    def errors(given: tuple[Any, ...], found: Any) -> dict[str, jax.Array]:
        pairs = zip(jax.tree.leaves_with_path(found), jax.tree.leaves(program(*given)), strict=True)
        return {_name(path): rms_ratio(one, want) for (path, one), want in pairs}

    return jax.jit(errors)


def _name(path: tuple[Any, ...]) -> str:
    """Of y, or in (y, (gradients of parameters, gradient of x))."""
    if len(path) < 2:
        return "y"
    keys = [str(part.key) for part in path if isinstance(part, jax.tree_util.DictKey)]
    return f"gradient of {'.'.join(keys) or 'x'}"
