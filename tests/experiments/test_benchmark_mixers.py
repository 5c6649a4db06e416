import csv
import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from experiments import benchmark_mixers, mixer_goals
from experiments.kernel_cases import with_gradients
from experiments.kernel_shapes import CROSSOVER, LAYERS, KernelShape
from experiments.mixer_contenders import (
    CONTENDERS,
    SCOPES,
    bind,
    build,
    bytes_moved,
    columns_of,
    draw_inputs,
    reason_against,
)
from experiments.mixer_measurement import COLUMNS, Case, MixerBenchmark, checked_part, compare
from tests.tolerances import assert_close

TINY = KernelShape("tiny", 2, 3, 4, 8, rank=4)
XLA = CONTENDERS["xla"]
SEPARATE = dataclasses.replace(CONTENDERS["separate"], implementation="xla")
NORMALISED = dataclasses.replace(CONTENDERS["separate_normalised"], implementation="xla")


@pytest.fixture(autouse=True)
def usual_promotion():
    """A 16-bit proxy's gradient is summed in float32, which strict promotion takes for a mistake."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def test_dry_form_writes_every_case_and_no_device_time(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    path, names = tmp_path / "out.csv", "flash_attention,xla,linear_attention"
    flags = (f"--out={path}", f"--table={tmp_path / 'table.md'}", "--seed=1", f"--contenders={names}", "--repeats=3")
    assert benchmark_mixers.main([*flags, "--passes=forward", "--scopes=mixer"]) == 0
    lines = path.read_text().splitlines()
    about = dict(line.removeprefix("# ").split(": ", 1) for line in lines if line.startswith("# "))
    assert about["kind"].startswith("DRY") and about["seed"] == "1"
    assert about["command"].startswith("python -m experiments.benchmark_mixers --out=out.csv --table=table.md --seed=1")
    rows = list(csv.DictReader(line for line in lines if not line.startswith("#")))
    found = {row["implementation"]: row for row in rows if row["pass"] == "forward"}
    assert found["xla"]["status"] == found["linear_attention"]["status"] == "dry"
    assert found["flash_attention"]["note"] == "cuDNN needs a GPU"
    assert not any(row["median_ms"] or row["gb_per_s"] or row["share"] for row in rows)
    assert found["xla"]["tokens"] == "12" and float(found["xla"]["compiled_mib"]) >= 0
    assert sum("goal not measured" in line for line in lines) == 6
    assert "| 1152 | 32 | not measured |" in (tmp_path / "table.md").read_text()
    assert "No GPU here: a dry run" in capsys.readouterr().out


def test_interpreted_kernels_pass_the_gate(tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    flags = ("--correctness_only", "--contenders=low_rank_on_chip", "--passes=forward", "--scopes=mixer")
    assert benchmark_mixers.main([f"--out={tmp_path / 'out.csv'}", *flags]) == 0
    (line,) = [line for line in (tmp_path / "out.csv").read_text().splitlines() if line.startswith("width1152_16")]
    assert ",low_rank_on_chip,right," in line and "forward, whole" in line


def test_separate_scans_are_the_propagation():
    """In float32: no rounding hides an error."""
    x, maps, merge, _ = jax.tree.map(
        lambda array: array.astype(jnp.float32), draw_inputs(NORMALISED, TINY, "maps", jax.random.key(0))
    )
    whole = tuple(jnp.concatenate(arrays, axis=3) for arrays in zip(*maps, strict=True))
    want = jax.jit(bind(XLA, TINY, "maps"))(x, whole, merge)
    for contender in (SEPARATE, NORMALISED):
        assert_close(jax.jit(bind(contender, TINY, "maps"))(x, maps, merge), want)


def test_scopes_are_parts_of_the_mixer():
    parameters, x, _ = draw_inputs(XLA, TINY, "mixer", jax.random.key(0))

    @jax.jit
    def run(parameters, x):
        mixer = nnx.merge(build(XLA, TINY)[0], parameters)
        y = bind(SEPARATE, TINY, "proxy")(x, mixer.proxy(x), columns_of(mixer, TINY.channels), mixer.merge[...])
        return y, bind(XLA, TINY, "mixer")(parameters, x)

    assert_close(*run(parameters, x))


def test_gate_sees_each_gradient_and_errors_in_its_part(monkeypatch):
    monkeypatch.setattr("experiments.mixer_measurement.MOST_VALUES", 3 * 4 * 4)
    assert checked_part(TINY) == (1, 4)
    case, given = Case(NORMALISED, TINY, "mixer", "both"), draw_inputs(XLA, TINY, "mixer", jax.random.key(0))
    right = jax.jit(with_gradients(bind(NORMALISED, TINY, "mixer")))

    def verdict(change):
        return compare(case, lambda *inputs: change(*right(*inputs)), given)

    passed = verdict(lambda y, gradients: (y, gradients))
    assert passed.passed and passed.checked == "both, last 1 of 2 images, last 4 of 8 channels"
    assert verdict(lambda y, gradients: (y.at[0].add(1), gradients)).passed
    assert verdict(lambda y, gradients: (y.at[-1, 0, 0, -1].add(1), gradients)).reason.startswith("y: RMS ratio")
    wrong = verdict(lambda y, gradients: (y, (gradients[0], 1.05 * gradients[1])))
    assert wrong.reason.startswith("gradient of x: RMS ratio 0.0") and not wrong.passed
    for index, name in enumerate(("gate", "lam", "logits", "merge", "proxy", "skip")):

        def change(y, gradients, index=index):
            leaves, tree = jax.tree.flatten(gradients[0])
            leaves[index] = 1.05 * leaves[index]
            return y, (tree.unflatten(leaves), gradients[1])

        assert verdict(change).reason.startswith(f"gradient of {name}")


def test_a_wrong_mixer_is_refused_and_not_timed(tmp_path, monkeypatch):
    wrong = SEPARATE
    monkeypatch.setattr("experiments.mixer_contenders.four_scans", lambda contender, chunk, x, maps, merge: 1.1 * x)
    monkeypatch.setattr(MixerBenchmark, "is_reference", lambda self, case: False)
    with open(tmp_path / "out.csv", "w") as file:
        benchmark = MixerBenchmark(file, clock="host", dry=True, runs=3, seed=0)
        benchmark.time_all(benchmark_mixers.make_cases([TINY], [wrong], passes=["forward"], scopes=SCOPES))
    assert [row["status"] for row in benchmark.rows] == ["WRONG", "refused", "refused", "refused"]
    assert "is above 0.004" in benchmark.rows[1]["note"]


def test_bytes_by_hand():
    pixels, parameters = 2 * 3 * 4, 8 * 4 + 4 * 8 * (12 + 3 * 4) + 4
    assert bytes_moved(XLA, TINY, "mixer", "forward") == 2 * (2 * pixels * 8 + parameters)
    assert bytes_moved(XLA, TINY, "mixer", "both") == 2 * (5 * pixels * 8 + 3 * parameters)
    maps = pixels * 8 * (12 + 3 * 4)
    for name in ("fused", "separate"):
        assert bytes_moved(CONTENDERS[name], TINY, "maps", "forward") == 2 * (2 * pixels * 8 + maps + 4)
    assert bytes_moved(CONTENDERS["linear_attention"], TINY, "mixer", "forward") == 2 * (16 * pixels + 8 * 64 * 4)


def test_what_cannot_run_says_why(monkeypatch):
    monkeypatch.setattr("pallas_kernels.implementations", lambda: {"mosaic": None, "xla": None})
    large = next(shape for shape in LAYERS if shape.name == "sdxl_16k_level1")
    assert reason_against(CONTENDERS["low_rank"], TINY, "maps", "forward") == "makes the maps itself"
    assert reason_against(CONTENDERS["fused"], large, "mixer", "both") is None
    assert reason_against(CONTENDERS["fused_on_chip"], TINY, "mixer", "both") is None
    assert reason_against(CONTENDERS["fused_on_chip"], large, "mixer", "both")
    assert "its scores take" in (reason_against(CONTENDERS["softmax_attention"], large, "mixer", "forward") or "")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert reason_against(CONTENDERS["flash_attention"], large, "mixer", "forward") is None
    assert "Pflop" in (reason_against(CONTENDERS["flash_attention"], large, "mixer", "both") or "")


def test_order_and_shapes():
    shapes = {shape.name: shape for shape in (*LAYERS, *CROSSOVER)}
    assert set(mixer_goals.GOAL_SHAPES) <= set(shapes) and all(shape.rank for shape in shapes.values())
    wide = shapes[mixer_goals.WIDE]
    assert (wide.batch, wide.height, wide.width, wide.channels, wide.rank) == (32, 16, 16, 1152, 72)
    listed = {(s.channels, s.height) for s in shapes.values() if s.height == s.width
              and mixer_goals.CROSSOVER_BATCH.get(s.channels) == s.batch}  # fmt: skip
    assert listed >= {(width, side) for width in (640, 1152, 1280) for side in (8, 16, 32, 64, 128)}
    cases = benchmark_mixers.make_cases(list(shapes.values()), list(CONTENDERS.values()))
    names = list(dict.fromkeys(case.shape.name for case in cases))
    assert set(names[:4]) == set(mixer_goals.GOAL_SHAPES) and names[4].startswith("width")
    assert [case.contender.name for case in cases[:2]] == ["table", "flash_attention"] and len(cases) == len(set(cases))


def row(shape, implementation, median_ms, *, scope="mixer", pass_="forward"):
    known = {one.name: one for one in (*LAYERS, *CROSSOVER)}[shape]
    columns = {**dict.fromkeys(COLUMNS), "shape": shape, "scope": scope, "pass": pass_, "median_ms": median_ms}
    columns |= {"batch": known.batch, "height": known.height, "width": known.width, "channels": known.channels}
    return {**columns, "implementation": implementation, "status": "timed"}


def both(shape, gspn, flash, **options):
    return [row(shape, "table", gspn, **options), row(shape, "flash_attention", flash, **options)]


def test_goals_on_made_up_rows():
    wide, narrow = mixer_goals.WIDE, mixer_goals.NARROW
    rows = [row(shape, "separate_normalised", 1.7, scope="maps") for shape in (wide, narrow)]
    rows += [row(wide, "fused", 1.0, scope="maps"), row(narrow, "fused", 1.1, scope="maps")]
    rows += [row(narrow, "fused", 2.4, scope="proxy"), row(narrow, "low_rank", 1.0, scope="proxy")]
    rows += [row(wide, "fused", 1.9, scope="proxy"), row(wide, "low_rank_on_chip", 1.0, scope="proxy")]
    rows += both(wide, 1.0, 1.0, pass_="both")
    rows += [*both("width640_8", 2.0, 1.0), *both("width640_32", 1.0, 1.1), *both("width1152_16", 1.0, 2.0)]
    rows += [*both("sdxl_16k_level1", 30.0, 3000.0), *both("sdxl_16k_level2", 15.0, 2000.0)]
    rows += [row(wide, "low_rank", None, scope="proxy")]
    lines = mixer_goals.evaluate(rows)
    assert [line.split(":")[0] for line in lines] == ["NOT met", "met", "NOT met", "met", "met", "met"]
    assert "worst of 2 1.55 times (gspn_t_stage1)" in lines[0] and "1.90 times" in lines[2]
    assert "32 tokens a side (width 640)" in lines[4]
    assert "125.0 times (1.5e+05 ms against 1200 ms)" in lines[5]
    assert {line.split(":")[0] for line in mixer_goals.evaluate([])} == {"not measured"}
    slower = mixer_goals.evaluate([*both("width640_32", 2.0, 1.0), *both("width640_16", 1.0, 2.0)])
    assert slower[4].startswith("NOT met") and "inf tokens a side" in slower[4]


def test_crossover_is_where_it_stays_faster():
    assert mixer_goals.crossover({8: (1, 2), 16: (2, 1), 32: (1, 2), 64: (1, 9)}) == 32
    assert mixer_goals.crossover({8: (1, 2)}) == 8 and mixer_goals.crossover({8: (2, 2)}) == float("inf")
    rows = [*both("width640_16", 2.0, 1.0), *both("sdxl_1k_level1", 1.0, 4.0), *both("sdxl_wide_1k_level1", 9.0, 1.0)]
    table = mixer_goals.crossover_table([*rows, *both("width1280_8", 2.0, 1.0)]).splitlines()
    assert table[0] == "| width | batch | 8 x 8 | 16 x 16 | 64 x 64 | GSPN faster from |"
    assert table[2] == "| 640 | 2 |  | 2 / 1 | 1 / 4 | 64 x 64 |"
    assert table[3] == "| 1152 | 32 |  |  |  | not measured |"
    assert table[4] == "| 1280 | 2 | 2 / 1 |  |  | none measured |"
