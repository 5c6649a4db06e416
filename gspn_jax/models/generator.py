"""GSPN generators (GSPN, section 4.2): denoisers of latents for class-conditional diffusion.

The network that the authors released: patches of the latents become tokens, timestep and class are added to them once,
then come in-blocks, one block in the middle, and as many out-blocks, each of which also reads what the in-block at its
mirror image put out (a long skip). No position is embedded: the order of the scans tells it.

What blocks add up to, the residual stream, travels beside what the last block put out, the hidden map: a block first
adds the one to the other. The blocks of each side have their parameters stacked on a first axis and run in a
`jax.lax.scan`, so that compile time does not grow with depth.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gspn_jax.mixers import MixerBuilder
from gspn_jax.mixers.gspn import FAN_IN_UNIFORM
from gspn_jax.models import layers
from gspn_jax.models.conditioning import AdaptiveHead, Conditioning
from gspn_jax.models.sizes import check_counts
from gspn_jax.models.stack import graph_of, stacked
from pallas_kernels import named_layer
from pallas_kernels.checks import has_empty_axis

XAVIER = nnx.initializers.xavier_uniform()

# Blocks in a row that differ in their parameters alone: what merges with the parameters of one, and how many they are.
Run = tuple[nnx.GraphDef, int]


class Block(nnx.Module):
    """residual + hidden, then mixing and feed-forward of its norm; out-blocks first join hidden with a long skip."""

    def __init__(
        self,
        width: int,
        *,
        mixer: MixerBuilder,
        chunk: int | None,
        long_skip: bool,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        options: Any = dict(dtype=dtype, rngs=rngs)
        project = functools.partial(nnx.Linear, use_bias=False, **options)
        self.long_skip = nnx.Linear(2 * width, width, kernel_init=XAVIER, **options) if long_skip else None
        self.norm = layers.layer_norm(width, **options)
        self.project = project(width, width, kernel_init=XAVIER)
        self.depthwise = layers.DepthwiseConv(width, 7, use_bias=True, **options)
        self.mixer = mixer(width, chunk=chunk, **options)
        self.forward_in = project(width, width, kernel_init=FAN_IN_UNIFORM)
        self.forward_depthwise = layers.DepthwiseConv(width, 3, **options)
        self.forward_out = project(width, width, kernel_init=XAVIER)

    def __call__(
        self,
        hidden: jax.Array,
        residual: jax.Array,
        skip: Sequence[jax.Array] = (),
        rate: float | jax.Array = 0.0,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Args:
          hidden: what the block before put out, (B, H, W, width).
          residual: the sum of what all others put out, float32.
          skip: for an out-block, what its in-block put out, alone in a tuple.
          rate, key: an image loses `hidden` with probability `rate`; key None keeps all.

        Returns:
          the next hidden and residual.
        """
        if self.long_skip is not None:
            hidden = self.long_skip(jnp.concatenate([hidden, *skip], axis=-1))
        residual = _add(residual, hidden, rate, key)
        x = self.mixer(self.depthwise(self.project(self.norm(residual))))
        x = self.forward_depthwise(self.forward_in(x))
        return self.forward_out(jnp.square(jax.nn.relu(x))), residual


