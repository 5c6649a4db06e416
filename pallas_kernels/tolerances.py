"""How close a result must come to its reference: by the interpreter, and on a card."""

# RMS(error) / RMS(reference) that a result of the dtype may show against a reference of at least its precision.
# The 16-bit rows are about twice the error of one rounding of the result: states are float32 whatever the dtype.
TOLERANCES = {"float64": 1e-12, "float32": 1e-6, "bfloat16": 4e-3, "float16": 5e-4}


def card_tolerances(*, made_maps: bool) -> dict[str, float]:
    """`TOLERANCES` where a card runs the kernels and the reference; decided before any card had run them.

    float32 gets 4e-6. The kernels' powers of two are approximate: 2^-22 of a value, and the rounding of the argument.
    A simulation of these errors gives 4e-8 of h and 9e-8 of the logits' gradient, after 9 lines and after 1,024 alike,
    because rows still sum to exactly 1. Roundings in another order of operations give the larger part, on both sides:
    3e-7 of h and 6e-7 of the gradient after 1,024 lines, which is too near to 1e-6. The rest is for approximate
    divisions, which the simulation leaves out. One wrong value among a million gives about 1e-3.

    Made maps get at least 1e-4 in float32. Tensor cores sum in another order than XLA's matrix products, and then
    some of the 16-bit maps are rounded to the other side: in a simulation with a proxy of 40 channels, one in 40,000,
    which is 9e-6 of a map. The interpreter makes the same products as the reference.

    16-bit results keep their rows: the rounding of the result hides both. Products of float32 factors, as in the
    gradient of a projection, must be whole float32 in both programs: set `jax.default_matmul_precision("highest")`.

    Args:
        made_maps: whether the kernels make the maps from a proxy.
    """
    return TOLERANCES | {"float32": 1e-4 if made_maps else 4e-6}
