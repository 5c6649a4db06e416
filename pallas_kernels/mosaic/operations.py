"""The Mosaic kernels as an implementation of the operations."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from pallas_kernels.directions import DIRECTIONS
from pallas_kernels.mosaic import line_scan, on_chip, primitives, propagation
from pallas_kernels.mosaic.forms import Form, GivenForms, MadeForms
from pallas_kernels.mosaic.tiles import Tile
from pallas_kernels.sharding import vary_alike
from pallas_kernels.up_projection import maps_of


@dataclasses.dataclass(frozen=True)
class Kernels:
    """The functions that `gradient` calls.

    Attributes:
        interpret: whether Pallas' interpreter runs the kernels; it raises RuntimeError if it saw a race.
    """

    interpret: bool = False

    def scan_forward(
        self, x, weights, lam, direction: str, chunk: int | None, *, from_logits: bool, tile: Tile | None = None
    ) -> jax.Array:
        """h of `line_scan` or `line_scan_from_logits`: (B, H, W, C) in x's dtype."""

        def scan(x, weights, lam):
            form = Form("forward", x, weights, (x, lam), (x,), direction, chunk, tile, self.interpret)
            arrays = form.map(x), form.weights(weights), form.map(lam)
            return form.map_back(self._scan(line_scan.scan_forward, form, from_logits, *arrays))

        return _folded(scan)(x, weights, lam)

    def scan_backward(
        self, x, weights, lam, h, grad_h, direction: str, chunk: int | None, *, from_logits: bool,
        tile: Tile | None = None,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
        """Gradients of x, weights (or logits) and lam, each in its own dtype."""

        def scan(x, weights, lam, h, grad_h):
            loads, stores = (x, lam, grad_h, h), (x, lam)
            form = Form("backward", x, weights, loads, stores, direction, chunk, tile, self.interpret)
            arrays = form.map(x), form.weights(weights), form.map(lam), form.map(h), form.map(grad_h)
            grad_x, grad_weights, grad_lam = self._scan(line_scan.scan_backward, form, from_logits, *arrays)
            return form.map_back(grad_x), form.weights_back(grad_weights), form.map_back(grad_lam)

        return _folded(scan)(x, weights, lam, h, grad_h)

    def propagation_forward(
        self, x, logits, lam, gate, skip, merge, chunk: int | None, keep: bool, variant: str = "fused"
    ) -> tuple[jax.Array, tuple]:
        """y of the aligned `propagate`, and h of the four directions if `keep`; else h is not written.

        `variant` is "fused" or "fused_on_chip".
        """
        on_chip = variant == "fused_on_chip"

        def run(x, logits, lam, gate, merge, *skip):
            given = GivenForms(
                "forward", x, logits, lam, gate, *skip, chunk=chunk, on_chip=on_chip, interpret=self.interpret
            )
            return self._forward(given, keep, on_chip, merge, x, given.arrays(logits, lam, gate, *skip))

        y, *states = _folded(run)(x, logits, lam, gate, _for_each_image(merge, x), *([] if skip is None else [skip]))
        return y, tuple(states)

    def propagation_backward(self, x, logits, lam, gate, skip, merge, h, grad_y, chunk: int | None) -> tuple:
        """Gradients of x, logits, lam, gate, skip (None where skip is) and merge, each in its own dtype."""

        def run(x, logits, lam, gate, merge, grad_y, *others):
            h, skip = others[:4], others[4:]
            given = GivenForms(
                "backward", x, logits, lam, gate, *skip, chunk=chunk, on_chip=False, interpret=self.interpret
            )
            return self._backward(given, merge, x, grad_y, h, given.arrays(logits, lam, gate, *skip))

        arrays = (x, logits, lam, gate, _for_each_image(merge, x), grad_y, *h, *([] if skip is None else [skip]))
        grad_x, of_merge, grad_logits, *of_maps = _folded(run)(*arrays)
        of_maps += [None] if skip is None else []
        return grad_x, grad_logits, *of_maps, jnp.sum(of_merge, axis=0).astype(merge.dtype)

    def low_rank_forward(
        self, x, proxy, up, merge, chunk: int | None, keep: bool, variant: str
    ) -> tuple[jax.Array, tuple]:
        """As `propagation_forward`, from the 16-bit `proxy` and `up` of `propagate_low_rank`, by any variant."""
        if not variant.startswith("low_rank"):
            return self.propagation_forward(x, *maps_of(proxy, up), merge, chunk, keep, variant)
        on_chip = variant == "low_rank_on_chip"

        def run(up, x, proxy, merge):
            made = MadeForms("forward", x, proxy, up, chunk=chunk, on_chip=on_chip, interpret=self.interpret)
            return self._forward(made, keep, on_chip, merge, x, made.arrays(proxy))

        y, *states = _folded(run, first=1)(up, x, proxy, _for_each_image(merge, x))
        return y, tuple(states)

    def low_rank_backward(self, x, proxy, up, merge, h, grad_y, chunk: int | None, variant: str) -> tuple:
        """Gradients of x, the maps and merge, as `propagation_backward`; those of logits have C_w or C channels.

        `variant` is "fused", which makes the maps again in memory, or "low_rank", which makes them in the kernels.
        """
        if variant == "fused":
            # Without the barrier XLA reuses the maps of the forward pass and keeps them in memory until then.
            proxy, up, grad_y = jax.lax.optimization_barrier((proxy, up, grad_y))
            return self.propagation_backward(x, *maps_of(proxy, up), merge, h, grad_y, chunk)

        def run(up, x, proxy, merge, grad_y, *h):
            made = MadeForms("backward", x, proxy, up, chunk=chunk, on_chip=False, interpret=self.interpret)
            return self._backward(made, merge, x, grad_y, h, made.arrays(proxy))

        grad_x, of_merge, *of_maps = _folded(run, first=1)(up, x, proxy, _for_each_image(merge, x), grad_y, *h)
        of_maps += [None] if up[-1] is None else []
        return grad_x, *of_maps, jnp.sum(of_merge, axis=0).astype(merge.dtype)

    def _forward(self, forms: GivenForms | MadeForms, keep: bool, is_on_chip: bool, merge, x, arrays):
        def kernels(x, merge, arrays):
            options: Any = dict(chunk=forms.chunk, keep=keep, interpret=self.interpret)
            if is_on_chip:
                run = functools.partial(on_chip.propagate_forward, tile=forms.tiles[0])
            else:
                run = functools.partial(propagation.propagate_forward, tiles=forms.tiles)
            return run(x, forms.maps(arrays), merge, **options)

        y, states = self._run(kernels, forms.map(x), merge, arrays)
        return [forms.map_back(array) for array in (y, *states)]

    def _backward(self, forms: GivenForms | MadeForms, merge, x, grad_y, h, arrays):
        """Gradients of x, merge, logits, lam, gate and, if given, skip."""

        def kernels(x, grad_y, h, merge, arrays):
            options: Any = dict(chunk=forms.chunk, tiles=forms.tiles, interpret=self.interpret)
            return propagation.propagate_backward(x, forms.maps(arrays), merge, h, grad_y, **options)

        maps = forms.map(x), forms.map(grad_y), [forms.map(array) for array in h]
        grad_x, of_logits, of_maps, of_merge = self._run(kernels, *maps, merge, arrays)
        of_maps = [forms.map_back(grad) for grad in of_maps]
        return [forms.map_back(grad_x), of_merge, forms.logits_back(of_logits), *of_maps]

    def _scan(self, kernel, form: Form, from_logits: bool, *arrays: jax.Array):
        function = functools.partial(
            kernel, direction=form.direction, chunk=form.chunk, from_logits=from_logits, tile=form.tile,
            interpret=self.interpret,
        )  # fmt: skip
        return self._run(function, *arrays)

    def _run(self, function, *arrays):
        """`function(*arrays)`, which launches kernels; arrays may be trees."""
        results = (primitives.interpreted if self.interpret else primitives.on_device)(function, *arrays)
        leaves, structure = jax.tree.flatten(results)
        return jax.tree.unflatten(structure, vary_alike(*leaves, *jax.tree.leaves(arrays))[: len(leaves)])


def _for_each_image(merge: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.broadcast_to(merge.astype(jnp.float32), (x.shape[0], len(DIRECTIONS)))


def _folded(function, first: int = 0):
    """`function` with a rule for `jax.vmap`: the new axis joins the batch axis, so one launch does all.

    Arguments and results are (B, ...), but for the first `first` arguments, which are common to the whole batch. If
    those are mapped, one batch runs after the other.
    """
    function = custom_vmap(function)

    @function.def_vmap
    def _(size, is_mapped, *arguments):
        def merged(mapped, array):
            array = array if mapped else jnp.broadcast_to(array, (size, *array.shape))
            return array.reshape(-1, *array.shape[2:])

        if any(jax.tree.leaves(is_mapped[:first])):
            whole = jax.tree.map(
                lambda mapped, array: array if mapped else jnp.broadcast_to(array, (size, *array.shape)),
                tuple(is_mapped), arguments,
            )  # fmt: skip
            results = jax.lax.map(lambda one: function(*one), whole)
        else:
            batches = jax.tree.map(merged, tuple(is_mapped[first:]), arguments[first:])
            results = function(*arguments[:first], *batches)
            results = jax.tree.map(lambda result: result.reshape(size, -1, *result.shape[1:]), results)
        return results, jax.tree.map(lambda _: True, results)

    return function
