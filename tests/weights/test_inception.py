import pathlib
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gspn_jax.evaluation.inception import CONVOLUTIONS, resized
from gspn_jax.weights import fid_inception

FOLDER = pathlib.Path(__file__).parents[1] / "golden"
with np.load(FOLDER / "inception.npz") as saved:
    GOLDEN = dict(saved)


@pytest.fixture(scope="module")
def arrays():
    """The golden parameters, each drawn by its name."""
    with np.load(FOLDER / "inception_shapes.npz") as saved:
        shapes = {name: tuple(map(int, saved[name])) for name in saved.files}

    def draw(name, shape):
        z = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
        if len(shape) == 4:
            z *= np.sqrt(2 / np.prod(shape[1:]))
        elif len(shape) == 2:
            z *= np.sqrt(1 / shape[1])
        elif name.endswith("running_var"):
            z = 1 + 0.1 * np.abs(z)
        else:
            z = 0.1 * z + name.endswith("bn.weight")
        return z.astype(np.float32)

    return {name: draw(name, shape) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def network(arrays):
    return fid_inception(arrays)


@pytest.mark.parametrize("size", [64, pytest.param(299, marks=pytest.mark.full)])
def test_features_of_the_published_program(network, size):
    images = jnp.asarray(GOLDEN[f"image_{size}"].transpose(0, 2, 3, 1))
    features = jax.jit(lambda images: network(images))(images)
    for name in ("64", "192", "768", "2048", "logits_unbiased"):
        want = GOLDEN[f"{name}_{size}"]
        np.testing.assert_allclose(features[name], want, atol=1e-4 * np.abs(want).max(), rtol=1e-4, err_msg=name)
    assert features["mixed_6_conv"].shape == (2, 17, 17, 7) and np.all(np.asarray(features["mixed_6_conv"]) >= 0)


def test_resizing_by_hand():
    images = jnp.arange(4.0).reshape(1, 2, 2, 1)
    want = [[0, 0.5, 1, 1], [1, 1.5, 2, 2], [2, 2.5, 3, 3], [2, 2.5, 3, 3]]
    np.testing.assert_allclose(resized(images, 4)[0, :, :, 0], want)


def test_bad_input_is_refused(network, arrays):
    assert len(CONVOLUTIONS) == 94
    for images in (jnp.zeros((1, 9, 9, 3)), jnp.zeros((1, 9, 9, 4), jnp.uint8)):
        with pytest.raises(ValueError, match=r"images: expected uint8 \(B, H, W, 3\)"):
            network(images)
    with pytest.raises(ValueError, match=r"Mixed_6d\.branch1x1\.conv\.weight, which is missing"):
        fid_inception({k: v for k, v in arrays.items() if k != "Mixed_6d.branch1x1.conv.weight"})
    with pytest.raises(ValueError, match=r"Mixed_6d\.branch1x1\.bn\.bias, got NaN or Inf"):
        fid_inception(arrays | {"Mixed_6d.branch1x1.bn.bias": np.full(192, np.nan, np.float32)})
    with pytest.raises(ValueError, match=r"Mixed_6d\.branch1x1\.conv\.weight to have 4 axes, .* got shape \(\)"):
        fid_inception(arrays | {"Mixed_6d.branch1x1.conv.weight": np.array(1.0)})
    with pytest.raises(ValueError, match="1 more: extra"):
        fid_inception(arrays | {"extra": np.zeros(1)})
