"""Device time, bandwidth and memory of whole token mixers: GSPN by each variant of its kernels, attention, the Mambas.

    python -m experiments.benchmarks.mixers --output=mixers.csv --budget_s=1500
    python -m experiments.benchmarks.mixers --output=mixers.csv --shapes=sdxl --candidates=gspn,flash_attention

In bfloat16, at the map of every layer and at squares of tokens around the size from which GSPN beats flash attention.
A GSPN mixer is first compared with the one that `lax.scan` propagates, result and gradients, and a wrong one is not
timed. Without a GPU, or with --dry, the same program runs on tiny maps with interpreted kernels to show that it works,
and writes no device time.

In the CSV, `gspn` takes the variant that the mixer chooses by itself, `scans` and the others force one, and `xla` is
GSPN without kernels. The Mambas have the sizes that they take by default and scan in both directions; the note of a row
says in which form (`gspn_jax.mixers.state_space`). GB/s count the bytes that a mixer must move
(`MixerCase.bytes_moved`), share is the share of the fastest copy on the card. compiled_mib: arguments, results and
temporaries of the compiled program.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from flax import nnx

import pallas_kernels
from experiments import command_line
from experiments.benchmarks import attention, device_time, gate, options
from experiments.benchmarks.gate import Verdict
from experiments.benchmarks.measurement import FIGURES, Case, normal, with_gradients
from experiments.benchmarks.options import Options
from experiments.benchmarks.search import propagation_of
from experiments.benchmarks.shapes import CROSSOVER, LAYERS, KernelShape, select_layers
from gspn_jax.mixers import MIXERS, GSPNMixer, state_space
from pallas_kernels import UpProjection
from pallas_kernels.choices import VARIANTS
from pallas_kernels.mosaic import variants
from pallas_kernels.tolerances import TOLERANCES
from pallas_kernels.up_projection import gradients_of_maps, maps_of

DTYPE = "bfloat16"
PASSES = ("forward", "both")
COLUMNS = ("shape", "batch", "height", "width", "tokens", "channels", "rank", "chunk", "dtype", *FIGURES)
# Mixers of the registry, and what their rows say.
OTHERS = {
    "linfusion": "two small networks of inner width C",
    "mamba": f"associative_scan in chunks of {state_space.SELECTIVE_CHUNK} tokens (CPU: token by token)",
    "mamba2": f"matrix products in chunks of {state_space.GROUPED_CHUNK} tokens",
}
CANDIDATES = ("gspn", *VARIANTS, "xla", *attention.CANDIDATES, *OTHERS)
DRY_SHAPE = "width1152_16"
# Values of a map that the reference computes: it holds some 300 bytes for each in the backward pass.
MOST_VALUES = 2**25


class AttentionMixer(nnx.Module):
    """Attention over all pixels with its projections, in as many heads of 64 as hold the map's channels."""

    def __init__(self, candidate: str, channels: int, *, rngs: nnx.Rngs):
        self.candidate, self.heads = candidate, attention.heads(channels)
        inner, kinds = self.heads * attention.HEAD_WIDTH, dict[str, Any](dtype=DTYPE, param_dtype=DTYPE, rngs=rngs)
        self.qkv = nnx.Linear(channels, 3 * inner, use_bias=False, **kinds)
        self.out = nnx.Linear(inner, channels, use_bias=False, **kinds)

    def __call__(self, x: jax.Array) -> jax.Array:
        tokens = (x.shape[0], x.shape[1] * x.shape[2])
        qkv = jnp.split(self.qkv(x).reshape(*tokens, -1), 3, axis=-1)
        q, k, v = (array.reshape(*tokens, self.heads, attention.HEAD_WIDTH) for array in qkv)
        return self.out(attention.attend(self.candidate, q, k, v).reshape(*x.shape[:3], -1))


