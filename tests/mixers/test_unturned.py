"""The released text-to-image program on maps that are twice as wide as high, written from its own axes and rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gspn_jax.mixers import GSPNMixer
from tests.pallas_kernels import numpy_scan
from tests.tolerances import assert_close


def channels_last(array):
    return array.transpose(0, 2, 3, 1)


def numpy_wide(mixer, x, chunk):
    """x: (B, D, H, W). Rows of the weights are (pair, slot, direction of the pair, channel)."""
    batch, depth, height, width = x.shape
    proxy = channels_last(x) @ np.asarray(mixer.proxy.kernel[...], np.float64)
    # Our columns (direction, slot, channel) to the rows of a file, (slot, direction, channel).
    rows = np.asarray(mixer.logits.kernel[...]).reshape(-1, 4, 3, depth).swapaxes(1, 2).reshape(-1, 12 * depth)
    logits = (proxy @ rows).reshape(batch, height, width, 2, 3, 2, depth)
    lam, gate, skip = (
        (proxy @ np.asarray(layer.kernel[...])).reshape(batch, height, width, 4, depth)
        for layer in (mixer.lam, mixer.gate, mixer.skip)
    )
    swapped = np.ascontiguousarray(x.swapaxes(1, 2)).reshape(x.shape)
    y = np.zeros((batch, height, width, depth))
    for d, turned in enumerate((x, x[..., ::-1], swapped, swapped[..., ::-1])):
        turned = channels_last(turned)
        weights = numpy_scan.row_stochastic(logits[:, :, :, d // 2, :, d % 2], "right")
        h = numpy_scan.line_scan(turned, weights, lam[:, :, :, d], "right", chunk)
        y += float(mixer.merge[...][d]) * (gate[:, :, :, d] * h + skip[:, :, :, d] * turned)
    return y @ np.asarray(mixer.out.kernel[...], np.float64)


def unturned(features, **options):
    return GSPNMixer(features, proxy_rank=2, out_projection=True, alignment="unturned", rngs=nnx.Rngs(0), **options)


@pytest.mark.parametrize("keep_states", [True, pytest.param(False, marks=pytest.mark.full)])
def test_wide_maps_are_read_as_the_program_reads_them(keep_states):
    mixer = unturned(5, chunk=4, keep_states=keep_states)
    x = np.random.default_rng(0).normal(size=(2, 5, 3, 6))
    got = jax.jit(lambda x: mixer(x))(jnp.asarray(channels_last(x), jnp.float32))
    assert_close(got, numpy_wide(mixer, x, 4), dtype="float32", tolerance=3e-6)


def test_other_maps_are_refused():
    for shape in ((1, 6, 3, 5), (1, 3, 4, 5)):
        with pytest.raises(ValueError, match="x: expected H = W, or W = 2 H, for alignment 'unturned'"):
            unturned(5)(jnp.zeros(shape))
    with pytest.raises(ValueError, match="square"):
        GSPNMixer(5, alignment="unturned", rngs=nnx.Rngs(0))(jnp.zeros((1, 3, 6, 5)))
