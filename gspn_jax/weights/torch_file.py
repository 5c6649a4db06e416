"""Reads the .pt and .pth files of PyTorch without PyTorch; nothing in a file can run.

`torch.save` and `torch.jit.save` write a zip archive: a pickle holds containers and the shapes of the tensors, and one
entry for each storage holds numbers. Before version 1.6, `torch.save` wrote a row of pickles, then the storages.

The pickle is interpreted by the small machine in this file. It knows numbers, text, containers and tensors. It imports
nothing and calls nothing: any other class or function that a file names becomes an inert `StandIn`.
"""

import dataclasses
import io
import math
import pickletools
import struct
import zipfile
from collections.abc import Mapping
from typing import Any, BinaryIO

import ml_dtypes  # noqa: F401, gives NumPy the dtype bfloat16
import numpy as np

LEGACY_START = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"  # the first bytes before version 1.6
_LONGEST_PICKLE = 2**22  # bytes; DiT-XL/2 with its optimizer takes 0.3 million
_LONGEST_NAME = 1000
_MOST_AXES = 64
_LARGEST_COUNT = 2**62
# Tensors may share a storage, and a stride may be 0: bytes of all tensors as float32, relative to the file's.
_LARGEST_RATIO = 8

# PyTorch's dtypes that NumPy has too, and its classes of storages.
_DTYPES = frozenset("float64 float32 float16 bfloat16 int64 int32 int16 int8 uint64 uint32 uint16 uint8 bool".split())
_STORAGES = {
    "torch.DoubleStorage": "float64",
    "torch.FloatStorage": "float32",
    "torch.HalfStorage": "float16",
    "torch.BFloat16Storage": "bfloat16",
    "torch.LongStorage": "int64",
    "torch.IntStorage": "int32",
    "torch.ShortStorage": "int16",
    "torch.CharStorage": "int8",
    "torch.ByteStorage": "uint8",
    "torch.BoolStorage": "bool",
}

# Opcodes of the binary protocols, 2 to 5, which are the only ones that PyTorch writes.
_VALUES = frozenset(
    "BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT BINSTRING SHORT_BINSTRING BINUNICODE SHORT_BINUNICODE BINUNICODE8 "
    "BINBYTES SHORT_BINBYTES BINBYTES8".split()
)
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set, "EMPTY_TUPLE": tuple}

_DICTS = frozenset(["collections.OrderedDict", "collections.defaultdict"])
_TENSORS = frozenset(["torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3"])
# Functions whose result is their first argument, as far as parameters are concerned: a set may come as a list.
_FIRST_ARGUMENT = frozenset(
    [f"torch.jit._pickle.build_{kind}list" for kind in ("int", "double", "bool", "tensor")]
    + [f"{module}.{kind}" for module in ("builtins", "__builtin__") for kind in ("set", "frozenset")]
    + ["torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state", "torch.Size"]
    + ["torch.jit._pickle.restore_type_tag"]
)


@dataclasses.dataclass(eq=False, slots=True)
class StandIn:
    """Stands for a class or function that a file names, and for any object made by it.

    Attributes:
        name: dotted, of the class or function.
        fields: attributes of an object.
    """

    name: str
    fields: dict[Any, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True)
class Storage:
    """Numbers in a row. `dtype` is PyTorch's name of it, or the name of a storage class that is not known here."""

    key: str
    dtype: str


