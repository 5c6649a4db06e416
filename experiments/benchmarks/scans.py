"""The cases of the kernel benchmark: line scans by every implementation, and attention beside them."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

import pallas_kernels
from experiments.benchmarks import attention, gate
from experiments.benchmarks.gate import Verdict
from experiments.benchmarks.measurement import Case, normal, with_gradients
from experiments.benchmarks.shapes import KernelShape
from pallas_kernels.tolerances import TOLERANCES

COLUMNS = ("shape", "batch", "height", "width", "channels", "weight_channels", "direction", "chunk", "dtype")
DTYPES = ("bfloat16", "float32", "float16")
DIRECTIONS = ("down", "right", "up", "left")
# forward: inputs to result. backward: what the forward pass kept and a gradient, to the gradients of the inputs. both:
# one program from inputs and gradient to result and gradients.
PASSES = ("forward", "backward", "both")
# Values of a map up to which the reference computes all of it: 1024 x 1024, batch 16, 8 channels.
MOST_VALUES = 2**27


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One line of a figure."""

    name: str
    operation: str  # "from_logits", "from_weights" or "attention"
    implementation: str
    function: Callable[..., jax.Array]  # of the inputs of `operation`; scans also take direction and chunk

    @property
    def scans(self) -> bool:
        return self.operation != "attention"


_SCANS = {"from_logits": pallas_kernels.line_scan_from_logits, "from_weights": pallas_kernels.line_scan}
CANDIDATES = {
    candidate.name: candidate
    for candidate in (
        *(
            Candidate(name + suffix, operation, name, functools.partial(_SCANS[operation], implementation=name))
            for name in ("mosaic", "mosaic_interpret", "xla")
            for operation, suffix in (("from_logits", ""), ("from_weights", "_weights"))
        ),
        *(
            Candidate(
                name, "attention", attention.IMPLEMENTATIONS.get(name, "xla"), functools.partial(attention.attend, name)
            )
            for name in attention.CANDIDATES
        ),
    )
}


