"""The Mosaic kernels as an implementation of the operations."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from pallas_kernels.directions import DIRECTIONS
from pallas_kernels.merging import merged
from pallas_kernels.mosaic import kernels, layouts, on_chip, primitives
from pallas_kernels.mosaic.layouts import Layout, lay_out
from pallas_kernels.mosaic.maps import Loaded, Made
from pallas_kernels.mosaic.tiles import Tile
from pallas_kernels.mosaic.variants import ON_CHIP
from pallas_kernels.sharding import vary_alike
from pallas_kernels.up_projection import UpProjection, gradients_of_maps, maps_of


@dataclasses.dataclass(frozen=True)
class Kernels:
    """The functions that `gradient` calls.

    Attributes:
        interpret: whether Pallas' interpreter runs the kernels; it raises RuntimeError if it saw a race.
    """

    interpret: bool = False

    def scan_forward(
        self, x, weights, lam, *, directions: tuple[str, ...], chunk: int | None, from_logits: bool,
        tile: Tile | None = None,
    ) -> jax.Array:  # fmt: skip
        """h of line scans in D directions: (B, D, H, W, C) in x's dtype.

        Args:
            x: (B, H, W, C).
            weights: (B, H, W, D, 3, C_w), or their logits.
            lam: (B, H, W, D, C).
            directions: the D directions.
            chunk: lines after which the scans restart, or None.
            from_logits: whether the weights are given as logits.
            tile: of every launch; None for the planned ones.
        """

        def scan(x, weights, lam):
            layout = self._scan_layout("forward", x, weights, lam, directions, chunk, tile)

            def run(x, weights, lam):
                results: Any = {"h": layout.states(x.dtype)}
                for frame, one in zip(layout.frames(), weights, strict=True):
                    source = Loaded(frame, one, lam, from_logits)
                    results = kernels.forward(x, source, results, interpret=self.interpret)
                return results["h"]

            return layout.map_back(self._run(run, layout.map(x), layout.weights(weights), layout.map(lam)))

        return _folded(scan)(x, weights, lam)

    def scan_backward(
        self, x, weights, lam, h, grad_h, *, directions: tuple[str, ...], chunk: int | None, from_logits: bool,
        tile: Tile | None = None,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
        """Gradients of x, weights (or logits) and lam, each in its own dtype, from h and its gradient."""

        def scan(x, weights, lam, h, grad_h):
            layout = self._scan_layout("backward", x, weights, lam, directions, chunk, tile)

            def run(x, weights, lam, h, grad_h):
                results: Any = {"x": layout.states(x.dtype)}
                of_weights = []
                for frame, one in zip(layout.frames(), weights, strict=True):
                    source = Loaded(frame, one, lam, from_logits)
                    fresh = {name: like for name, like in source.gradients.items() if name not in results}
                    results = kernels.backward(
                        x, source, h, grad_h, None, {**results, **fresh}, interpret=self.interpret
                    )
                    of_weights.append(results.pop("weights") if layout.is_shared else results["weights"])
                return results["x"], of_weights, results["lam"]

            arrays = layout.map(x), layout.weights(weights), *map(layout.map, (lam, h, grad_h))
            of_x, of_weights, of_lam = self._run(run, *arrays)
            return (
                _added(layout.map_back(of_x), x),
                layout.weights_back(of_weights, weights.dtype),
                layout.map_back(of_lam),
            )

        return _folded(scan)(x, weights, lam, h, grad_h)

    def low_rank_forward(
        self, x, proxy, up: UpProjection, merge, *, chunk: int | None, keep: bool, variant: str
    ) -> tuple[jax.Array, tuple]:
        """y of `propagate_low_rank`, (B, H, W, C), and if `keep` the states: h, (B, 4, H, W, C).

        Args:
            x: (B, H, W, C).
            proxy: (B, H, W, S), 16-bit.
            up: in the proxy's dtype.
            merge: (4,).
            chunk: lines after which the scans restart, or None.
            keep: whether h is kept for the gradient.
            variant: a name in `VARIANTS`.
        """
        if variant == "scans":
            weights, lam, gate, skip = maps_of(proxy, up)
            h = self.scan_forward(x, weights, lam, directions=DIRECTIONS, chunk=chunk, from_logits=True)
            return merged(x, h, gate, skip, merge), ((h,) if keep else ())
        is_on_chip = variant.endswith(ON_CHIP)

        def propagate(up, merge, x, proxy):
            kind = layouts.low_rank_kind("forward", x, proxy.shape[-1], keep=keep, on_chip=is_on_chip)
            layout = self._low_rank_layout(kind, x, up, chunk)

            def run(x, sources, merge):
                results: Any = {"h": layout.states(x.dtype)} if keep else {}
                if is_on_chip:
                    results["y"] = jax.ShapeDtypeStruct(x.shape, x.dtype)
                    return on_chip.forward(x, sources, merge, results, interpret=self.interpret)
                results["share"] = layout.states(x.dtype)
                for source in sources:
                    results = kernels.forward(x, source, results, interpret=self.interpret)
                return results

            found = self._run_made(run, layout, up, proxy, layout.map(x), merge)
            y = layout.map_back(found["y"]) if is_on_chip else _added(layout.map_back(found["share"]), x, merge)
            return y, ((layout.map_back(found["h"]),) if keep else ())

        return _folded(propagate, first=2)(up, merge.astype(jnp.float32), x, proxy)

    def low_rank_backward(
        self, x, proxy, up: UpProjection, merge, states: tuple, grad_y, *, chunk: int | None, variant: str
    ) -> tuple[jax.Array, jax.Array, UpProjection, jax.Array]:
        """Gradients of x, in its dtype, and of proxy, up and merge, float32; arguments as in `low_rank_forward`.

        `variant` is "scans", which makes the maps again in memory, or "low_rank", which makes them in the kernel.
        """
        (h,) = states
        if variant == "scans":
            # Without the barrier XLA reuses the maps of the forward pass and keeps them in memory until then.
            proxy, up, grad_y = jax.lax.optimization_barrier((proxy, up, grad_y))
            weights, lam, *others = maps_of(proxy, up)
            _, pull = jax.vjp(merged, x, h, *others, merge)
            of_x, of_h, of_gate, of_skip, of_merge = pull(grad_y)
            options: Any = dict(directions=DIRECTIONS, chunk=chunk, from_logits=True)
            more, of_weights, of_lam = self.scan_backward(x, weights, lam, h, of_h, **options)
            of_x = (of_x.astype(jnp.float32) + more.astype(jnp.float32)).astype(x.dtype)
            of_maps = of_weights, of_lam, of_gate, of_skip
            return of_x, *gradients_of_maps(proxy, up, of_maps), of_merge.astype(jnp.float32)

        def propagate(up, merge, x, proxy, h, grad_y):
            layout = self._low_rank_layout(layouts.low_rank_kind("backward", x, proxy.shape[-1]), x, up, chunk)

            def run(x, sources, h, grad_y, merge):
                results: Any = {"x": layout.states(x.dtype), **sources[0].gradients}
                for source in sources:
                    results = kernels.backward(x, source, h, grad_y, merge, results, interpret=self.interpret)
                return results

            arrays = map(layout.map, (x, h, grad_y))
            found = self._run_made(run, layout, up, proxy, *arrays, merge)
            found = {name: layout.map_back(array) for name, array in found.items()}
            logits = found["weights"].reshape(*x.shape[:3], 4, 3, -1)
            return _added(found["x"], x), logits, *(found.get(name) for name in ("lam", "gate", "skip"))

        merge = merge.astype(jnp.float32)
        of_x, *of_maps = _folded(propagate, first=2)(up, merge, x, proxy, h, grad_y)
        # The kernel's gradients are those of merge times gate and skip.
        of_proxy, of_up = gradients_of_maps(proxy, _scaled(up, merge), tuple(of_maps))
        products = jax.tree.map(
            lambda array, grad: jnp.sum(array.astype(grad.dtype) * grad, axis=(0, 2)), up[2:], of_up[2:]
        )
        of_merge = sum(jax.tree.leaves(products), jnp.zeros_like(merge))
        return of_x, of_proxy, _scaled(of_up, merge), of_merge

    def _scan_layout(self, kernel: str, x, weights, lam, directions, chunk, tile: Tile | None) -> Layout:
        kind, sizes = layouts.scan_kind(kernel, x, weights, lam), (x.shape, weights.shape[-1], directions, chunk)
        layout = lay_out(kind, *sizes, tile=tile, interpret=self.interpret)
        if layout is None and tile is not None:
            raise ValueError(f"tile: expected one that fits the {kernel} scan of x {x.shape}, got {tile!r}")
        if layout is None:
            raise ValueError(f"x: expected a map that some tile fits, got {x.shape} {x.dtype.name}")
        return layout

    def _low_rank_layout(self, kind: layouts.Kind, x, up: UpProjection, chunk: int | None) -> Layout:
        layout = lay_out(kind, x.shape, up.logits.shape[-1], DIRECTIONS, chunk, interpret=self.interpret)
        if layout is None:  # the choice was made for the whole map, of which a device of a mesh has a part
            raise ValueError(f"variant: expected one that fits x {x.shape} {x.dtype.name}, the part of a device")
        return layout

    def _run_made(self, function, layout: Layout, up: UpProjection, proxy, x, *arrays):
        """function(x, sources, *arrays) with maps made from `proxy`, for each of the layout's frames."""
        frames = layout.frames()
        columns = [layout.columns(up, frame.tile) for frame in frames]
        proxies, pitches = zip(*(layout.proxies(proxy, frame) for frame in frames), strict=True)

        def run(columns, proxies, *given):
            sources = [
                Made(frame, of_frame, pitch, matrix, up.skip is not None, layout.on_chip)
                for frame, of_frame, pitch, matrix in zip(frames, proxies, pitches, columns, strict=True)
            ]
            return function(given[0], sources, *given[1:])

        return self._run(run, columns, list(proxies), x, *arrays)

    def _run(self, function, *arrays):
        """`function(*arrays)`, which launches kernels; arrays may be trees."""
        results = (primitives.interpreted if self.interpret else primitives.on_device)(function, *arrays)
        leaves, structure = jax.tree.flatten(results)
        return jax.tree.unflatten(structure, vary_alike(*leaves, *jax.tree.leaves(arrays))[: len(leaves)])


def _scaled(up: UpProjection, merge: jax.Array) -> UpProjection:
    """`up` with each direction's gate and skip times its merge."""
    scale = lambda array: None if array is None else array * merge.astype(array.dtype)[None, :, None]  # noqa: E731
    return up._replace(gate=scale(up.gate), skip=scale(up.skip))


def _added(shares: jax.Array, x: jax.Array, merge: jax.Array | None = None) -> jax.Array:
    """The sum of (B, D, H, W, C) over the directions, each times its merge if there is one, in x's dtype."""
    if shares.shape[1] == 1:
        return shares[:, 0]
    shares = shares.astype(jnp.float32)
    if merge is not None:
        shares *= merge[None, :, None, None, None]
    return jnp.sum(shares, axis=1).astype(x.dtype)


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
