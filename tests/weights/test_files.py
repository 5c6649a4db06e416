import json
import os
import pathlib
import struct

import huggingface_hub
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from gspn_jax.weights import local_file, read_arrays
from gspn_jax.weights.files import open_arrays

ONES, ROWS = np.ones(3, np.float32), np.arange(6, dtype=np.float32).reshape(2, 3)


def assert_same(got, want):
    assert got.keys() == want.keys()
    for name, array in want.items():
        np.testing.assert_array_equal(got[name], array, err_msg=name, strict=True)


def test_safetensors_of_all_dtypes(tmp_path):
    names = "float64 float32 int64 int32 int16 int8 uint64 uint32 uint16 uint8 bool".split()
    arrays = {name: np.arange(4).astype(name) for name in names}
    short = {"half": ROWS.astype(np.float16), "brain": ROWS.astype(ml_dtypes.bfloat16)}
    save_file(arrays | short | {"number": np.array(2, np.int64)}, tmp_path / "a.fp16.safetensors")
    got = read_arrays(tmp_path / "a.fp16.safetensors")
    want = arrays | {"half": ROWS, "brain": ROWS, "number": np.array(2, np.int64)}
    assert_same(got, want)
    opened = open_arrays(tmp_path / "a.fp16.safetensors")
    assert_same(opened, want)
    assert "none" not in opened and len(opened) == len(want) and opened.get("none") is None


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "C64"])
def test_other_dtypes_of_safetensors_are_named(tmp_path, dtype):
    size = 8 if dtype == "C64" else 1
    header = json.dumps({"small": {"dtype": dtype, "shape": [1], "data_offsets": [0, size]}}).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(size))
    with pytest.raises(ValueError, match=f"source: .*a.safetensors: tensor small has dtype {dtype}"):
        read_arrays(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=f"source: .*a.safetensors: tensor small has dtype {dtype}"):
        open_arrays(tmp_path / "a.safetensors")


def sharded(folder: pathlib.Path) -> pathlib.Path:
    places = {"first": "m-00001-of-00002.safetensors", "second": "m-00002-of-00002.safetensors"}
    save_file({"first": ONES, "beside": ONES}, folder / places["first"])
    save_file({"second": ROWS.astype(np.float16)}, folder / places["second"])
    index = folder / "m.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return index


def test_shards(tmp_path, monkeypatch):
    assert_same(read_arrays(sharded(tmp_path)), {"first": ONES, "second": ROWS})
    monkeypatch.chdir(tmp_path)
    assert_same(read_arrays("m.safetensors.index.json"), {"first": ONES, "second": ROWS})


@pytest.mark.parametrize("index,words", [
    ('{"weight_map": {"first": "../m-00001-of-00002.safetensors"}}', "is not the name of a file beside the index"),
    ('{"weight_map": {"first": "/etc/passwd"}}', "shard /etc/passwd, which is not the name"),
    ('{"weight_map": {"first": ".."}}', "is not the name of a file"),
    ('{"weight_map": {"first": 7}}', "shard 7, which is not the name"),
    ('{"weight_map": {"first": "m.safetensors.index.json"}}', "m.safetensors.index.json: "),
    ('{"weight_map": {"first": "none.safetensors"}}', "No such file"),
    ('{"weight_map": {"third": "m-00001-of-00002.safetensors"}}', "tensor third is missing from m-00001-of-00002"),
    ('{"weight_map": 3}', "no index of shards"),
    ("[1, 2]", "no index of shards"),
    ("[" * 10**5, "no index of shards"),
])  # fmt: skip
def test_other_indices_are_refused(tmp_path, index, words):
    path = sharded(tmp_path)
    path.write_text(index)
    with pytest.raises(ValueError, match=words) as error:
        read_arrays(path)
    assert str(error.value).startswith("source: ") and "\n" not in str(error.value)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with two files; returns what was asked of it."""
    (tmp_path / "sub").mkdir()
    sharded(tmp_path / "sub")
    save_file({"weight": ROWS}, tmp_path / "m.safetensors")
    asked = []

    def download(repo_id, filename, *, revision=None):
        asked.append((repo_id, filename, revision))
        if not (tmp_path / filename).exists():
            raise RuntimeError(f"404 for {filename}\nand a page of text")
        return str(tmp_path / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return asked


def test_files_of_the_hub(hub, tmp_path):
    assert_same(read_arrays("hf://owner/name/m.safetensors"), {"weight": ROWS})
    assert_same(read_arrays("hf://owner/name@v1/sub/m.safetensors.index.json"), {"first": ONES, "second": ROWS})
    assert hub == [
        ("owner/name", "m.safetensors", None),
        ("owner/name", "sub/m.safetensors.index.json", "v1"),
        ("owner/name", "sub/m-00001-of-00002.safetensors", "v1"),
        ("owner/name", "sub/m-00002-of-00002.safetensors", "v1"),
    ]
    assert local_file("hf://owner/name/m.safetensors") == tmp_path / "m.safetensors"


@pytest.mark.parametrize("source,words", [
    ("hf://owner/name/none.pth", "got hf://owner/name/none.pth: cannot be fetched: 404 for none.pth$"),
    ("hf://owner/m.safetensors", "expected hf://owner/name/file or hf://owner/name@revision/file"),
    ("hf://", "expected hf://owner/name/file"),
])  # fmt: skip
def test_sources_that_the_hub_lacks(hub, source, words):
    with pytest.raises(ValueError, match=f"^autoencoder: .*{words}"):
        read_arrays(source, argument="autoencoder")


def test_what_is_no_file_of_parameters(tmp_path):
    os.mkfifo(tmp_path / "pipe.pth")
    (tmp_path / "folder.pth").mkdir()
    (tmp_path / "empty.pth").touch()
    (tmp_path / "text.safetensors").write_text("<html>Not found</html>")
    (tmp_path / "short.safetensors").write_bytes(b"abc")
    save_file({"weight": ROWS}, tmp_path / "whole.safetensors")
    (tmp_path / "torn.safetensors").write_bytes((tmp_path / "whole.safetensors").read_bytes()[:-1])
    words = {
        "pipe.pth": "not a regular file",
        "folder.pth": "a folder",
        "empty.pth": "an empty file",
        "none.pth": "No such file or directory",
        "text.safetensors": "header",
        "short.safetensors": "header",
        "torn.safetensors": "incomplete|MetadataIncompleteBuffer",
        "a\0b.pth": "null",
    }
    for name, expected in words.items():
        with pytest.raises(ValueError, match=rf"^source: [^\n]*(?:{expected})[^\n]*$"):
            read_arrays(tmp_path / name)
    for name in ("pipe.pth", "none.pth"):
        with pytest.raises(ValueError, match=f"^inception: expected a file, got .*{name}: {words[name]}$"):
            local_file(tmp_path / name, argument="inception")