@dataclasses.dataclass(frozen=True)
class MixerCase(Case):
    """A candidate at a shape, in a pass."""

    candidate: str
    shape: KernelShape
    pass_: str
    interpreted: bool = False

    def __str__(self) -> str:
        return f"{self.shape.name} {self.pass_} {self.candidate}"

    @property
    def is_gspn(self) -> bool:
        return self.candidate not in (*attention.CANDIDATES, *OTHERS)

    @property
    def implementation(self) -> str:
        """The implementation of a GSPN mixer's propagation."""
        return "xla" if self.candidate == "xla" else "mosaic_interpret" if self.interpreted else "mosaic"

    @property
    def variant(self) -> str | None:
        """The variant that a GSPN mixer is forced to."""
        return self.candidate if self.candidate in VARIANTS else None

    def columns(self) -> dict[str, Any]:
        shape = dataclasses.asdict(self.shape) | {"shape": self.shape.name}
        shape |= {"tokens": self.shape.height * self.shape.width, "dtype": DTYPE}
        return {key: shape[key] for key in COLUMNS if key in shape} | {"candidate": self.candidate, "pass": self.pass_}

    def reason_against(self) -> str | None:
        shape = self.shape
        if self.candidate in OTHERS:
            return None
        if not self.is_gspn:
            return attention.reason_against(self.candidate, shape, DTYPE, self.pass_)
        reason = pallas_kernels.implementations()[self.implementation]
        if reason is None and self.variant is not None:
            try:
                _ = variants.choose(propagation_of(shape, DTYPE), self.variant, self.interpreted)
            except ValueError as error:
                return str(error)
        return reason

    def judged_by(self) -> "MixerCase | None":
        # Each pass is judged by itself: where training does not fit into memory, inference may.
        return self if self.is_gspn else None

    def is_reference(self) -> bool:
        return self.candidate == "xla"

    def build(self) -> Any:
        """Returns the mixer's graph and the shapes of its parameters."""
        shape = self.shape

        def make(rngs: nnx.Rngs) -> nnx.Module:
            if self.candidate in OTHERS:
                dtypes = dict[str, Any](dtype=jnp.dtype(DTYPE), param_dtype=jnp.dtype(DTYPE))
                return MIXERS[self.candidate](shape.channels, **dtypes, rngs=rngs)
            if not self.is_gspn:
                return AttentionMixer(self.candidate, shape.channels, rngs=rngs)
            return GSPNMixer(
                shape.channels, proxy_rank=shape.rank, chunk=shape.chunk, implementation=self.implementation,
                variant=self.variant, dtype=jnp.dtype(DTYPE), param_dtype=jnp.dtype(DTYPE), rngs=rngs,
            )  # fmt: skip

        return nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))

    def program(self) -> Callable[..., Any]:
        graph, _ = self.build()

        def mix(parameters: Any, x: jax.Array) -> jax.Array:
            return nnx.merge(graph, parameters)(x)

        return mix if self.pass_ == "forward" else with_gradients(mix)

    def draw(self, key: jax.Array) -> tuple[Any, ...]:
        """Returns parameters with variance 1 / fan in, a map and, for "both", a gradient of the result."""
        shape = self.shape
        keys = jax.random.split(key, 3)
        leaves, tree = jax.tree.flatten(self.build()[1])
        parameters = tree.unflatten(_parameters(keys[0], tuple(leaf.shape for leaf in leaves)))
        size = (shape.batch, shape.height, shape.width, shape.channels)
        x, *grad = (normal(k, size, DTYPE) for k in (keys[1:] if self.pass_ == "both" else keys[1:2]))
        return parameters, x, *grad

    def bytes_moved(self) -> int:
        """The least bytes that a program reads and writes: its arguments once a pass, every result once.

        | pass | reads | writes |
        |---|---|---|
        | forward | inputs: I | result: E |
        | both | inputs, twice; gradient of the result: 2 I + E | result, gradients of the inputs: E + I |

        E: bytes of a map. I: bytes of the map and the parameters. Arrays between them (proxy, maps, states, queries,
        keys, values) do not count, whether or not an implementation writes them.
        """
        shape, (_, state) = self.shape, self.build()
        result = shape.batch * shape.height * shape.width * shape.channels * jnp.dtype(DTYPE).itemsize
        inputs = result + sum(leaf.size * jnp.dtype(DTYPE).itemsize for leaf in jax.tree.leaves(state))
        return inputs + result if self.pass_ == "forward" else 3 * inputs + 2 * result

    def remark(self) -> str | None:
        return None if self.is_gspn else OTHERS.get(self.candidate) or attention.remark(self.shape.channels)

    def compare(self, program: Callable[..., Any], given: tuple[Any, ...]) -> Verdict:
        """Compares the result and all gradients with a mixer that `lax.scan` propagates, and two runs with each other.

        The reference computes the last images and channels of a large map. The gradient that comes in is zero outside
        of this part, so that the gradients are those of the part and can be compared whole.
        """
        shape, (images, channels) = self.shape, checked_part(self.shape)
        parameters, x, *grad = given
        if grad:
            inside = jnp.zeros(grad[0].shape, bool).at[-images:, ..., -channels:].set(True)
            grad = [jnp.where(inside, grad[0], jnp.zeros_like(grad[0]))]
        found: Any = program(parameters, x, *grad)
        checked = f"{self.pass_}, {gate.part_name(images, shape.batch, channels, shape.channels)}"
        if gate.differ(program, (parameters, x, *grad), found):
            return Verdict(False, None, checked, "two runs on the same inputs differ")
        cut = functools.partial(gate.last_part, images=images, channels=channels)
        found = (cut(found[0]), (found[1][0], found[1][1][-images:])) if grad else cut(found)
        errors = _reference_errors(shape, channels, self.pass_)((parameters, x[-images:], *map(cut, grad)), found)
        # A gradient passes one rounding more than the result.
        tolerances = {name: TOLERANCES[DTYPE] * (1 if name == "y" else 2) for name in errors}
        return gate.judge(errors, tolerances, checked)


