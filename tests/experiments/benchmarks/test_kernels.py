import csv
import dataclasses
import math
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.profiler import ProfileData

from experiments import benchmark_kernels, device_time, kernel_goals, plot_kernels
from experiments.kernel_cases import Case, arguments, make_cases, program, shrink
from experiments.kernel_contenders import CONTENDERS, bytes_moved, draw_inputs, reason_against
from experiments.kernel_gate import MOST_VALUES, TOLERANCES, check, checked_part
from experiments.kernel_measurement import COLUMNS, Benchmark
from experiments.kernel_shapes import GROUPS, SHAPES, KernelShape, select
from gspn_jax import models
from pallas_kernels import record_choices
from tests import tolerances
from tests.test_layout import REPOSITORY

TINY = KernelShape("tiny", 2, 3, 4, 8)
XLA = CONTENDERS["xla"]


def wrong(*inputs, **options):
    return XLA.function(*inputs, **options) * 1.01


WRONG = dataclasses.replace(XLA, name="wrong", implementation="test", function=wrong)


@pytest.fixture
def available(monkeypatch):
    """Lets contenders of implementation "test" run."""
    known = {"xla": None, "test": None}
    monkeypatch.setattr("pallas_kernels.implementations", lambda: known)


def run(tmp_path, monkeypatch, *flags):
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    path = tmp_path / "out.csv"
    code = benchmark_kernels.main([f"--out={path}", "--seed=1", *flags])
    lines = path.read_text().splitlines()
    return code, lines, list(csv.DictReader(line for line in lines if not line.startswith("#")))


def test_dry_form_writes_every_case_and_no_device_time(tmp_path, monkeypatch, capsys):
    flags = ("--shapes=table1_64_b1_c768", "--directions=right", "--dtypes=bfloat16", "--sanitizer", "--repeats=3")
    flags += ("--implementations=mosaic,xla,flash_attention,linear_attention",)
    code, lines, rows = run(tmp_path, monkeypatch, *flags)
    assert code == 0
    about = dict(line.removeprefix("# ").split(": ", 1) for line in lines if line.startswith("# "))
    assert about["kind"].startswith("DRY") and about["seed"] == "1"
    assert about["command"].startswith("python -m experiments.benchmark_kernels --out=out.csv --seed=1")
    found = {(row["implementation"], row["pass"]): row for row in rows}
    for pass_ in ("forward", "backward", "both"):
        assert found["xla", pass_]["status"] == found["linear_attention", pass_]["status"] == "dry"
        assert found["flash_attention", pass_]["note"] == "cuDNN needs a GPU"
        assert ("mosaic_interpret", pass_) in found
    assert found["xla", "forward"]["bytes"] == str(1 * 9 * 11 * 16 * 6 * 2)
    assert all(row["status"] == "not run" for row in rows if row["pass"] == "memcheck")
    assert not any(row["median_ms"] or row["gb_per_s"] or row["share"] for row in rows)
    assert sum("goal not measured" in line for line in lines) == 7
    assert "No GPU here: a dry run" in capsys.readouterr().out


def test_what_the_budget_does_not_reach_is_named(tmp_path, monkeypatch):
    flags = ("--shapes=table1", "--directions=down", "--implementations=xla", "--budget_s=0", "--dtypes=float32")
    _, _, rows = run(tmp_path, monkeypatch, *flags)
    left = [row for row in rows if row["status"] == "left out"]
    assert len(left) == 4 * 3 and {row["note"] for row in left} == {"the budget was used up"}


def test_a_wrong_kernel_is_refused_and_not_timed(available, tmp_path):
    with open(tmp_path / "out.csv", "w") as file:
        benchmark = Benchmark(file, clock="host", dry=True, runs=3, seed=0)
        benchmark.time_all(make_cases([TINY], [WRONG], directions=["down"], dtypes=["float32"], passes=["forward"]))
    gate, row = benchmark.rows
    assert (gate["status"], gate["pass"], row["status"]) == ("WRONG", "gate", "refused")
    assert gate["error"] == pytest.approx(0.01, rel=0.01) and row["host_ms"] is None
    assert "is above 1e-06" in row["note"]


