import io
import os
import pathlib
import pickle
import random
import sys
import zipfile

import numpy as np
import pytest

from gspn_jax.weights import read_arrays
from gspn_jax.weights.torch_file import StandIn, Tensor, TorchFile

FOLDER = pathlib.Path(__file__).parent / "torch_files"
BASE = np.arange(24, dtype=np.float32).reshape(4, 6)
# What make_torch_files.py saved.
VIEWS = {
    **{name: np.arange(5, dtype=name) for name in "float64 float32 int64 int32 int16 int8 uint8".split()},
    **{name: np.arange(5, dtype=np.float32) for name in ("float16", "bfloat16")},
    "bool": np.array([True, False]),
    "base": BASE,
    "rows": BASE[1:3],
    "columns": BASE.T,
    "odd": BASE[1::2, ::3],
    "expanded": np.broadcast_to(BASE[0, :3], (4, 3)),
    "number": np.array(2.5, np.float32),
    "empty": np.zeros((0, 3), np.float32),
    "parameter": np.ones(2, np.float32),
    "tagged": np.ones(2, np.float32),
}
NEWER = {name: np.arange(5, dtype=name) for name in ("uint16", "uint32", "uint64")}


@pytest.mark.parametrize("name,want", [
    ("views.pt", VIEWS | NEWER), ("protocol_4.pt", VIEWS | NEWER), ("before_1_6.pt", VIEWS),
])  # fmt: skip
def test_dtypes_views_and_shared_storages(name, want):
    got = read_arrays(FOLDER / name)
    assert got.keys() == want.keys()
    for key, array in want.items():
        np.testing.assert_array_equal(got[key], array, err_msg=key, strict=True)


@pytest.mark.parametrize("name", ["views.pt", "protocol_4.pt", "before_1_6.pt"])
def test_other_content(name):
    with open(FOLDER / name, "rb") as file:
        tree = TorchFile(file).tree
    assert tree["step"] == 7 and tree["size"] == (4, 6)
    assert tree["history"][:4] == [0.5, None, True, ("text", 2**70)] and sorted(tree["history"][4]) == [1, 2]
    assert isinstance(tree["device"], StandIn) and tree["device"].name == "torch.device"


def test_moving_averages_of_a_checkpoint_beside_objects_of_other_classes():
    arrays = read_arrays(FOLDER / "dit_checkpoint.pt")
    assert len(arrays) == 21 and {int(array.flat[0]) for array in arrays.values()} == set(range(100, 121))
    with open(FOLDER / "dit_checkpoint.pt", "rb") as file:
        tree = TorchFile(file).tree
    assert tree["args"].name == "argparse.Namespace" and tree["args"].fields["lr"] == 1e-4
    assert tree["args"].fields["folder"].name == "pathlib.PurePosixPath"
    assert tree["opt"]["param_groups"][0]["betas"] == (0.9, 0.999)


@pytest.mark.parametrize("name,names", [
    ("script.pt", ("scale", "layers.0.weight", "layers.0.bias", "layers.1.weight", "layers.1.bias",
                   "layers.1.running_mean", "layers.1.running_var", "layers.1.num_batches_tracked")),
    ("module.pt", ("0.weight", "0.bias", "1.0.weight", "1.0.bias", "1.0.running_mean", "1.0.running_var",
                   "1.0.num_batches_tracked")),
])  # fmt: skip
def test_modules_by_the_names_of_their_state_dict(name, names):
    arrays = read_arrays(FOLDER / name)
    assert arrays.keys() == set(names)
    for number, key in enumerate(names):
        want = number + np.arange(arrays[key].size) / 64
        np.testing.assert_array_equal(arrays[key].ravel(), want.astype(arrays[key].dtype), err_msg=key)


@pytest.mark.parametrize("name,words", [
    ("float8.pt", "tensor small: expected real numbers .* got float8_e4m3fn"),
    ("complex.pt", "tensor wave: expected real numbers .* got torch.ComplexFloatStorage"),
])  # fmt: skip
def test_other_dtypes_are_named(name, words):
    with pytest.raises(ValueError, match=f"source: expected a safetensors, .pt or .pth file, got .*{name}: {words}"):
        read_arrays(FOLDER / name)


# Pickles made by hand, as torch.save would never write them.
def dumped(value):
    return pickle.dumps(value, 2)[2:-1]  # without the protocol and the end


def tensor(key="0", *, offset=0, shape=(2,), strides=(1,), storage="FloatStorage"):
    pid = b"(" + dumped("storage") + f"ctorch\n{storage}\n".encode() + dumped(key) + dumped("cpu") + dumped(2) + b"tQ"
    arguments = pid + dumped(offset) + dumped(shape) + dumped(strides) + b"\x89ccollections\nOrderedDict\n)R"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"tR"