def checked_part(shape: KernelShape) -> tuple[int, int]:
    """Returns the images and channels, counted from the last, that the reference computes."""
    pixels = shape.height * shape.width
    images = min(shape.batch, MOST_VALUES // (pixels * shape.channels))
    return (images, shape.channels) if images else (1, max(1, MOST_VALUES // pixels))


def shrink(shape: KernelShape) -> KernelShape:
    """Returns the same kind of map with a few pixels: interpreting a mixer's kernels takes seconds."""
    size = dict(batch=1, height=min(shape.height, 3), width=min(shape.width, 4), rank=min(shape.rank, 8))
    return dataclasses.replace(shape, **size, channels=8, weight_channels=8)


def run(
    chosen: Options, candidates: Sequence[str] = CANDIDATES, passes: Sequence[str] = PASSES
) -> list[dict[str, Any]]:
    """Runs the whole benchmark and returns its rows; the command's flags say what each argument means."""
    chosen = options.dry_without_gpu(chosen)
    names = chosen.shapes or ([DRY_SHAPE] if chosen.dry else [shape.name for shape in (*LAYERS, *CROSSOVER)])
    shapes = [shrink(shape) if chosen.dry else shape for shape in select_layers(names)]
    cases = [MixerCase(one, shape, pass_, chosen.dry) for shape in shapes for pass_ in passes for one in candidates]
    with options.started(chosen, COLUMNS) as measurement:
        only_checks = chosen.correctness_only
        measurement.run(cases, check_part=float(only_checks), timed=not only_checks)
    return measurement.rows


def define_flags() -> None:
    options.define_flags()
    flags.DEFINE_list("candidates", list(CANDIDATES), "The mixers to compare.")
    flags.DEFINE_list("passes", list(PASSES), "Some of forward, and both: forward and backward in one program.")


def main() -> None:
    device_time.prepare_environment()
    rows = run(options.from_flags(), options.chosen("candidates", CANDIDATES), options.chosen("passes", PASSES))
    options.refuse_faults(rows)


@functools.partial(jax.jit, static_argnums=1)
def _parameters(key: jax.Array, sizes: tuple[tuple[int, ...], ...]) -> list[jax.Array]:
    """Draws all arrays in one program, with variance 1 / their first axis."""
    pairs = zip(jax.random.split(key, len(sizes)), sizes, strict=True)
    return [(jax.random.normal(one, size) * size[0] ** -0.5).astype(DTYPE) for one, size in pairs]


@jax.custom_vjp
def _maps(proxy: jax.Array, up: UpProjection) -> tuple[jax.Array, Any, Any, Any]:
    """As `maps_of`, with gradients summed in float32 as by the kernels: autodiff would round the proxy's by 1%."""
    return maps_of(proxy, up)


def _maps_backward(residuals: tuple[jax.Array, UpProjection], grads: Any) -> tuple[jax.Array, UpProjection]:
    of_proxy, of_up = gradients_of_maps(*residuals, grads)
    return jax.tree.map(lambda grad, array: grad.astype(array.dtype), (of_proxy, of_up), residuals)


_maps.defvjp(lambda proxy, up: (maps_of(proxy, up), (proxy, up)), _maps_backward)


def reference(shape: KernelShape, channels: int, pass_: str) -> Callable[..., Any]:
    """Returns the program of a mixer that `lax.scan` propagates, as `MixerCase.program`, for the last channels."""
    graph, _ = MixerCase("xla", shape, pass_).build()

    def columns(projection: nnx.Linear, *slots: int) -> jax.Array:
        return projection.kernel[...].reshape(shape.rank, 4, *slots, shape.channels)[..., -channels:]

    def mix(parameters: Any, x: jax.Array) -> jax.Array:
        mixer = nnx.merge(graph, parameters)
        up = UpProjection(columns(mixer.logits, 3), *map(columns, (mixer.lam, mixer.gate, mixer.skip)))
        logits, lam, gates, skip = _maps(mixer.proxy(x), up)
        x, options = x[..., -channels:], dict[str, Any](chunk=shape.chunk, implementation="xla")
        return pallas_kernels.propagate(x, logits, lam, gates, skip, mixer.merge[...], **options)

    return mix if pass_ == "forward" else with_gradients(mix)


@functools.cache
def _reference_errors(shape: KernelShape, channels: int, pass_: str) -> Callable[..., dict[str, jax.Array]]:
    """Returns (arguments of the part, its results) -> RMS ratios of y and of gradients, by name."""
    program = reference(shape, channels, pass_)

    def errors(given: tuple[Any, ...], found: Any) -> dict[str, jax.Array]:
        pairs = zip(jax.tree.leaves_with_path(found), jax.tree.leaves(program(*given)), strict=True)
        return {_name(path): gate.rms_ratio(one, want) for (path, one), want in pairs}

    return jax.jit(errors)


def _name(path: tuple[Any, ...]) -> str:
    """Names a leaf of y or of (y, (gradients of parameters, gradient of x))."""
    if len(path) < 2:
        return "y"
    keys = [str(part.key) for part in path if isinstance(part, jax.tree_util.DictKey)]
    return f"gradient of {'.'.join(keys) or 'x'}"


if __name__ == "__main__":
    command_line.start(main, define_flags)
