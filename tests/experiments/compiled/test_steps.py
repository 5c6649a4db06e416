import jax
import jax.numpy as jnp
import pytest

from experiments import tables
from experiments.compiled import steps
from experiments.compiled.report import Report
from experiments.compiled.steps import COLUMNS, NOTE, ORDER, Model, Propagation, Setting, Step
from gspn_jax import models
from gspn_jax.training import Classification, OptimizerOptions
from pallas_kernels.mosaic import compile_only

compiles = pytest.mark.skipif(compile_only.missing() is not None, reason=str(compile_only.missing()))
REPORT = Report(steps.compile_rows, COLUMNS, ORDER, steps.page, NOTE)


def some(only):
    return [step for step in steps.steps() if only in str(step)]


def test_steps_of_the_report():
    listed = list(map(str, some("gspn_xl2 low_rank")))
    assert listed == ["gspn_xl2 low_rank kept", "gspn_xl2 low_rank remat", "gspn_xl2 low_rank_h_again kept"]
    assert list(map(str, some("dit_xl2"))) == ["dit_xl2 xla kept", "dit_xl2 xla remat"]


@pytest.mark.parametrize("name", ["gspn_xl2", "dit_xl2"])
def test_generators_learn_a_variance(name):
    setting = steps.MODELS[name].setting(Propagation("xla"), True, 2)
    params = jax.eval_shape(setting.task.init, jax.random.key(0))
    with jax.numpy_dtype_promotion("standard"):  # flax's layers mix dtypes
        loss, parts = jax.eval_shape(setting.task.loss, params, setting.batch, jax.random.key(0))
    assert loss.shape == () and set(parts) == {"mse", "vb"} and setting.batch["mean"].shape == (2, 32, 32, 4)
    assert setting.optimizer.learning_rate == 2e-4 and setting.optimizer.clip == 1


def test_a_step_that_does_not_compile_is_a_row_and_other_steps_stay(monkeypatch, tmp_path):
    def refuse(setting):
        raise ValueError("no memory\nfor it")

    monkeypatch.setattr(steps, "compile_step", refuse)
    monkeypatch.setattr(compile_only, "missing", lambda: None)
    monkeypatch.setattr(compile_only, "assembler_version", lambda: "none")
    (row,) = REPORT.run(some("gspn_t xla kept"), str(tmp_path / "step_report"))
    assert row["fault"] == "ValueError: no memory for it" and row["batch"] == 128
    assert "no memory for it" in (tmp_path / "step_report.md").read_text()
    for only in ("gspn_t scans kept", "gspn_t low_rank remat", "gspn_t scans kept"):
        REPORT.run(some(only), str(tmp_path / "step_report"))
    _, rows = tables.read(tmp_path / "step_report.csv")
    assert [(row["variant"], row["batch"]) for row in rows] == [("xla", "128"), ("scans", "128"), ("low_rank", "128")]


def one_block(propagation: Propagation, remat: bool, batch_size: int) -> Setting:
    def build(rngs):
        options = dict(
            widths=(16,), depths=(1,), global_stages=(0,), stem_stride=1, dtype=jnp.dtype("bfloat16"), remat=remat
        )
        return models.create_model("gspn_nano", num_classes=10, rngs=rngs, **options, **propagation._asdict())

    batch = {
        "image": jax.ShapeDtypeStruct((batch_size, 8, 8, 3), jnp.uint8),
        "label": jax.ShapeDtypeStruct((batch_size,), jnp.int32),
    }
    return Setting(Classification(build, num_classes=10, mean=(0, 0, 0), std=(1, 1, 1)), OptimizerOptions(), batch)


@pytest.mark.full
@compiles
def test_report_of_a_tiny_model(monkeypatch, tmp_path):
    monkeypatch.setitem(steps.MODELS, "tiny", Model(2, one_block))
    # flax's layers mix float32 parameters with bfloat16 maps by the usual promotion.
    with jax.numpy_dtype_promotion("standard"):
        (row,) = REPORT.run([Step("tiny", "scans", "kept")], str(tmp_path / "step_report"))
    assert row["fault"] == "" and row["launches"] > 2 * 4 and row["flops"] > 0
    # Parameters, their average and both moments are donated: new are a few numbers and the places of all.
    assert 0 < row["output_bytes"] - row["alias_bytes"] < 0.1 * row["output_bytes"]
    assert row["peak_bytes"] > row["argument_bytes"] > 0
    assert row["least_ms"] >= 1e3 * row["bytes"] / 4.3e12 * 0.999
    about, (written,) = tables.read(tmp_path / "step_report.csv")
    assert written == {key: str(row[key]) for key in COLUMNS} and about["note"].startswith("Compiled, not executed")
    assert "| tiny scans kept | 2 |" in (tmp_path / "step_report.md").read_text()
