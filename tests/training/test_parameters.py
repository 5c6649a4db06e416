"""Parameters are read and written without a run: averages, numbers that are not finite, earlier versions."""

import json
import tarfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from gspn_jax.training import CheckpointError, load_both, load_parameters, save_parameters
from gspn_jax.training.checkpoints import record as records
from gspn_jax.training.checkpoints.fingerprint import finite, sha256_of_arrays
from gspn_jax.training.checkpoints.folder import Checkpoints
from gspn_jax.training.metrics import read_rows
from tests.training.toy import digest, toy_train

PARAMS = {"head": {"kernel": np.full((4, 3), 2.0, np.float32), "bias": np.ones(3, np.float32)}}


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 8 steps that version 0.1 trained and that was killed after its checkpoint of step 4."""
    folder = tmp_path_factory.mktemp("earlier")
    with tarfile.open(Path(__file__).parent / "version_0_1.tar.gz") as file:
        file.extractall(folder, filter="data")
    return folder / "run"


def test_saved_parameters_come_back_with_their_description(tmp_path: Path):
    save_parameters(tmp_path / "converted", PARAMS, {"model": {"name": "x", "widths": (8, 16)}})
    params, description = load_parameters(tmp_path / "converted")
    assert digest(params) == digest(PARAMS)
    assert description == {"model": {"name": "x", "widths": [8, 16]}, "step": 0, "ema": False}
    both = load_both(tmp_path / "converted")
    assert digest(both[0]) == digest(PARAMS) and both[1] is None and both[2] == description
    written = json.loads((tmp_path / "converted" / "config.json").read_text())
    assert written == {"model": {"name": "x", "widths": [8, 16]}}
    with pytest.raises(CheckpointError, match="holds checkpoints already"):
        save_parameters(tmp_path / "converted", PARAMS, {})


def test_parameters_and_their_average_are_read_at_once(
    earlier: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    raw, first = load_parameters(earlier, 4, ema=False)
    average, second = load_parameters(earlier)
    assert (first["ema"], second["ema"], first["step"], second["step"]) == (False, True, 4, 4)
    read, steps = Checkpoints._read, []
    monkeypatch.setattr(Checkpoints, "_read", lambda self, step, wanted: steps.append(step) or read(self, step, wanted))
    params, ema, description = load_both(earlier)
    assert steps == [4] and description == second
    assert digest(params) == digest(raw) != digest(average) == digest(ema)
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 9 .* expected one of \[4\]"):
        load_parameters(earlier, 9)
    with pytest.raises(CheckpointError, match="no checkpoints under"):
        load_both(earlier / "nothing")
    with pytest.raises(ValueError, match="workdir: expected the name of a folder"):
        load_parameters("")


def test_a_run_of_version_0_1_goes_on(earlier: Path):
    """Its checkpoint says "meta" where this version says "description"; the numbers are those that 0.1 went on to."""
    _, description = load_parameters(earlier)
    assert description == {"config": {"seed": 0}, "step": 4, "ema": True}
    result = toy_train(str(earlier), num_steps=8, checkpoint_steps=4, width=4, mixing=False)
    assert result.evaluation["loss"] == pytest.approx(1.8926729, rel=1e-5)
    assert result.evaluation["ema_loss"] == pytest.approx(1.8979894, rel=1e-5)
    losses = [row["loss"] for row in read_rows(earlier) if row["kind"] == "train"]
    want = [1.7583271, 1.9636637, 1.8403825, 1.9407363, 2.0751998, 1.7119205, 1.917186, 1.7547232]
    np.testing.assert_allclose(losses, want, rtol=1e-5)
    assert load_parameters(earlier)[1] == {"config": {"seed": 0}, "step": 8, "ema": True}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_numbers_that_are_not_finite_are_not_written(value: float, dtype: Any, tmp_path: Path):
    kernel = PARAMS["head"]["kernel"].astype(dtype)
    kernel[1, 2] = value
    with pytest.raises(ValueError, match="params: expected finite numbers, got NaN or Inf in head/kernel$"):
        save_parameters(tmp_path / "run", {"head": {"kernel": kernel, "bias": PARAMS["head"]["bias"]}}, {})
    assert not (tmp_path / "run").exists()


def test_numbers_that_are_not_finite_are_not_read(tmp_path: Path):
    """Such a checkpoint can come from an earlier version."""
    bad = {"head": {"kernel": np.full((4, 3), np.nan, np.float32), "bias": np.ones(3, np.float32)}}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save_parameters(bad, {})
    checkpoints.close()
    for load in (load_parameters, load_both):
        with pytest.raises(CheckpointError, match=r"can be read \(step 0: NaN or Inf in params/head/kernel\)"):
            load(tmp_path)


def test_finite_tells_for_each_array():
    tree = {"a": jnp.array([1.0, jnp.nan]), "b": jnp.ones(2, jnp.bfloat16), "c": jnp.array([1]), "d": {"e": jnp.inf}}
    assert jax.device_get(finite(jax.tree.map(jnp.asarray, tree))) == {"a": False, "b": True, "d/e": False}


def test_json_never_holds_nan(tmp_path: Path):
    description = {"config": {"optimizer": {"warmup_epochs": float("nan"), "b1": 0.9}}}
    with pytest.raises(ValueError, match="description: expected finite .* in config.optimizer.warmup_epochs$"):
        save_parameters(tmp_path / "run", PARAMS, description)
    with pytest.raises(ValueError, match="description: expected finite"):
        toy_train(str(tmp_path / "run"), config={"values": [1.0, float("inf")]})
    assert not (tmp_path / "run").exists()
    assert records.plain({"a": (1, 2.5)}, "x") == {"a": [1, 2.5]}


def test_hash_of_arrays_sees_order_and_values():
    first, second = np.arange(3.0), np.ones(2)
    known = sha256_of_arrays([first, second])
    assert known == sha256_of_arrays({"a": first, "b": second})
    assert known != sha256_of_arrays([second, first]) and len(known) == 64