def state(**items):
    return b"\x80\x02}(" + b"".join(dumped(name) + value for name, value in items.items()) + b"u."


def archive(path, pickled, *, compression=zipfile.ZIP_STORED, **entries):
    content = {"data.pkl": pickled, "byteorder": b"little", "data/0": np.ones(2, np.float32).tobytes(), **entries}
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, value in content.items():
            file.writestr(f"tiny/{name}", value)
    return path


def test_pickles_made_by_hand_are_read(tmp_path):
    arrays = read_arrays(archive(tmp_path / "a.pth", state(weight=tensor(), scalar=tensor(shape=(), strides=()))))
    np.testing.assert_array_equal(arrays["weight"], np.ones(2, np.float32), strict=True)
    np.testing.assert_array_equal(arrays["scalar"], np.array(1, np.float32), strict=True)


class System:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_pickle_itself_would_run_it(tmp_path):
    pickle.loads(b"\x80\x02" + dumped(System(f"touch {tmp_path / 'marker'}")) + b".")
    assert (tmp_path / "marker").exists()


@pytest.mark.parametrize("evil", [
    lambda marker: dumped(System(f"touch {marker}")),
    lambda marker: b"cbuiltins\nexec\n" + dumped(f"open({marker!r}, 'w')") + b"\x85R",
    lambda marker: b"csubprocess\nPopen\n" + dumped((["touch", marker],)) + b"\x81",
    lambda marker: b"csubprocess\nPopen\n" + dumped((["touch", marker],)) + dumped({}) + b"\x92",
    lambda marker: b"cos\nsystem\n" + dumped(f"touch {marker}") + b"\x85\x85cos\nsystem\n\x86R",
    lambda marker: b"cos\nsystem\n)R" + dumped({"__setstate__": 1, "command": f"touch {marker}"}) + b"b",
    lambda marker: b"cos\nsystem\n" + dumped((None, {"__call__": f"touch {marker}"})) + b"b",
    lambda marker: b"ccollections\nOrderedDict\n)Rcos\nsystem\n" + dumped(f"touch {marker}") + b"\x85Rb",
    lambda marker: b"ctorch._tensor\n_rebuild_from_type_v2\n(cos\nsystem\ncos\nsystem\n"
    + dumped((f"touch {marker}",)) + b"NtR",
    lambda marker: b"cantigravity\nfly_soon\n)R",
])  # fmt: skip
def test_nothing_in_a_file_runs(tmp_path, evil):
    marker = tmp_path / "marker"
    path = archive(tmp_path / "a.pth", state(evil=evil(str(marker)), weight=tensor()))
    assert read_arrays(path).keys() == {"weight"}
    assert not marker.exists() and "antigravity" not in sys.modules


