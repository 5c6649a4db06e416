"""Runs that version 0.1 wrote: they load, compute the same, and go on.

version_0_1.tar.xz holds a classifier and a generator after 2 of 4 steps on the digits, as version 0.1 saved them:

    python -m experiments.train --config=configs/classifier.py:digits --workdir=classifier --config.steps=4
        --config.batch_size=16 --config.intervals.checkpoint_epochs=0.0225 --config.intervals.log_steps=1
        --config.intervals.evaluate_epochs=0 --config.model.widths="(8,16)" --config.model.depths="(1,1)"
        --config.model.global_stages="(1,)" --config.model.proxy_rank=2
    python -m experiments.train --config=configs/generator.py:digits --workdir=generator (the same first four)
        --config.model.width=16 --config.model.depth=2 --config.model.global_blocks="(0,1,2)"

version_0_1.npz holds what version 0.1 computed with them, after 2 steps and after 4.
"""

import tarfile
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from configs import classifier, generator
from experiments import train
from gspn_jax import load_run

HERE = Path(__file__).parent
EXPECTED = np.load(HERE / "version_0_1.npz")


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    with tarfile.open(HERE / "version_0_1.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


@pytest.mark.full
@pytest.mark.parametrize("parameters", ["ema", "raw"])
def test_a_classifier_computes_the_same(runs: Path, parameters: str):
    run = load_run(runs / "classifier", parameters=parameters)
    assert (run.description["task"], run.step, run.parameters) == ("classification", 2, parameters)
    logits = run.model(run.preprocess(EXPECTED["images"]))
    np.testing.assert_allclose(logits, EXPECTED[f"logits_2_{parameters}"], rtol=1e-5, atol=1e-6)


@pytest.mark.full
def test_a_generator_computes_the_same(runs: Path):
    run = load_run(runs / "generator")
    inputs = (jnp.asarray(EXPECTED[name]) for name in ("x", "time", "label"))
    np.testing.assert_allclose(run.task.denoise(run.params, *inputs), EXPECTED["velocity_2_ema"], rtol=1e-4, atol=1e-6)
    drawn = run.sample(np.arange(4), num_steps=3, guidance=1.5)
    assert np.abs(drawn.astype(int) - EXPECTED["drawn_2_ema"]).max() <= 1


OPTIONS: dict[str, dict[str, Any]] = {
    "classifier": {
        "model.widths": (8, 16),
        "model.depths": (1, 1),
        "model.global_stages": (1,),
        "model.proxy_rank": 2,
    },
    "generator": {"model.width": 16, "model.depth": 2, "model.global_blocks": (0, 1, 2)},
}


@pytest.mark.full
@pytest.mark.parametrize("name", list(OPTIONS))
def test_an_interrupted_run_goes_on(runs: Path, name: str):
    config = {"classifier": classifier, "generator": generator}[name].get_config("digits")
    intervals = {"checkpoint_epochs": 0.0225, "log_steps": 1, "evaluate_epochs": 0.0}
    config.update({"steps": 4, "batch_size": 16, "intervals": intervals})
    config.update_from_flattened_dict(OPTIONS[name])
    train.run(config, str(runs / name))
    run = load_run(runs / name, parameters="raw")
    assert run.step == 4
    if name == "classifier":
        got, want = run.model(run.preprocess(EXPECTED["images"])), EXPECTED["logits_4_raw"]
        before = EXPECTED["logits_2_raw"]
    else:
        got = run.task.denoise(run.params, *(jnp.asarray(EXPECTED[key]) for key in ("x", "time", "label")))
        want, before = EXPECTED["velocity_4_raw"], EXPECTED["velocity_2_raw"]
    # Two steps move the outputs; the rounding of eight devices instead of one moves them far less.
    assert np.abs(got - want).max() < 0.02 * np.abs(want - before).max()