@dataclasses.dataclass(frozen=True)
class ScanCase(Case):
    """A candidate at a shape, in a direction, dtype and pass."""

    candidate: Candidate
    shape: KernelShape
    direction: str  # "" for attention
    chunk: int | None
    dtype: str
    pass_: str

    def __str__(self) -> str:
        words = (self.shape.name, self.direction, self.dtype, self.pass_, self.candidate.name)
        return " ".join(word for word in words if word)

    def columns(self) -> dict[str, Any]:
        shape = dataclasses.asdict(self.shape) | {"shape": self.shape.name, "chunk": self.chunk}
        names = {"direction": self.direction, "dtype": self.dtype, "candidate": self.candidate.name}
        return {key: shape[key] for key in COLUMNS if key in shape} | names | {"pass": self.pass_}

    def reason_against(self) -> str | None:
        if self.candidate.scans:
            return pallas_kernels.implementations()[self.candidate.implementation]
        return attention.reason_against(self.candidate.name, self.shape, self.dtype, self.pass_)

    def judged_by(self) -> "ScanCase | None":
        return dataclasses.replace(self, pass_="both") if self.candidate.scans else None

    def is_reference(self) -> bool:
        return self.candidate.implementation == "xla"

    def bound(self) -> Callable[..., jax.Array]:
        """Returns the candidate as a function of its inputs only."""
        options = dict(direction=self.direction, chunk=self.chunk) if self.candidate.scans else {}
        return functools.partial(self.candidate.function, **options)

    def program(self) -> Callable[..., Any]:
        if self.pass_ == "forward":
            return self.bound()
        if self.pass_ == "backward":
            return lambda pull, gradient: pull(gradient)
        return with_gradients(self.bound())

    def draw(self, key: jax.Array) -> tuple[Any, ...]:
        return self.arguments(self.inputs(key))

    def inputs(self, key: jax.Array) -> list[jax.Array]:
        """Returns random inputs of the operation and, last, a gradient of its result.

        Scans: x, logits or weights, lam, gradient. Attention: q, k, v, gradient, (B, H * W, heads, 64) each.
        """
        keys, shape = jax.random.split(key, 4), self.shape
        if not self.candidate.scans:
            tokens = (shape.batch, shape.height * shape.width, attention.heads(shape.channels), attention.HEAD_WIDTH)
            return [normal(k, tokens, self.dtype) for k in keys]
        maps = (shape.batch, shape.height, shape.width, shape.channels)
        logits = normal(keys[1], (*maps[:3], 3, shape.weight_channels), self.dtype)
        if self.candidate.operation == "from_weights":
            logits = jax.jit(functools.partial(pallas_kernels.row_stochastic, direction=self.direction))(logits)
        x, lam, grad_h = (normal(keys[index], maps, self.dtype) for index in (0, 2, 3))
        return [x, logits, lam, grad_h]

    def arguments(self, inputs: Sequence[jax.Array]) -> tuple[Any, ...]:
        """Returns what the program takes, from `inputs`."""
        if self.pass_ == "forward":
            return tuple(inputs[:-1])
        if self.pass_ == "both":
            return tuple(inputs)
        return _residuals(dataclasses.replace(self, pass_=""))(*inputs[:-1]), inputs[-1]

    def bytes_moved(self) -> int:
        """The least bytes that the operation reads and writes: every input once, every result once.

        With E = B H W C values in a map and E_w = 3 B H W C_w in the weights or their logits:

        | pass | reads | writes |
        |---|---|---|
        | scan, forward | x, lam: 2 E; E_w | h: E |
        | scan, backward | x, lam, h, gradient: 4 E; E_w | gradients of x, lam: 2 E; E_w |
        | attention, forward | q, k, v: 3 T | T |
        | attention, backward | q, k, v, gradient: 4 T, and the result of softmax attention: T | 3 T |

        T = B H W times the channels of whole heads. "both" is the sum, since the backward pass reads again what the
        forward pass left. Weights are float32, everything else has the dtype. Padding does not count.
        """
        shape, size = self.shape, jnp.dtype(self.dtype).itemsize
        pixels = shape.batch * shape.height * shape.width
        if self.candidate.scans:
            maps = pixels * shape.channels * size
            weights = 3 * pixels * shape.weight_channels * (size if self.candidate.operation == "from_logits" else 4)
            forward, backward = 3 * maps + weights, 6 * maps + 2 * weights
        else:
            maps = pixels * attention.heads(shape.channels) * attention.HEAD_WIDTH * size
            forward, backward = 4 * maps, (7 if self.candidate.name == "linear_attention" else 8) * maps
        return {"forward": forward, "backward": backward, "both": forward + backward}[self.pass_]

    def remark(self) -> str | None:
        return None if self.candidate.scans else attention.remark(self.shape.channels)

    def compare(self, program: Callable[..., Any], given: tuple[Any, ...]) -> Verdict:
        """Compares h and its three gradients with lax.scan on the same inputs, and two runs with each other."""
        shape, (images, groups) = self.shape, checked_part(self.shape)
        channels = groups * (shape.channels // shape.weight_channels)
        checked = gate.part_name(images, shape.batch, channels, shape.channels)
        h, gradients = program(*given)
        if gate.differ(program, given, (h, gradients)):
            return Verdict(False, None, checked, "two runs on the same inputs differ")
        widths = (channels, groups, channels, channels)  # of x, weights, lam, gradient of h
        got = [
            gate.last_part(array, images, width)
            for array, width in zip((h, *gradients), (channels, *widths[:3]), strict=True)
        ]
        del h, gradients
        inputs = [gate.last_part(array, images, width) for array, width in zip(given, widths, strict=True)]
        names = ("h", "gradient of x", "gradient of weights", "gradient of lam")
        errors = _reference_errors(self.candidate.operation, self.direction, self.chunk)(*inputs, got)
        return gate.judge(dict(zip(names, errors, strict=True)), dict.fromkeys(names, TOLERANCES[self.dtype]), checked)


def make_cases(
    shapes: Sequence[KernelShape],
    candidates: Sequence[Candidate],
    *,
    directions: Sequence[str] = DIRECTIONS,
    dtypes: Sequence[str] = ("bfloat16", "float32"),
    passes: Sequence[str] = PASSES,
) -> list[ScanCase]:
    """Returns all combinations in the order in which time is best spent.

    One direction after the other; in each, all cases of the first candidate before those of others, then by dtype,
    shape, pass and candidate.
    """
    cases: dict[ScanCase, int] = {}  # attention has no direction: its cases coincide
    for direction in directions:
        for dtype in dtypes:
            for shape in shapes:
                for pass_ in passes:
                    for one in candidates:
                        walked = (direction, shape.chunk) if one.scans else ("", None)
                        cases.setdefault(ScanCase(one, shape, *walked, dtype, pass_), directions.index(direction))
    return sorted(cases, key=lambda case: (cases[case], case.candidate != candidates[0]))


def shrink(shape: KernelShape) -> KernelShape:
    """Returns the same kind of map with a few lines, for a CPU and for sanitizers."""
    channels = min(shape.channels, 16)
    return dataclasses.replace(
        shape,
        batch=min(shape.batch, 2),
        height=min(shape.height, 9),
        width=min(shape.width, 11),
        channels=channels,
        weight_channels=channels if shape.weight_channels == shape.channels else 1,
    )


def checked_part(shape: KernelShape) -> tuple[int, int]:
    """Returns the images and weight channels, counted from the last, that the reference computes.

    Batch and channels are independent in a line scan, except channels that share a weight: those stay together.
    """
    lines, group = shape.height * shape.width, shape.channels // shape.weight_channels
    images = min(shape.batch, MOST_VALUES // (lines * shape.channels))
    if images:
        return images, shape.weight_channels
    return 1, max(1, min(shape.weight_channels, MOST_VALUES // (lines * group)))


@functools.cache
def _reference_errors(operation: str, direction: str, chunk: int | None) -> Callable[..., list[jax.Array]]:
    """Returns a function to the RMS ratios of h and its three gradients against lax.scan on the same inputs."""

    def scan(x, weights, lam):
        if operation == "from_logits":
            weights = pallas_kernels.row_stochastic(weights, direction=direction)
        return pallas_kernels.line_scan(x, weights, lam, direction=direction, chunk=chunk, implementation="xla")

    def errors(x, weights, lam, grad_h, got):
        # The state is float32 whatever comes in, and the gradients are by definition those of h as it was kept, in x's
        # dtype: from a reference in float32 a right gradient of shared weights is off by 4.5e-3 in bfloat16.
        h, pull = jax.vjp(scan, x, weights, lam)
        return [gate.rms_ratio(one, want) for one, want in zip(got, (h, *pull(grad_h)), strict=True)]

    return jax.jit(errors)


@functools.lru_cache(maxsize=4)
def _residuals(case: ScanCase) -> Callable[..., Any]:
    """Returns inputs -> the function from gradients to gradients, which holds what the forward pass kept."""
    return jax.jit(lambda *inputs: jax.vjp(case.bound(), *inputs)[1])
