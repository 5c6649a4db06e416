"""Parameters of what replaces self-attention in the UNets, under the names that released files have.

A released file names the parameters of replacement i `<i>.<name>`. GSPN's and LinFusion's are files of their authors;
no Mambas were released, so theirs have the names of the program that Mamba comes from.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from gspn_jax.mixers import MIXERS
from gspn_jax.weights.gspn import GSPN_MIXER
from gspn_jax.weights.torch_layouts import Row, exported, filled, shape_of, unwrapped

_QUERY_KEY_VALUE = [
    ("query/kernel", "to_q.weight", "linear"),
    ("key/kernel", "to_k.weight", "linear"),
    ("value/kernel", "to_v.weight", "linear"),
]
_OUT = [("out/kernel", "to_out.0.weight", "linear"), ("out/bias", "to_out.0.bias", "vector")]
_NETWORK = [
    ("widen/kernel", "0.weight", "linear"),
    ("widen/bias", "0.bias", "vector"),
    ("norm/scale", "1.weight", "vector"),
    ("norm/bias", "1.bias", "vector"),
    ("narrow/kernel", "3.weight", "linear"),
    ("narrow/bias", "3.bias", "vector"),
]
_MAMBAS = [
    ("widen/kernel", "in_proj.weight", "linear"),
    ("conv/kernel", "conv1d.weight", "taps"),
    ("conv/bias", "conv1d.bias", "vector"),
    ("log_rate", "A_log", "table"),
    ("skip", "D", "vector"),
    ("narrow/kernel", "out_proj.weight", "linear"),
]
# Our path in a mixer, their name, and how theirs is laid out. A module has those rows whose parameters it has.
_ROWS = {
    "gspn": [*GSPN_MIXER, *_QUERY_KEY_VALUE, *_OUT],
    "linfusion": [
        *_QUERY_KEY_VALUE,
        *_OUT,
        *((f"query_network/{ours}", f"to_q_.{theirs}", layout) for ours, theirs, layout in _NETWORK),
        *((f"key_network/{ours}", f"to_k_.{theirs}", layout) for ours, theirs, layout in _NETWORK),
    ],
    "mamba": [
        *_MAMBAS,
        ("select/kernel", "x_proj.weight", "linear"),
        ("step/kernel", "dt_proj.weight", "linear"),
        ("step/bias", "dt_proj.bias", "vector"),
    ],
    "mamba2": [*_MAMBAS, ("step_bias", "dt_bias", "vector"), ("norm/scale", "norm.weight", "vector")],
}


def attention_replacement(arrays: Mapping[str, Any], mixer: str, **options: Any) -> Any:
    """Loads one replacement of self-attention. Shapes tell its sizes.

    Args:
        arrays: released names, without a number before them, to arrays.
        mixer: "gspn", "linfusion", "mamba" or "mamba2".
        options: of the mixer, such as num_heads, chunk or alignment.

    Returns:
        the mixer, a module on (B, H, W, C) maps.

    Raises:
        ValueError: an unknown mixer; names the parameter that is missing, is left over, does not fit, or holds NaN or
            Inf.
    """
    arrays = unwrapped(arrays)
    options = {**replacement_options(mixer, arrays, groups=options.get("groups", 1)), **options}
    first, axis = ("in_proj.weight", 1) if mixer.startswith("mamba") else ("to_out.0.weight", 0)
    build = functools.partial(MIXERS[mixer], shape_of(arrays, first, axes=2)[axis], **options)
    return filled(build, replacement_rows(mixer, (), "", options), arrays, kind=f"{mixer} replacement")


def replacement_options(mixer: str, arrays: Mapping[str, Any], prefix: str = "", *, groups: int = 1) -> dict[str, Any]:
    """Reads the options of a mixer off the shapes of its parameters.

    Args:
        mixer: "gspn", "linfusion", "mamba" or "mamba2".
        arrays: names to arrays.
        prefix: what precedes the mixer's own names, such as "3.".
        groups: of "mamba2", which no shape tells.

    Returns:
        "gspn": proxy_rank, weight_channels, query_key_value and out_projection. "linfusion": inner. The Mambas: state,
        conv, expand, form ("full", or "plain" where there is no convolution), and rank or head_dim and groups.
        Not read, because no shape tells them: heads, chunk, alignment, and whether a Mamba without convolution is
        normalised.

    Raises:
        ValueError: an unknown mixer; names the parameter that is missing or misshapen.
    """
    _check_mixer(mixer)

    def shape(name: str, axes: int | None = None) -> tuple[int, ...]:
        return shape_of(arrays, prefix + name, axes=axes)

    if mixer == "gspn":
        rank, *_ = shape("x_conv_down.weight")
        return dict(
            proxy_rank=rank,
            weight_channels=shape("w_conv_up.weight")[0] // 12,
            query_key_value=f"{prefix}to_q.weight" in arrays,
            out_projection=True,
        )
    if mixer == "linfusion":
        return dict(inner=shape("to_q_.0.weight", 2)[0])
    features, inner = shape("out_proj.weight", 2)
    is_full = f"{prefix}conv1d.weight" in arrays
    options: dict[str, Any] = dict(expand=inner / features, form="full" if is_full else "plain")
    if is_full:
        options["conv"] = shape("conv1d.weight", 3)[-1]
    if mixer == "mamba":
        return options | dict(state=shape("A_log", 2)[1], rank=shape("dt_proj.weight", 2)[1])
    (heads,) = shape("A_log", 1)
    # in_proj gives z (where there is a gate) and u, of inner channels, B and C, of groups * state, and a step a head.
    of_states = shape("in_proj.weight", 2)[0] - (2 if is_full else 1) * inner - heads
    return options | dict(state=of_states // (2 * groups), head_dim=inner // heads, groups=groups)


def replacement_rows(
    mixer: str, ours: tuple, prefixes: str | Sequence[str], options: Mapping[str, Any]
) -> Iterator[Row]:
    """The rows of `gspn_jax.weights.torch_layouts.filled` for a mixer.

    Args:
        mixer: "gspn", "linfusion", "mamba" or "mamba2".
        ours: path of the mixer in our network.
        prefixes: what precedes its names in the file, such as "3."; several for the mixers of stacked blocks.
        options: of the mixer, as `replacement_options` returns them.

    Raises:
        ValueError: an unknown mixer.
    """
    _check_mixer(mixer)
    lacks_projections = mixer == "gspn" and not options.get("query_key_value")
    is_plain = mixer.startswith("mamba") and options.get("form", "full") != "full"
    for path, name, layout in _ROWS[mixer]:
        part = path.split("/")[0]
        if (lacks_projections and part in ("query", "key", "value")) or (is_plain and part in ("conv", "norm")):
            continue
        yield _row(ours, prefixes, path, name, layout)


def replacement_arrays(state: Mapping[tuple, Any], ours: tuple, prefixes: str | Sequence[str]) -> dict[str, np.ndarray]:
    """The parameters of a mixer under their released names and in their shapes.

    Args:
        state: parameters of the network, path to variable, as `flax.nnx.to_flat_state` gives them.
        ours: path of the mixer in the network.
        prefixes: as in `replacement_rows`.

    Raises:
        ValueError: the mixer has a parameter that released files have no name for.
    """
    paths = {"/".join(map(str, path[len(ours) :])) for path in state if path[: len(ours)] == ours}
    rows = next((rows for rows in _ROWS.values() if paths and paths <= {path for path, *_ in rows}), None)
    if rows is None:
        raise ValueError(f"mixer: expected the parameters of one of {', '.join(_ROWS)}, got {', '.join(sorted(paths))}")
    return exported(state, [_row(ours, prefixes, *row) for row in rows if row[0] in paths])


def _row(ours: tuple, prefixes: str | Sequence[str], path: str, name: str, layout: str) -> Row:
    names = prefixes + name if isinstance(prefixes, str) else [prefix + name for prefix in prefixes]
    return (*ours, *path.split("/")), names, layout


def _check_mixer(mixer: str) -> None:
    if mixer not in _ROWS:
        raise ValueError(f"mixer: expected one of {', '.join(_ROWS)}; got {mixer!r}")
