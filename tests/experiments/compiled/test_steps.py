import jax
import jax.numpy as jnp
import pytest

from experiments import deviceless, step_report
from experiments.step_cases import Model, Setting, Variant
from experiments.step_parts import KERNELS, MAPS, WHOLE
from experiments.step_report import Case
from gspn_jax import models
from gspn_jax.training import Classification, OptimizerOptions

compiles = pytest.mark.skipif(deviceless.missing() is not None, reason=str(deviceless.missing()))


def test_blocks_that_keep_no_states_are_compiled_as_they_are():
    of_one = [str(case) for case in step_report.cases("gspn_xl2 low_rank")]
    assert of_one == ["gspn_xl2 low_rank kept", "gspn_xl2 low_rank remat", "gspn_xl2 low_rank_h_again kept"]
    assert list(map(str, step_report.cases("dit_xl2"))) == ["dit_xl2 xla kept", "dit_xl2 xla remat"]


@pytest.mark.parametrize("name", ["gspn_xl2", "dit_xl2"])
def test_generators_learn_a_variance(name):
    setting = step_report.MODELS[name].setting(Variant("xla"), True, 2)
    params = jax.eval_shape(setting.task.init, jax.random.key(0))
    with jax.numpy_dtype_promotion("standard"):  # flax's layers mix dtypes
        loss, parts = jax.eval_shape(setting.task.loss, params, setting.batch, jax.random.key(0))
    assert loss.shape == () and set(parts) == {"mse", "vb"} and setting.batch["mean"].shape == (2, 32, 32, 4)
    assert setting.optimizer.learning_rate == 2e-4 and setting.optimizer.clip == 1


def test_what_does_not_compile_is_a_row_and_other_steps_stay(monkeypatch, tmp_path):
    def refuse(setting):
        raise ValueError("no memory\nfor it")

    monkeypatch.setattr(step_report, "compile_step", refuse)
    (row,) = step_report.run(step_report.cases("gspn_t xla kept"), str(tmp_path))
    assert row["fault"] == "ValueError: no memory for it" and row["batch"] == 128
    assert "no memory for it" in (tmp_path / "step_report.md").read_text()
    for case in ("gspn_t fused kept", "gspn_t low_rank remat", "gspn_t fused kept"):
        step_report.run(step_report.cases(case), str(tmp_path))
    rows = step_report._read(tmp_path / "step_report.csv")
    assert [(row["variant"], row["batch"]) for row in rows] == [("xla", 128), ("fused", 128), ("low_rank", 128)]


def one_block(variant: Variant, remat: bool, batch_size: int) -> Setting:
    def build(rngs):
        options = dict(
            widths=(16,), depths=(1,), global_stages=(0,), stem_stride=1, dtype=jnp.dtype("bfloat16"), remat=remat
        )
        return models.build("gspn_nano", num_classes=10, rngs=rngs, **options, **variant.options)

    batch = {
        "image": jax.ShapeDtypeStruct((batch_size, 8, 8, 3), jnp.uint8),
        "label": jax.ShapeDtypeStruct((batch_size,), jnp.int32),
    }
    return Setting(Classification(build, num_classes=10, mean=(0, 0, 0), std=(1, 1, 1)), OptimizerOptions(), batch)


@compiles
def test_report_of_a_tiny_model(monkeypatch, tmp_path):
    monkeypatch.setitem(step_report.MODELS, "tiny", Model(2, one_block))
    # flax's layers mix float32 parameters with bfloat16 maps by the usual promotion.
    with jax.numpy_dtype_promotion("standard"):
        whole, *parts = rows = step_report.run([Case("tiny", "fused", "kept")], str(tmp_path))
    by_part = {row["part"]: row for row in parts}
    assert whole["part"] == WHOLE and whole["fault"] == ""
    assert whole["launches"] == sum(row["launches"] for row in parts)
    assert sum(row["share"] for row in parts) == pytest.approx(1, abs=0.01)
    # Parameters, their average and both moments are donated: new are a few numbers and the places of all.
    assert 0 < whole["output_bytes"] - whole["alias_bytes"] < 0.1 * whole["output_bytes"]
    assert whole["peak_bytes"] > whole["argument_bytes"] > 0
    assert by_part[KERNELS]["launches"] == 2 * 4 and by_part[MAPS]["flops"] > 0
    assert by_part["depthwise convolution"]["flops"] > 0 and by_part["MLP"]["flops"] > 0
    assert step_report._read(tmp_path / "step_report.csv") == rows
    assert "# note: Compiled, not executed" in (tmp_path / "step_report.csv").read_text()
    assert "not executed" in (tmp_path / "step_report.md").read_text().splitlines()[0]