class Generator(nnx.Module):
    """Noisy latents, timestep and class to noise and variance. Any map of whole patches, square or not."""

    def __init__(
        self,
        num_classes: int,
        width: int,
        depth: int,
        *,
        mixer: MixerBuilder,
        patch: int = 2,
        in_channels: int = 4,
        chunk: int | None = 2,
        global_blocks: Sequence[int] | None = None,
        drop_path: float = 0.0,
        remat: bool = False,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Args:
        num_classes: classes beside "no class".
        width: channels of the tokens.
        depth: in-blocks and out-blocks together, even; with the one in the middle the network has depth + 1.
        mixer: called as mixer(width, chunk=..., dtype=..., rngs=...), gives a module on maps, whose parameters do not
          depend on chunk.
        patch: rows and columns of the latents that make one token.
        in_channels: of the latents.
        chunk: of the blocks that are not global, in lines.
        global_blocks: blocks that get chunk None, counted from 0 in order of execution.
        drop_path: stochastic depth of what the last block puts out; it grows linearly from 0 at the first.
        remat: computes each block again in the backward pass instead of keeping what is inside it.
        dtype: of the computation; parameters, residual stream and the last layer are float32.
        """
        check_counts(
            num_classes=num_classes, width=width, depth=depth, patch=patch, in_channels=in_channels, chunk=chunk
        )
        if depth < 2 or depth % 2:
            raise ValueError(f"depth: expected an even number of at least 2, got {depth}")
        global_blocks = (depth - 1, depth) if global_blocks is None else global_blocks
        if not set(global_blocks) <= set(range(depth + 1)):
            raise ValueError(f"global_blocks: expected blocks in 0..{depth}, got {tuple(global_blocks)}")
        if not 0 <= drop_path < 1:
            raise ValueError(f"drop_path: expected a probability in [0, 1), got {drop_path}")
        dtype = jnp.dtype(dtype)
        self.depth, self.patch, self.in_channels, self.num_classes = depth, patch, in_channels, num_classes
        self.drop_path, self.remat, self.dtype = drop_path, remat, dtype
        chunks = [None if index in set(global_blocks) else chunk for index in range(depth + 1)]
        half = depth // 2
        block = functools.partial(Block, width, mixer=mixer, dtype=dtype)
        in_block, out_block = (functools.partial(block, long_skip=long_skip) for long_skip in (False, True))

        self.embed = nnx.Linear(patch * patch * in_channels, width, kernel_init=XAVIER, dtype=dtype, rngs=rngs)
        self.conditioning = Conditioning(num_classes, width, rngs=rngs)
        self.in_blocks = stacked(functools.partial(in_block, chunk=chunk), half, rngs)
        self.in_runs = _runs(in_block, chunks[:half])
        self.mid_block = in_block(chunk=chunks[half], rngs=rngs)
        self.out_blocks = stacked(functools.partial(out_block, chunk=chunk), half, rngs)
        self.out_runs = _runs(out_block, chunks[half + 1 :])
        self.norm = layers.layer_norm(width, dtype=jnp.float32, rngs=rngs)
        self.head = AdaptiveHead(width, patch * patch * 2 * in_channels, rngs=rngs)

    def __call__(
        self, latents: jax.Array, timestep: jax.Array, label: jax.Array, *, key: jax.Array | None = None
    ) -> jax.Array:
        """Args:
          latents: (B, H, W, in_channels) any float dtype, H and W divisible by `patch`.
          timestep: (B,) integers or floats; the released networks count 0..999.
          label: (B,) integers, 0..num_classes; num_classes stands for "no class".
          key: for stochastic depth while training; None for inference.

        Returns:
          (B, H, W, 2 * in_channels) float32: noise, then variance, as the objective interprets them.

        Raises:
          ValueError: shapes other than these, or labels out of range; within `jax.jit` such labels give NaN.
        """
        check_inputs(latents, timestep, label, self.num_classes, channels=self.in_channels, patch=self.patch)
        condition = self.conditioning(timestep, label)
        tokens = self.embed(layers.patches(latents, self.patch))
        residual = tokens.astype(jnp.float32) + condition[:, None, None]
        hidden = jnp.zeros_like(tokens)

        # A block drops what the one before it put out; the first drops zeros.
        rates = jnp.asarray(self.drop_path * np.arange(-1, self.depth + 1).clip(0) / self.depth, jnp.float32)
        keys = None if key is None or self.drop_path == 0 else jax.random.split(key, self.depth + 2)

        def drops(part: int | slice) -> tuple[jax.Array, jax.Array | None]:
            return rates[part], None if keys is None else keys[part]

        half = self.depth // 2
        run = functools.partial(_run_blocks, remat=self.remat)
        hidden, residual, (skips,) = run(
            "in_blocks", self.in_blocks, self.in_runs, hidden, residual, (), *drops(slice(half))
        )
        mid_block = jax.checkpoint(self.mid_block) if self.remat else self.mid_block
        with named_layer("mid_block"):
            hidden, residual = mid_block(hidden, residual, (), *drops(half))
        hidden, residual, _ = run(
            "out_blocks", self.out_blocks, self.out_runs, hidden, residual, (skips[::-1],), *drops(slice(half + 1, -1))
        )
        x = self.norm(_add(residual, hidden, *drops(-1)))
        return layers.unpatched(self.head(x, condition), self.patch)


def check_inputs(
    latents: jax.Array, timestep: jax.Array, label: jax.Array, num_classes: int, *, channels: int, patch: int
) -> None:
    """Raises ValueError unless a denoiser of latents (B, H, W, channels) can take these."""
    shape = latents.shape
    if len(shape) != 4 or shape[-1] != channels or has_empty_axis(shape) or shape[1] % patch or shape[2] % patch:
        raise ValueError(
            f"latents: expected shape (B, H, W, {channels}) with H and W divisible by patch = {patch}, got {shape}"
        )
    for name, array in (("timestep", timestep), ("label", label)):
        if array.shape != shape[:1]:
            raise ValueError(f"{name}: expected shape {shape[:1]}, as latents have rows, got {array.shape}")
    if not jnp.issubdtype(label.dtype, jnp.integer):
        raise ValueError(f"label: expected integers, got {label.dtype}")
    if not isinstance(label, jax.core.Tracer):  # the values of a traced label are not known
        wrong = [number for number in np.asarray(label).tolist() if not 0 <= number <= num_classes]
        if wrong:
            raise ValueError(f"label: expected 0..{num_classes} ({num_classes}: no class), got {wrong[0]}")


def _add(residual: jax.Array, hidden: jax.Array, rate: float | jax.Array, key: jax.Array | None) -> jax.Array:
    hidden = hidden.astype(residual.dtype)
    return residual + (hidden if key is None else layers.drop_path(hidden, rate, key))


def _runs(build: Callable[..., Block], chunks: Sequence[int | None]) -> tuple[Run, ...]:
    """Chunks are static, so that a scan reaches as far as they stay the same. Parameters know nothing of it."""
    groups = [(chunk, len(list(group))) for chunk, group in itertools.groupby(chunks)]
    return tuple((graph_of(functools.partial(build, chunk=chunk)), length) for chunk, length in groups)


def _run_blocks(
    name: str,
    blocks: Block,
    runs: Sequence[Run],
    hidden: jax.Array,
    residual: jax.Array,
    skips: tuple[jax.Array, ...],
    rates: jax.Array,
    keys: jax.Array | None,
    *,
    remat: bool,
) -> tuple[jax.Array, jax.Array, tuple[jax.Array, ...]]:
    """All blocks of a stack, one scan a run. Without skips to read it also gives what each put out, on a first axis."""
    stacks, start = (nnx.state(blocks), skips, rates, keys), 0
    outputs = []
    for graph, length in runs:

        def step(carry, slices, graph=graph):
            state, skip, rate, key = slices
            hidden, residual = nnx.merge(graph, state)(*carry, skip, rate, key)
            return (hidden, residual), () if skip else (hidden,)

        # In a scan nothing can undo the recomputation, so that it needs no barriers against it.
        step = jax.checkpoint(step, prevent_cse=False) if remat else step
        part = jax.tree.map(lambda stack, start=start, stop=start + length: stack[start:stop], stacks)
        with named_layer(f"{name} {start} to {start + length - 1}"):
            (hidden, residual), output = jax.lax.scan(step, (hidden, residual), part)
        outputs.append(output)
        start += length
    return hidden, residual, jax.tree.map(lambda *parts: jnp.concatenate(parts), *outputs)