@pytest.mark.parametrize("pickled,words", [
    (b"\x80\x02(S'touch marker'\nios\nsystem\n.", "opcode STRING"),
    (b"\x80\x02P0\n.", "opcode PERSID"),
    (b"\x80\x02\x82\x01.", "opcode EXT1"),
    (state(weight=tensor(shape=(3,))), "tensor weight: expected 3 numbers or more in its storage, got 2"),
    (state(weight=tensor(strides=(2,))), "tensor weight: expected 3 numbers or more in its storage, got 2"),
    (state(weight=tensor(offset=1)), "tensor weight: expected 3 numbers or more in its storage, got 2"),
    (state(weight=tensor(offset=2**61)), "tensor weight: expected 2,305,843,009,213,693,954 numbers"),
    (state(weight=tensor(offset=2**64)), "offset, shape or strides of a tensor"),
    (state(weight=tensor(offset=-1)), "offset, shape or strides of a tensor"),
    (state(weight=tensor(strides=(-1,))), "offset, shape or strides of a tensor"),
    (state(weight=tensor(shape=(True,))), "offset, shape or strides of a tensor"),
    (state(weight=tensor(shape=(1, 2))), "a tensor is malformed"),
    (state(weight=tensor(shape=(1,) * 65, strides=(1,) * 65)), "a tensor is malformed"),
    (state(weight=tensor(shape=(2**40,), strides=(0,))), "tensors that claim 4,398,046,511,104 bytes"),
    (state(weight=tensor(shape=(2**61, 2**61), strides=(0, 0))), "tensors that claim"),
    (state(weight=tensor("1")), "tensor weight: data/1 is missing"),
    (state(weight=tensor("../../../../etc/passwd")), "tensor weight: data/../../../../etc/passwd is missing"),
    (b"\x80\x02Nr\xff\xff\xff\x7f.", "holds no tensors by name"),
    (b"\x80\x04\x8d" + b"\xff" * 7 + b"\x0fabc.", "expected 1152921504606846975 bytes"),
    (b"\x80\x02X\xff\xff\xff\x7fabc.", "expected 2147483647 bytes"),
    (b"\x80\x02}(" + dumped("a"), "pickle exhausted before seeing STOP"),
    (b"\x80\x02h\x07.", "a damaged PyTorch file"),
    (b"\x80\x02R.", "a damaged PyTorch file"),
    (b"\x80\x02u.", "a damaged PyTorch file"),
    (b"\x80\x02.", "a damaged PyTorch file"),
    (b"", "pickle exhausted"),
    (state(weight=b"]" * 10**5 + b"a" * (10**5 - 1)), "but weight"),
    (b"\x80\x02}N" + b"\x85" * 10**5 + b"Ns.", "holds no tensors"),
    (b"\x80\x02}q\x00" + dumped("model") + b"h\x00s.", "holds no tensors"),
    (b"\x80\x02}q\x01" + dumped("ema") + b"}" + dumped("model") + b"h\x01ss.", "holds no tensors"),
    (b"\x80\x02ca\nb\n)R}q\x01" + dumped("a") + b"ca\nb\n)Rh\x01bsb.", "holds no tensors"),
])  # fmt: skip
def test_hostile_pickles_are_refused_at_once(tmp_path, pickled, words):
    with pytest.raises(ValueError) as error:
        read_arrays(archive(tmp_path / "a.pth", pickled))
    assert words in str(error.value) and str(error.value).startswith("source: ") and len(str(error.value)) < 500
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("options,words", [
    ({"byteorder": b"big"}, "a PyTorch file of a big-endian machine"),
    ({"compression": zipfile.ZIP_DEFLATED}, "byteorder is compressed or encrypted, which PyTorch never does"),
    ({"data.pkl": b"N" * 2**22 + b"."}, "data.pkl claims 4,194,305 bytes"),
    ({"data/0": b"\0" * 7}, "tensor weight: expected 2 numbers or more in its storage, got 1"),
    ({"data/0": b""}, "tensor weight: expected 2 numbers or more in its storage, got 0"),
])  # fmt: skip
def test_hostile_archives(tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        read_arrays(archive(tmp_path / "a.pth", state(weight=tensor()), **options))


def test_other_archives(tmp_path):
    path = archive(tmp_path / "a.pth", state(weight=tensor()))
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("second/data.pkl", b"N.")
    with pytest.raises(ValueError, match="a zip archive that PyTorch did not write"):
        read_arrays(path)
    np.savez(tmp_path / "b.npz", weight=np.ones(2))
    with pytest.raises(ValueError, match=r"b\.npz: a NumPy archive \(npz\)"):
        read_arrays(tmp_path / "b.npz")


def test_claims_of_the_archive_are_checked(tmp_path):
    content = bytearray(archive(tmp_path / "a.pth", state(weight=tensor())).read_bytes())
    entry = content.rindex(b"PK\x01\x02", 0, content.rindex(b"tiny/data/0"))
    content[entry + 20 : entry + 28] = (2**31).to_bytes(4, "little") * 2
    (tmp_path / "b.pth").write_bytes(content)
    with pytest.raises(ValueError, match="tensor weight: data/0 claims 2,147,483,648 bytes"):
        read_arrays(tmp_path / "b.pth")


@pytest.mark.parametrize("name", ["views.pt", "before_1_6.pt", "script.pt"])
def test_torn_files(tmp_path, name):
    content = (FOLDER / name).read_bytes()
    for length in range(1, len(content), len(content) // 40):
        (tmp_path / name).write_bytes(content[:length])
        with pytest.raises(ValueError, match=f"source: expected a safetensors, .pt or .pth file, got .*{name}: "):
            read_arrays(tmp_path / name)


def test_a_flipped_bit_of_a_tensor_is_seen(tmp_path):
    content = bytearray((FOLDER / "views.pt").read_bytes())
    content[content.index(BASE.tobytes()) + 40] ^= 4
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"tensor base: data/\d+ is damaged \(Bad CRC-32"):
        read_arrays(tmp_path / "a.pt")


def test_damaged_pickles_raise_nothing_but_value_errors(tmp_path):
    with zipfile.ZipFile(FOLDER / "views.pt") as file:
        pickled = file.read("views/data.pkl")
    rng, refused = random.Random(0), 0
    for _ in range(300):
        damaged = bytearray(pickled)
        for _ in range(rng.randint(1, 3)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        try:
            read_arrays(archive(tmp_path / "a.pt", bytes(damaged)))
        except ValueError as error:
            refused += "source: " in str(error)
    assert refused > 200


def test_tensors_are_not_read_before_they_are_asked_for():
    content = archive(io.BytesIO(), state(weight=tensor("7")))
    tree = TorchFile(content).tree
    assert isinstance(tree["weight"], Tensor) and tree["weight"].storage.key == "7"
