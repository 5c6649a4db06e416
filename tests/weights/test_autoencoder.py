import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gspn_jax.weights import diffusers_autoencoder
from tests.tolerances import assert_close

with np.load(pathlib.Path(__file__).parents[1] / "golden" / "autoencoder_tiny.npz") as saved:
    GOLDEN = dict(saved)
ARRAYS = {name.removeprefix("param/"): array for name, array in GOLDEN.items() if name.startswith("param/")}
IMAGE, MEAN, LOG_VARIANCE, DECODED = (
    jnp.asarray(GOLDEN[key].transpose(0, 2, 3, 1), jnp.float32) for key in ("image", "mean", "logvar", "decoded_mean")
)


@pytest.fixture(scope="module")
def network():
    return diffusers_autoencoder(ARRAYS, norm_groups=8)


def test_latents_and_images_of_the_published_program(network):
    mean, log_variance = jax.jit(network.encode)(IMAGE)
    decoded = jax.jit(network.decode)(MEAN)
    for got, want in ((mean, MEAN), (log_variance, LOG_VARIANCE), (decoded, DECODED)):
        np.testing.assert_allclose(got, want, atol=3e-5, rtol=0)  # processors round differently: 1.3e-5 was seen


@pytest.mark.full
def test_bfloat16_is_close():
    network = diffusers_autoencoder(ARRAYS, norm_groups=8, dtype=jnp.dtype("bfloat16"))
    with jax.numpy_dtype_promotion("standard"):
        mean, decoded = jax.jit(network.encode)(IMAGE)[0], jax.jit(network.decode)(MEAN)
    assert mean.dtype == decoded.dtype == jnp.float32
    assert_close(mean, MEAN, tolerance=0.06)
    assert_close(decoded, DECODED, tolerance=0.06)


@pytest.mark.full
def test_old_names_and_pointwise_convolutions_are_read(network):
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    arrays = dict(ARRAYS)
    for part in ("encoder", "decoder"):
        for new, name in old.items():
            prefix = f"{part}.mid_block.attentions.0."
            arrays[f"{prefix}{name}.weight"] = arrays.pop(f"{prefix}{new}.weight")[:, :, None, None]
            arrays[f"{prefix}{name}.bias"] = arrays.pop(f"{prefix}{new}.bias")
    other = diffusers_autoencoder(arrays, norm_groups=8)
    np.testing.assert_array_equal(other.encode(IMAGE)[0], network.encode(IMAGE)[0])


def test_bad_input_is_refused(network):
    with pytest.raises(ValueError, match=r"images: expected shape \(B, H, W, 3\) with H and W divisible by 8"):
        network.encode(jnp.zeros((1, 12, 16, 3)))
    with pytest.raises(ValueError, match=r"latents: expected shape \(B, H, W, 4\)"):
        network.decode(jnp.zeros((1, 2, 2, 3)))
    with pytest.raises(ValueError, match="norm_groups: expected a divisor of the widths"):
        diffusers_autoencoder(ARRAYS, norm_groups=5)
    with pytest.raises(ValueError, match=r"decoder\.conv_out\.bias, which is missing"):
        diffusers_autoencoder({k: v for k, v in ARRAYS.items() if k != "decoder.conv_out.bias"}, norm_groups=8)
    with pytest.raises(ValueError, match=r"arrays: expected finite numbers in decoder\.conv_out\.bias, got NaN or Inf"):
        diffusers_autoencoder(ARRAYS | {"decoder.conv_out.bias": np.full(3, np.nan, np.float32)}, norm_groups=8)
    with pytest.raises(
        ValueError, match=r"encoder\.down_blocks\.0 to .* without a gap, got encoder\.down_blocks\.1000000"
    ):
        diffusers_autoencoder(ARRAYS | {"encoder.down_blocks.1000000.x": np.zeros(1)}, norm_groups=8)
    with pytest.raises(ValueError, match="1 more: extra"):
        diffusers_autoencoder(ARRAYS | {"extra": np.zeros(1)}, norm_groups=8)
    with pytest.raises(ValueError, match=r"encoder\.down_blocks\.<index>\.\.\., got 1 other"):
        diffusers_autoencoder({"extra": np.zeros(1)})
