"""Who holds what, and that it does not change what is computed."""

from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from gspn_jax.training.metrics import read_rows
from gspn_jax.training.sharding import (
    MeshOptions,
    check_batch_size,
    leaf_spec,
    make_mesh,
    pad_rows,
    place_batch,
    replicate,
)
from tests.training.toy import toy_train


@pytest.mark.parametrize(
    ("shape", "fsdp", "want"),
    [
        ((256, 512), False, P(None, "model")),
        ((256, 512), True, P("data", "model")),
        ((256, 511), False, P("model", None)),
        ((256, 511), True, P("model", None)),
        ((7, 7, 1, 512), True, P(None, None, None, "model")),
        ((255, 511), True, P(None, None)),
        ((16, 16), True, P()),  # small
        ((2**20,), True, P()),  # a vector
        ((), True, P()),
    ],
)
def test_leaf_spec(shape: tuple[int, ...], fsdp: bool, want: P):
    assert leaf_spec(shape, make_mesh(MeshOptions(data=4, model=2)), fsdp=fsdp) == want


def test_mesh_takes_what_model_leaves_and_names_what_does_not_fit():
    assert dict(make_mesh(MeshOptions(model=2)).shape) == {"data": 4, "model": 2}
    with pytest.raises(ValueError, match="mesh.model: expected a divisor of the 8"):
        make_mesh(MeshOptions(model=3))
    with pytest.raises(ValueError, match="mesh.data: expected -1 or 4"):
        make_mesh(MeshOptions(data=8, model=2))
    with pytest.raises(ValueError, match="batch_size: expected a multiple of 8 .* got 12"):
        check_batch_size("batch_size", 12, make_mesh(MeshOptions(model=2)), accumulate=2)


def test_place_batch_cuts_rows():
    mesh = make_mesh(MeshOptions())
    rows = np.arange(32, dtype=np.int32).reshape(16, 2)
    placed = place_batch({"rows": rows}, mesh)["rows"]
    np.testing.assert_array_equal(placed, rows)
    assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 2)}


def test_replicate_puts_the_whole_tree_on_every_device():
    tree = {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3), "scale": np.float32(2)}
    placed = replicate(tree, make_mesh(MeshOptions(model=2)))
    assert set(placed) == set(tree)
    for name, array in placed.items():
        assert len(array.addressable_shards) == 8 and array.dtype == np.float32
        for shard in array.addressable_shards:
            np.testing.assert_array_equal(shard.data, tree[name])


def test_pad_rows_repeats_the_last_row():
    arrays = {"image": np.arange(12, dtype=np.uint8).reshape(3, 2, 2), "label": np.array([5, 6, 7], np.int32)}
    padded = pad_rows(arrays, 5)
    np.testing.assert_array_equal(padded["label"], [5, 6, 7, 7, 7])
    np.testing.assert_array_equal(padded["image"][:3], arrays["image"])
    np.testing.assert_array_equal(padded["image"][3:], [arrays["image"][2]] * 2)
    assert padded["image"].dtype == np.uint8 and padded["label"].dtype == np.int32
    assert pad_rows(arrays["label"], 3) is arrays["label"]
    for count in (0, 4):
        with pytest.raises(ValueError, match=f"arrays: expected 1 to 3 rows, got {count}"):
            pad_rows(np.zeros((count, 2)), 3)


MESHES = {
    "one": {"data": 1, "model": 8},  # the batch on every device; the kernel in eight shards
    "data": {"data": 8},
    "both": {"data": 4, "model": 2},
    "fsdp": {"data": 4, "model": 2, "fsdp": True},
}
# Sharding of the hidden layer's kernel.
SPECS = {"one": P(None, "model"), "data": P(None, None), "both": P(None, "model"), "fsdp": P("data", "model")}


@pytest.mark.full
@pytest.mark.parametrize("names", [("fsdp",), pytest.param(("data", "both"), marks=pytest.mark.full)])
def test_loss_curve_does_not_depend_on_the_mesh(names: tuple[str, ...], tmp_path: Path):
    """The hidden layer is large enough to be sharded; mixing pairs rows of different devices."""
    curves, kernels = {}, {}
    for name in ("one", *names):
        state = toy_train(str(tmp_path / name), num_steps=6, mesh=MESHES[name], width=512, checkpoint_steps=0).state
        curves[name] = [row["loss"] for row in read_rows(tmp_path / name) if row["kind"] == "train"]
        kernels[name] = state.params["layers"]["0"]["kernel"]
        assert kernels[name].sharding.spec == SPECS[name]
    for name in names:
        np.testing.assert_allclose(curves[name], curves["one"], rtol=2e-5, err_msg=name)
        np.testing.assert_allclose(kernels[name], kernels["one"], atol=2e-5, err_msg=name)
    assert len(curves["one"]) == 6 and np.ptp(curves["one"]) > 0.05


def test_accumulation_equals_one_large_batch(tmp_path):
    """Without mixing and noise, whose keys differ by part; every part is spread over the devices."""
    curves = []
    for parts in (1, 2):
        folder = tmp_path / str(parts)
        toy_train(
            str(folder), num_steps=5, accumulate=parts, mixing=False, noise=0.0, mesh={"data": 8}, checkpoint_steps=0
        )
        curves.append([row["loss"] for row in read_rows(folder) if row["kind"] == "train"])
    np.testing.assert_allclose(curves[0], curves[1], rtol=1e-5)
    assert jax.device_count() == 8 and len(curves[0]) == 5