def verdict_of(function, dtype="float32", shape=TINY):
    contender = dataclasses.replace(WRONG, function=function)
    case = Case(contender, shape, "left", None, dtype, "both")
    inputs = draw_inputs(jax.random.key(0), "from_logits", shape, dtype, "left")
    return check(case, jax.jit(program(case)), inputs)


def test_gate_sees_each_gradient_and_not_a_number():
    @jax.custom_vjp
    def scan(x, logits, lam):
        return XLA.function(x, logits, lam, direction="left", chunk=None)

    def backward(residuals, gradient, scale):
        pulled = jax.vjp(lambda *inputs: XLA.function(*inputs, direction="left", chunk=None), *residuals)[1](gradient)
        return tuple(g * s for g, s in zip(pulled, scale, strict=True))

    for index, name in enumerate(("x", "weights", "lam")):
        scale = [1.0, 1.0, 1.0]
        scale[index] = 1.001
        scan.defvjp(lambda *inputs: (scan(*inputs), inputs), lambda r, g, scale=tuple(scale): backward(r, g, scale))
        verdict = verdict_of(lambda *inputs, **_: scan(*inputs))
        assert not verdict.passed and verdict.reason.startswith(f"gradient of {name}: RMS ratio 0.001")
    broken = verdict_of(lambda *inputs, **options: XLA.function(*inputs, **options) * jnp.nan)
    assert not broken.passed and "RMS ratio nan" in broken.reason
    assert verdict_of(lambda *inputs, **options: XLA.function(*inputs, **options), "bfloat16").passed


def test_gate_on_a_part_finds_an_error_in_it(monkeypatch):
    monkeypatch.setattr("experiments.kernel_gate.MOST_VALUES", 3 * 4 * 4)
    shape = KernelShape("cut", 3, 3, 4, 8, 4)
    verdict = verdict_of(XLA.function, shape=shape)
    assert verdict.passed and verdict.checked == "last 1 of 3 images, last 4 of 8 channels"
    assert not verdict_of(lambda *a, **o: XLA.function(*a, **o).at[-1, 0, 0, -1].add(1), shape=shape).passed
    assert verdict_of(lambda *a, **o: XLA.function(*a, **o).at[0, 0, 0, 0].add(1), shape=shape).passed


def test_large_maps_are_checked_in_part_and_the_goals_whole():
    parts = {shape.name: checked_part(shape) for shape in SHAPES}
    assert parts["gspn2_1024_b16_c8"] == (16, 8) and parts["compact_512_b1_c128"] == (1, 1)
    assert parts["gspn2_1024_b1_c1152"] == (1, 128) and parts["gspn2_1024_b256_c1"] == (128, 1)
    for shape in SHAPES:
        images, groups = parts[shape.name]
        values = images * shape.height * shape.width * groups * shape.channels // shape.weight_channels
        assert 0 < values <= MOST_VALUES


def test_tolerances_are_those_of_the_tests():
    assert {**TOLERANCES, "float64": 1e-12} == tolerances.TOLERANCES


def test_bytes_by_hand():
    shape = KernelShape("hand", 2, 3, 5, 8, 4)
    values, weights = 2 * 3 * 5 * 8, 2 * 3 * 5 * 3 * 4
    assert bytes_moved("from_logits", shape, "bfloat16", "forward") == 2 * (3 * values + weights)
    assert bytes_moved("from_logits", shape, "float32", "backward") == 4 * (6 * values + 2 * weights)
    assert bytes_moved("from_weights", shape, "bfloat16", "forward") == 2 * 3 * values + 4 * weights
    assert bytes_moved("from_weights", shape, "bfloat16", "both") == 2 * 9 * values + 4 * 3 * weights
    assert bytes_moved("softmax", shape, "float16", "both") == 12 * 2 * (2 * 3 * 5 * 64)
    full = KernelShape("full", 1, 1, 1, 1)
    assert [bytes_moved(kind, full, "bfloat16", "forward") for kind in ("from_logits", "from_weights")] == [12, 18]
    assert bytes_moved("from_logits", full, "bfloat16", "backward") == 24