@dataclasses.dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor that is not read yet; offset and strides count elements and may reach out of the storage."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class TorchFile:
    """What a file holds.

    Attributes:
        tree: dicts, lists, tuples, sets, numbers, text, `Tensor`, and `StandIn` for all else.
    """

    def __init__(self, file: BinaryIO):
        """Reads everything but the tensors.

        Args:
            file: open for reading; it has to stay open until the tensors are read.

        Raises:
            ValueError: says in words what came instead: a damaged file, or another kind of file.
        """
        self._file, self._size = file, file.seek(0, io.SEEK_END)
        self._entries: dict[str, zipfile.ZipInfo] = {}
        self._places: dict[str, tuple[int, int]] = {}  # of storages outside a zip archive: first byte, bytes
        file.seek(0)
        self._zip = None if file.read(len(LEGACY_START)) == LEGACY_START else _opened(file)
        try:
            self.tree = self._read_old() if self._zip is None else self._read_zip(self._zip)
        except (LookupError, TypeError, AttributeError, struct.error) as error:
            raise ValueError(f"a damaged PyTorch file ({str(error)[:80]})") from error

    def arrays(self, tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        """Reads tensors.

        Returns:
            arrays of the same dtypes, bfloat16 as `ml_dtypes` has it; they may be read-only and share memory.

        Raises:
            ValueError: names a tensor with a dtype that NumPy has no like of, one that reaches out of its storage, or
                one whose storage is missing or damaged.
        """
        total = 4 * sum(math.prod(tensor.shape) for tensor in tensors.values())
        if total > _LARGEST_RATIO * self._size + 2**20:
            raise ValueError(f"tensors that claim {total:,} bytes, in a file of {self._size:,}")
        storages: dict[str, bytes] = {}
        arrays = {}
        for name, tensor in tensors.items():
            key = tensor.storage.key
            try:
                if key not in storages:
                    storages[key] = self._storage(key)
                arrays[name] = _array(tensor, storages[key])
            except ValueError as error:
                raise ValueError(f"tensor {name[:200]}: {error}") from error
        return arrays

    def _storage(self, key: str) -> bytes:
        if self._zip is not None:
            return self._entry(self._zip, f"data/{key}")
        if key not in self._places:
            raise ValueError(f"its storage {key[:40]} is missing")
        start, size = self._places[key]
        self._file.seek(start)
        return self._file.read(size)

    def _entry(self, archive: zipfile.ZipFile, name: str, largest: int | None = None) -> bytes:
        info = self._entries.get(name)
        if info is None:
            raise ValueError(f"{name[:40]} is missing from the archive")
        # PyTorch never compresses these, so that no entry can be larger than the file.
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.file_size != info.compress_size:
            raise ValueError(f"{name[:40]} is compressed or encrypted, which PyTorch never does")
        if info.header_offset + info.file_size > self._size or (largest and info.file_size > largest):
            raise ValueError(f"{name[:40]} claims {info.file_size:,} bytes")
        try:
            return archive.read(info)
        except (zipfile.BadZipFile, EOFError, NotImplementedError, struct.error) as error:
            raise ValueError(f"{name[:40]} is damaged ({error})") from error

    def _read_zip(self, archive: zipfile.ZipFile) -> Any:
        roots = [name.removesuffix("data.pkl") for name in archive.namelist() if name.endswith("/data.pkl")]
        roots = [root for root in roots if root.count("/") == 1]
        if len(roots) != 1:
            arrays = any(name.endswith(".npy") for name in archive.namelist())
            raise ValueError("a NumPy archive (npz)" if arrays else "a zip archive that PyTorch did not write")
        self._entries = {name.removeprefix(roots[0]): info for name, info in archive.NameToInfo.items()}
        if "byteorder" in self._entries and self._entry(archive, "byteorder", 16) != b"little":
            raise ValueError("a PyTorch file of a big-endian machine")
        return _Machine().run(io.BytesIO(self._entry(archive, "data.pkl", _LONGEST_PICKLE)))

    def _read_old(self) -> Any:
        self._file.seek(0)
        stream = io.BytesIO(self._file.read(_LONGEST_PICKLE))
        machine = _Machine()
        _, _, system, tree, keys = (machine.run(stream) for _ in range(5))
        if system.get("little_endian") is not True:
            raise ValueError("a PyTorch file of a big-endian machine")
        place = stream.tell()
        for key in keys:
            self._file.seek(place)
            (count,) = struct.unpack("<q", self._file.read(8))
            size = count * np.dtype(machine.storages[key].dtype).itemsize
            if not 0 <= size <= self._size - place - 8:
                raise ValueError(f"a damaged PyTorch file (storage {key[:40]} claims {size:,} bytes)")
            self._places[key] = place + 8, size
            place += 8 + size
        return tree


def _opened(file: BinaryIO) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(file)
    except (zipfile.BadZipFile, NotImplementedError, struct.error) as error:
        raise ValueError(f"a damaged PyTorch file ({error})") from error


def _array(tensor: Tensor, storage: bytes) -> np.ndarray:
    if tensor.dtype not in _DTYPES:
        raise ValueError(f"expected real numbers of 16 bits or more, integers or bool, got {tensor.dtype}")
    dtype = np.dtype(tensor.dtype)
    if 0 in tensor.shape:
        return np.zeros(tensor.shape, dtype)
    numbers = np.frombuffer(storage[: len(storage) // dtype.itemsize * dtype.itemsize], dtype)
    axes = list(zip(tensor.shape, tensor.strides, strict=True))
    last = tensor.offset + sum((size - 1) * step for size, step in axes)
    if last >= numbers.size:
        raise ValueError(f"expected {last + 1:,} numbers or more in its storage, got {numbers.size:,}")
    # The stride of an axis of length 1 counts for nothing, and may be anything.
    strides = [step * dtype.itemsize if size > 1 else 0 for size, step in axes]
    return np.lib.stride_tricks.as_strided(numbers[tensor.offset :], tensor.shape, strides, writeable=False)


class _Machine:
    """Interprets pickles in time and memory proportional to their length, since no operation copies a container."""

    def __init__(self) -> None:
        self.storages: dict[str, Storage] = {}

    def run(self, stream: BinaryIO) -> Any:
        """The object of the pickle at the stream's position, which moves to the pickle's end.

        Raises:
            ValueError, LookupError, TypeError: the pickle is damaged or holds something that PyTorch never writes.
        """
        self._stack: list[Any] = []
        self._marked: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        for opcode, value, _ in pickletools.genops(stream):
            self._step(opcode.name, value)
        return self._stack.pop()

    def _step(self, opcode: str, value: Any) -> None:
        stack = self._stack
        if opcode in _VALUES:
            stack.append(value)
        elif opcode in _CONSTANTS:
            stack.append(_CONSTANTS[opcode])
        elif opcode in _EMPTY:
            stack.append(_EMPTY[opcode]())
        elif opcode in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self._memo[len(self._memo) if value is None else value] = stack[-1]
        elif opcode in ("BINGET", "LONG_BINGET"):
            stack.append(self._memo[value])
        elif opcode == "MARK":
            self._marked.append(stack)
            self._stack = []
        elif opcode in ("TUPLE1", "TUPLE2", "TUPLE3"):
            items = [stack.pop() for _ in range(int(opcode[-1]))]
            stack.append(tuple(reversed(items)))
        elif opcode in ("TUPLE", "FROZENSET"):
            items = self._since_mark()
            self._stack.append(tuple(items) if opcode == "TUPLE" else set(map(_key, items)))
        elif opcode in ("APPENDS", "ADDITEMS", "SETITEMS"):
            items = self._since_mark()
            _fill(self._stack[-1], items)
        elif opcode in ("APPEND", "SETITEM"):
            items = [stack.pop() for _ in range(1 if opcode == "APPEND" else 2)]
            _fill(stack[-1], items[::-1])
        elif opcode == "GLOBAL":
            stack.append(_named(*value.split(" ", 1)))
        elif opcode == "STACK_GLOBAL":
            name = stack.pop()
            stack.append(_named(stack.pop(), name))
        elif opcode in ("REDUCE", "NEWOBJ", "NEWOBJ_EX"):
            arguments = stack.pop() if opcode != "NEWOBJ_EX" else [stack.pop(), stack.pop()][1]
            stack.append(_called(stack.pop(), arguments))
        elif opcode == "BUILD":
            state = stack.pop()
            states = state[:2] if isinstance(state, tuple) else (state,)  # of attributes, of slots
            states = [part for part in states if isinstance(part, dict)]
            if isinstance(stack[-1], StandIn) and states:
                stack[-1].fields = states[0]
        elif opcode == "BINPERSID":
            stack.append(self._persistent(stack.pop()))
        elif opcode not in ("PROTO", "FRAME", "STOP"):
            raise ValueError(f"a damaged PyTorch file (opcode {opcode})")

    def _since_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._marked.pop()
        return items

    def _persistent(self, value: Any) -> Storage:
        kind, storage, key, *_ = value if len(value) in (5, 6) else (None,) * 3
        is_view = len(value) == 6 and value[5] is not None  # of another storage: before version 0.4
        if kind != "storage" or not isinstance(storage, StandIn) or not isinstance(key, str) or is_view:
            raise ValueError("a damaged PyTorch file (a storage is malformed)")
        self.storages[key] = Storage(key, _STORAGES.get(storage.name, storage.name))
        return self.storages[key]


def _fill(target: Any, items: list[Any]) -> None:
    """Adds items to a container; those of a dict are keys and values in turn."""
    if isinstance(target, list):
        target.extend(items)
    elif isinstance(target, set):
        target.update(map(_key, items))
    elif isinstance(target, dict):
        target.update(zip(map(_key, items[::2]), items[1::2], strict=True))
    elif not isinstance(target, StandIn):
        raise TypeError(f"items for {type(target).__name__}")


def _key(value: Any) -> Any:
    """A key of a dict or set. Hashes of tuples and huge integers could take forever, so that these are replaced."""
    if value is None or isinstance(value, str | bytes | float) or (isinstance(value, int) and value.bit_length() < 64):
        return value
    return StandIn(type(value).__name__)


def _named(module: Any, name: Any) -> StandIn:
    if not isinstance(module, str) or not isinstance(name, str) or max(len(module), len(name)) > _LONGEST_NAME:
        raise ValueError("a damaged PyTorch file (a name is malformed)")
    return StandIn(f"{module}.{name}")


def _name_of(function: Any) -> str:
    return function.name if isinstance(function, StandIn) else type(function).__name__


def _called(function: Any, arguments: Any) -> Any:
    """What a function would make: a tensor, an empty dict, its first argument, or a stand-in."""
    name = _name_of(function)
    if name == "torch._tensor._rebuild_from_type_v2":  # a function, a class, arguments, a state
        name, arguments = _name_of(arguments[0]), arguments[2]
    if name in _TENSORS:
        return _tensor(*arguments[:4], *arguments[6:7] if name.endswith("v3") else ())
    if name in _FIRST_ARGUMENT and arguments:
        return arguments[0]
    return {} if name in _DICTS else StandIn(name)


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, dtype: Any = None) -> Tensor:
    if not isinstance(storage, Storage) or not len(shape) == len(strides) <= _MOST_AXES:
        raise ValueError("a damaged PyTorch file (a tensor is malformed)")
    if any(type(count) is not int or not 0 <= count < _LARGEST_COUNT for count in (offset, *shape, *strides)):
        raise ValueError("a damaged PyTorch file (offset, shape or strides of a tensor)")
    kind = storage.dtype if dtype is None else _name_of(dtype).removeprefix("torch.")
    return Tensor(storage, kind, offset, tuple(shape), tuple(strides))
