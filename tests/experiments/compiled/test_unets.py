import jax
import pytest

from experiments import tables
from experiments.compiled import unets
from experiments.compiled.unets import COLUMNS, REPORT, Call, calls
from gspn_jax.models import UNET_SIZES
from pallas_kernels.mosaic import compile_only

compiles = pytest.mark.skipif(compile_only.missing() is not None, reason=str(compile_only.missing()))
TINY = dict(widths=(32,), depths=(1,), blocks=1, num_heads=1, context_width=8, text_width=8, id_features=2)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(UNET_SIZES, "sdxl", TINY)


def test_calls_of_the_report():
    listed = list(map(str, calls()))
    assert listed[:3] == ["sd15 512 attention xla", "sd15 512 gspn xla", "sd15 512 gspn mosaic"]
    assert {"sdxl 1024 gspn_qkv mosaic", "sdxl 1024 linfusion xla"} <= set(listed) and len(set(listed)) == len(listed)


def test_a_call_that_does_not_compile_is_a_row_and_keeps_its_place(monkeypatch, tmp_path):
    def refuse(call, batch_size):
        raise ValueError("no memory\nfor it")

    monkeypatch.setattr(unets, "compile_call", refuse)
    monkeypatch.setattr(compile_only, "missing", lambda: None)
    monkeypatch.setattr(compile_only, "assembler_version", lambda: "none")
    for only in ("sdxl 1024 gspn mosaic", "sd15 512 gspn xla", "sdxl 1024 gspn mosaic", "sdxl 1024 attention"):
        REPORT.run([call for call in calls() if only in str(call)], str(tmp_path / "unet_report"))
    _, rows = tables.read(tmp_path / "unet_report.csv")
    found = [f"{row['model']} {row['size']} {row['mixer']} {row['implementation']}" for row in rows]
    assert found == ["sd15 512 gspn xla", "sdxl 1024 attention xla", "sdxl 1024 gspn mosaic"]
    assert {row["fault"] for row in rows} == {"ValueError: no memory for it"} and rows[0]["batch"] == "2"
    assert "no memory for it" in (tmp_path / "unet_report.md").read_text()


@pytest.mark.full
@compiles
def test_report_of_a_tiny_network(tmp_path):
    # flax's layers mix float32 maps with bfloat16 parameters by the usual promotion.
    with jax.numpy_dtype_promotion("standard"):
        (row,) = REPORT.run([Call("sdxl", 64, "gspn_qkv", "mosaic")], str(tmp_path / "unet_report"))
    assert row["fault"] == "" and row["dtype"] == "bfloat16"
    assert row["flops"] > 0 and row["launches"] > 50 and row["compile_s"] > 0
    # The prediction is float32.
    assert row["output_bytes"] == 2 * 8 * 8 * 4 * 4
    assert row["peak_bytes"] > row["argument_bytes"] > 0
    _, (written,) = tables.read(tmp_path / "unet_report.csv")
    assert written == {key: str(row[key]) for key in COLUMNS}
    assert "| sdxl | 64 | gspn_qkv | mosaic | 2 |" in (tmp_path / "unet_report.md").read_text()