@pytest.mark.parametrize("name", ["xla", "xla_weights", "softmax_attention", "linear_attention"])
def test_passes_agree_with_each_other(name):
    cases = make_cases([TINY], [CONTENDERS[name]], directions=["up"], dtypes=["float32"])
    inputs = draw_inputs(jax.random.key(0), CONTENDERS[name].operation, TINY, "float32", "up")
    forward, backward, both = (jax.jit(program(case))(*arguments(case, inputs)) for case in cases)
    tolerances.assert_close(forward, both[0])
    for one, other in zip(backward, both[1], strict=True):
        tolerances.assert_close(one, other, tolerance=1e-5)


def test_linear_attention_is_attention_by_the_feature_map():
    q, k, v, _ = draw_inputs(jax.random.key(0), "linear", TINY, "float32", "")
    scores = jnp.einsum("bnhd,bmhd->bhnm", jax.nn.elu(q) + 1, jax.nn.elu(k) + 1)
    want = jnp.einsum("bhnm,bmhd->bnhd", scores / jnp.sum(scores, axis=-1, keepdims=True), v)
    tolerances.assert_close(CONTENDERS["linear_attention"].function(q, k, v), want, tolerance=1e-5)


def test_attention_that_cannot_run_says_why(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    flash, softmax, large = CONTENDERS["flash_attention"], CONTENDERS["softmax_attention"], SHAPES[0]
    assert reason_against(flash, TINY, "bfloat16", "both") is None
    assert reason_against(flash, TINY, "float32", "both") == "cuDNN's flash attention takes 16-bit inputs"
    assert reason_against(flash, large, "bfloat16", "forward") == "too many tokens: 4.5 Pflop"
    assert reason_against(softmax, large, "bfloat16", "forward") == "too many tokens: its scores take 65536 GiB"


def test_order_of_cases():
    shapes = select(["table1", "gspn2_1024_b16_c8"])
    cases = make_cases(shapes, [CONTENDERS["mosaic"], XLA, CONTENDERS["linear_attention"]])
    assert len(cases) == len(set(cases)) == 5 * 2 * 3 * (4 + 4 + 1)
    goals = [case for case in cases if case.shape.name in kernel_goals.GOAL_SHAPES]
    assert cases[: len(goals)] == goals
    rest = cases[len(goals) :]
    assert [case.direction for case in rest if case.direction] == sorted(
        (case.direction for case in rest if case.direction), key=["down", "right", "up", "left"].index
    )
    assert {case.contender.name for case in rest[: 3 * 2 * 3]} == {"mosaic"}


@pytest.mark.parametrize("name", ["gspn_t", "gspn_s", "gspn_b"])
def test_classifier_shapes_are_those_of_the_model(name):
    model = nnx.eval_shape(lambda: models.build(name, num_classes=1000, rngs=nnx.Rngs(0)))
    with record_choices() as choices:
        nnx.eval_shape(lambda m, x: m(x), model, jax.ShapeDtypeStruct((128, 224, 224, 3), jnp.float32))
    listed = [((s.batch, s.height, s.width, s.channels), s.chunk) for s in GROUPS[name]]
    assert list(dict.fromkeys((choice.shape, choice.chunk) for choice in choices)) == listed


def test_other_shapes_follow_from_the_papers():
    assert [s.channels for s in GROUPS["generators"]] == [8 * math.ceil(width / 8) for width in (900, 1200, 1500)]
    images = {"1k": (1024, 1024), "wide_1k": (768, 1344), "2k": (2048, 2048), "4k": (4096, 4096), "8k": (8192, 8192)}
    images["16k"] = (8192, 16384)
    listed = {s.name: (s.height, s.width, s.channels) for s in GROUPS["sdxl"]}
    assert listed == {
        f"sdxl_{name}_level{level}": (height // 8 // 2**level, width // 8 // 2**level, 320 * 2**level)
        for name, (height, width) in images.items() for level in (1, 2)
    }  # fmt: skip
    assert len({s.name for s in SHAPES}) == len(SHAPES)
    assert all(s.channels % s.weight_channels == 0 for s in [*SHAPES, *map(shrink, SHAPES)])
    with pytest.raises(ValueError, match="shapes: expected some of gspn2, .*; got 'gspn3'"):
        select(["gspn3"])


def test_shapes_need_nothing_but_the_standard_library():
    code = "import sys; from experiments import kernel_shapes; sys.exit('jax' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY).returncode == 0


def test_benchmark_imports_jax_and_numpy_alone():
    code = (
        "import sys; from experiments import benchmark_kernels; "
        "sys.exit(str({'flax', 'absl', 'ml_collections', 'matplotlib'} & set(sys.modules) or ''))"
    )
    answer = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert not answer.stderr.strip(), answer.stderr


def trace(*events):
    """A trace of kernels (name, start, duration) in microseconds, with a second line that shows them again."""
    names = sorted({name for name, _, _ in events})
    listed = " ".join(
        f"events {{ metadata_id: {names.index(n) + 1} offset_ps: {int(s * 1e6)} duration_ps: {int(d * 1e6)} }}"
        for n, s, d in events
    )
    metadata = " ".join(
        f'event_metadata {{ key: {i} value {{ id: {i} name: "{n}" }} }}' for i, n in enumerate(names, 1)
    )
    lines = " ".join(f'lines {{ name: "{name}" {listed} }}' for name in ("Stream #13(Compute)", "XLA Ops"))
    return ProfileData.from_text_proto(f'planes {{ name: "/device:GPU:0" {lines} {metadata} }}')


def test_times_of_runs_in_a_trace():
    events = device_time.device_events(trace(("a", 1, 2), ("b", 4, 3), ("a", 10, 2), ("b", 12.5, 3.5)))
    assert device_time.run_times(events, 2) == pytest.approx([6000, 6000])
    assert device_time.run_times(device_time.device_events(trace(("a", 1, 2), ("a", 10, 3))), 2) == [2000, 3000]
    with pytest.raises(ValueError, match="4 device events do not divide into 3 equal runs"):
        device_time.run_times(events, 3)
    with pytest.raises(ValueError, match="do not divide"):
        device_time.run_times(device_time.device_events(trace(("a", 1, 2), ("b", 4, 3))), 2)
    with pytest.raises(ValueError, match=r"no device events in \{'/host:CPU': \[\]\}"):
        device_time.device_events(ProfileData.from_text_proto('planes { name: "/host:CPU" }'))


def test_clocks_where_there_is_no_gpu():
    """Fails first when JAX moves what the clocks read."""
    from jax.experimental.mosaic.gpu import profiler

    assert hasattr(profiler, "mosaic_gpu_lib")
    assert device_time.choose_clock()[0] == "host"
    program = jax.jit(lambda x: x + 1)
    for clock, reason in (("profiler", "no device events"), ("cupti", "extension is not installed|CUPTI")):
        timing = device_time.measure(lambda _: program(jnp.ones(8)), clock=clock, most_runs=3)
        assert timing.median_ms is None and timing.host_ms > 0 and re.search(reason, timing.clock)


def row(**values):
    columns = {**dict.fromkeys(COLUMNS), "status": "timed", "batch": 2, "height": 64, "width": 64, "channels": 640}
    columns |= {"weight_channels": 640, "direction": "down", "dtype": "bfloat16", "pass": "forward", "bytes": 10**8}
    columns |= {"implementation": "mosaic", "shape": "sdxl_1k_level1", "median_ms": 1.0, "host_ms": 1.0, "share": 0.95}
    return {**columns, **values}


def test_goals_take_the_worst_case():
    big = {"shape": "gspn2_1024_b16_c8", "channels": 8}
    rows = [row(), row(share=0.89), row(share=0.5, bytes=10**6), row(share=0.5, channels=8), row(**big, median_ms=0.4)]
    rows += [row(**big, implementation="xla", median_ms=12.0, host_ms=10.0)]
    rows += [row(shape="table1_64_b1_c768", direction=direction, median_ms=0.05) for direction in ("down", "left")]
    rows += [row(status="not run", median_ms=None, dtype="float32", **big)]
    lines = kernel_goals.evaluate(rows)
    assert [line.split(":")[0] for line in lines] == [
        "NOT met", "not measured", "met", "not measured", "met", "met", "not measured",
    ]  # fmt: skip
    assert "worst of 4 89.0% (sdxl_1k_level1 down bfloat16)" in lines[0]
    assert "25.0 times" in lines[5]


def test_figure_and_table(tmp_path, capsys):
    rows = [
        row(gb_per_s=4000.0),
        row(direction="right", median_ms=3.0),
        row(implementation="xla", median_ms=30.0, host_ms=20.0),
    ]
    rows += [row(implementation="flash_attention", direction="", median_ms=7.0)]
    rows += [row(shape="sdxl_16k_level1", height=512, width=1024, median_ms=9.0), row(status="failed", median_ms=None)]
    with open(tmp_path / "run.csv", "w", newline="") as file:
        file.write("# hardware: 1 x NVIDIA H200\n# kind: timed\n")
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
        file.write("# goal met: everything\n")
    outputs = [f"--csv={tmp_path / 'run.csv'}", f"--out={tmp_path / 'a.png'}", f"--table={tmp_path / 'a.md'}"]
    assert plot_kernels.main(outputs) == 0
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    text = (tmp_path / "a.md").read_text()
    assert "| 2, 64, 64, 640 | bfloat16 | forward | 1 | 4e+03 | 95% | 30 | 20.0 x | 7 |" in text
    assert "hardware 1 x NVIDIA H200" in text and text.strip() in capsys.readouterr().out
    lines = plot_kernels.curves(
        plot_kernels.read(str(tmp_path / "run.csv"))[1], channels=640, batch=2, dtype="bfloat16", pass_="forward"
    )
    assert lines["mosaic"] == [(64.0, 8.0), (pytest.approx(724.08, abs=0.01), 36.0)]
    assert lines["xla"] == [(64.0, 120.0)] and lines["flash_attention"] == [(64.0, 7.0)]
    with pytest.raises(SystemExit):
        plot_kernels.main([outputs[0], outputs[1], "--channels=8"])
    assert "there are none" in capsys.readouterr().err


def test_two_runs_that_differ_are_refused():
    case = Case(WRONG, TINY, "down", None, "float32", "both")
    inputs = draw_inputs(jax.random.key(0), "from_logits", TINY, "float32", "down")
    right = jax.jit(program(dataclasses.replace(case, contender=XLA)))
    runs = iter((1.0, 1.0 + 2**-20))

    def moving(*given):
        factor = next(runs)
        return jax.tree.map(lambda array: factor * array, right(*given))

    assert check(case, moving, inputs).reason == "two runs on the same inputs differ"


def test_a_dry_run_is_not_drawn(tmp_path):
    (tmp_path / "dry.csv").write_text("# kind: DRY: shrunken maps\nshape\n")
    with pytest.raises(ValueError, match="expected a run on a GPU"):
        plot_kernels.read(str(tmp_path / "dry.csv"))
