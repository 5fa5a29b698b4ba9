"""Reads pickles of tensors as data: follows their opcodes, and never imports or calls anything that they name.

A pickle is a program for a stack machine (Python's pickletools lists its opcodes). This machine knows the opcodes that
tensors in dictionaries need. The functions that a pickle calls (`torch._utils._rebuild_tensor_v2`, ...) are looked up
in a table of our own functions; every other name is refused.
"""

from __future__ import annotations

import math
import pickletools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, cast

import numpy as np

# The errors that reading a damaged pickle can cause.
DAMAGED = (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, RecursionError, EOFError)
STORAGES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool",
}  # fmt: skip
_NUMPY = {
    "f8": "float64", "f4": "float32", "f2": "float16", "i8": "int64", "i4": "int32", "i2": "int16", "i1": "int8",
    "u1": "uint8", "b1": "bool", "bfloat16": "bfloat16", "E": "bfloat16",
}  # fmt: skip
_PUSHED = {
    "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
    "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8",
}  # fmt: skip
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class File(Protocol):
    """The methods of a file that are needed to read it opcode by opcode."""

    def read(self, n: int, /) -> bytes:
        """Reads at most n bytes."""

    def readline(self) -> bytes:
        """Reads the bytes up to and including the end of the line."""

    def tell(self) -> int:
        """The position of the next byte."""


class Forbidden(ValueError):
    """Raised if a pickle names something that tensors do not need. The message says what."""


class Global(NamedTuple):
    """A name in a pickle; nothing is imported for it."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class Storage(NamedTuple):
    """The numbers of a torch tensor: `size` numbers from byte `begin` of the file on."""

    dtype: str
    size: int
    begin: int


class Strided(NamedTuple):
    """A torch tensor: the element at `index` is at position offset + sum(index · strides) in its storage."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def last(self) -> int:
        """The position after the tensor's last number, counted in numbers from the beginning of the storage."""
        return self.offset + 1 + sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True))


class _Type:
    """A NumPy dtype that is being built."""

    def __init__(self, spelled: str):
        name = spelled.lstrip("<|=")
        if name not in _NUMPY:
            raise Forbidden(f"an array of {spelled!r:.40}")
        self.name = _NUMPY[name]


class _Array:
    """A NumPy array that is being built."""

    value: np.ndarray | None = None


class _Dict(dict[Any, Any]):
    """A dictionary that a pickle makes by a call. Attributes that the pickle sets on it are ignored; they have no
    tensors."""


def read_pickle(file: File, storage: Callable[[Any], Storage] | None = None) -> Any:
    """The value in a pickle: dictionaries, lists, tuples, numbers and texts as they are, tensors as `Strided` or
    arrays.

    Args:
        storage: returns the storage that a persistent id means; None if there are no persistent ids.

    Raises Forbidden if the pickle names something that tensors do not need, and one of DAMAGED if it is not a valid
    pickle.
    """
    machine = _Machine(storage)
    for opcode, argument, _ in pickletools.genops(cast(Any, file)):
        if opcode.name == "STOP":
            return _finished(machine.stack.pop())
        machine.step(opcode.name, argument)
    raise ValueError("it has no end")


def _finished(value: Any) -> Any:
    return value.value if isinstance(value, _Array) else value


class _Machine:
    def __init__(self, storage: Callable[[Any], Storage] | None):
        self.stack: list[Any] = []
        self._outer: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        self._storage = storage

    def step(self, word: str, argument: Any) -> None:
        """Executes one opcode."""
        if word in ("PROTO", "FRAME"):
            return
        if word in _PUSHED:
            self.stack.append(argument)
        elif word in _CONSTANTS:
            self.stack.append(_CONSTANTS[word])
        elif word in ("BINPUT", "LONG_BINPUT"):
            self._memo[argument] = self.stack[-1]
        elif word == "MEMOIZE":
            self._memo[len(self._memo)] = self.stack[-1]
        elif word in ("BINGET", "LONG_BINGET"):
            self.stack.append(self._memo[argument])
        elif word == "MARK":
            self._outer.append(self.stack)
            self.stack = []
        elif word in _TUPLES:
            n = _TUPLES[word]
            self.stack[len(self.stack) - n :] = [tuple(_finished(each) for each in self._last(n))]
        elif not self._collect(word):
            self._make(word, argument)

    def _last(self, n: int) -> list[Any]:
        if len(self.stack) < n:
            raise IndexError("it takes more values from its stack than there are")
        return self.stack[len(self.stack) - n :]

    def _marked(self) -> list[Any]:
        items, self.stack = self.stack, self._outer.pop()
        return [_finished(each) for each in items]

    def _collect(self, word: str) -> bool:
        """Executes an opcode of lists or dictionaries. Returns whether the opcode is one of these."""
        if word in ("EMPTY_LIST", "EMPTY_DICT"):
            self.stack.append([] if word == "EMPTY_LIST" else {})
        elif word == "TUPLE":
            items = self._marked()
            self.stack.append(tuple(items))
        elif word in ("APPEND", "APPENDS"):
            items = [_finished(self.stack.pop())] if word == "APPEND" else self._marked()
            if type(self.stack[-1]) is not list:
                raise TypeError("it appends to something that is not a list")
            self.stack[-1].extend(items)
        elif word in ("SETITEM", "SETITEMS"):
            if word == "SETITEM":
                items = [_finished(each) for each in self._last(2)]
                del self.stack[-2:]
            else:
                items = self._marked()
            if type(self.stack[-1]) not in (dict, _Dict):
                raise TypeError("it sets an item of something that is not a dictionary")
            self.stack[-1].update(zip(items[::2], items[1::2], strict=True))
        else:
            return False
        return True

    def _make(self, word: str, argument: Any) -> None:
        """Executes an opcode that names something, calls it, or sets the state of what a call returned."""
        if word == "GLOBAL":
            module, _, name = argument.partition(" ")
            self.stack.append(_allowed(Global(module, name)))
        elif word == "STACK_GLOBAL":
            module, name = self.stack[-2:]
            if not isinstance(module, str) or not isinstance(name, str):
                raise TypeError("it has a name that is not a string")
            self.stack[-2:] = [_allowed(Global(module, name))]
        elif word in ("REDUCE", "NEWOBJ"):
            called, arguments = self.stack[-2:]
            self.stack[-2:] = [_call(called, arguments)]
        elif word == "BUILD":
            state = self.stack.pop()
            _build(self.stack[-1], state)
        elif word == "BINPERSID":
            if self._storage is None:
                raise Forbidden("a persistent id outside a torch file")
            self.stack.append(self._storage(self.stack.pop()))
        else:
            raise Forbidden(f"the opcode {word}")


def _allowed(name: Global) -> Any:
    if name in _CALLS or name in _NAMES:
        return name
    if name.module == "torch" and name.name in _TORCH_DTYPES:
        return str(name)  # a dtype that is stored as a setting, such as a hyper-parameter
    raise Forbidden(str(name))


def _call(called: Any, arguments: Any) -> Any:
    if not isinstance(called, Global) or called not in _CALLS:
        raise Forbidden(f"a call of {called!s:.80}")
    if not isinstance(arguments, tuple):
        raise TypeError("it has a call without arguments")
    return _CALLS[called](*arguments)


def _build(made: Any, state: Any) -> None:
    if isinstance(made, _Array):
        _, shape, kind, fortran, data = state
        made.value = _array(data, kind, shape, "F" if fortran else "C")
    elif isinstance(made, _Type):
        if state[1] not in ("<", "|", "="):
            raise Forbidden(f"an array with the byte order {state[1]!r:.10}")
    elif not isinstance(made, _Dict):
        raise Forbidden(f"attributes of a {type(made).__name__}")


# ---- what may be called: functions of ours ------------------------------------------------------------------------


def _mapping(items: Any = ()) -> _Dict:
    return _Dict(items)


def _strided(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> Strided:
    if not isinstance(storage, Storage):
        raise TypeError("it has a tensor without a storage")
    numbers = (offset, *shape, *strides)
    if any(type(number) is not int or number < 0 for number in numbers) or len(shape) != len(strides):
        raise ValueError(f"it has a tensor with invalid numbers: shape {shape!r:.80}, strides {strides!r:.80}")
    tensor = Strided(storage, offset, tuple(shape), tuple(strides))
    # With strides of zero, a tensor could have any number of elements, so that number is limited too.
    if math.prod(shape) > storage.size or (math.prod(shape) and tensor.last > storage.size):
        raise ValueError(f"it has a tensor of shape {list(shape)} in a storage of {storage.size} numbers")
    return tensor


def _parameter(tensor: Any, *_: Any) -> Any:
    if not isinstance(tensor, Strided):
        raise TypeError("it has a parameter that is not a tensor")
    return tensor


def _reconstruct(kind: Any, *_: Any) -> _Array:
    if kind != _NDARRAY:
        raise Forbidden(f"an array of class {kind!s:.80}")
    return _Array()


def _type(spelled: Any, *_: Any) -> _Type:
    if isinstance(spelled, Global) and spelled.name == "bfloat16":
        spelled = "bfloat16"
    if not isinstance(spelled, str):
        raise TypeError("its dtype is not a string")
    return _Type(spelled)


def _array(data: Any, kind: Any, shape: Any, order: Any = "C") -> np.ndarray:
    """The finished array. Raises ValueError if the number of bytes does not fit the shape."""
    if not isinstance(kind, _Type) or not isinstance(data, bytes | bytearray) or order not in ("C", "F"):
        raise TypeError("it has an array whose dtype, bytes or order is not known")
    return np.frombuffer(data, np.dtype(kind.name)).reshape(shape, order=order)


def _scalar(kind: Any, data: Any) -> Any:
    return _array(data, kind, ()).item()


def _jax_array(function: Any, arguments: Any, state: Any, *_: Any) -> Any:
    made = _call(function, arguments)
    _build(made, state)
    return _finished(made)


def _encoded(text: Any, encoding: Any) -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise Forbidden(f"bytes as {encoding!r:.40}")
    return str.encode(text, "latin1")


_NDARRAY = Global("numpy", "ndarray")
_TORCH_DTYPES = {"float32", "float16", "bfloat16", "float64", "int64", "int32", "int16", "int8", "uint8", "bool"}
_NAMES = {_NDARRAY, Global("ml_dtypes", "bfloat16"), *(Global("torch", name) for name in STORAGES)}
_CALLS: Mapping[Global, Callable[..., object]] = {
    Global("collections", "OrderedDict"): _mapping,
    Global("flax.core.frozen_dict", "FrozenDict"): _mapping,
    Global("torch", "Size"): tuple,
    Global("torch._utils", "_rebuild_tensor"): _strided,
    Global("torch._utils", "_rebuild_tensor_v2"): _strided,
    Global("torch._utils", "_rebuild_parameter"): _parameter,
    Global("numpy", "dtype"): _type,
    Global("_codecs", "encode"): _encoded,
    **{Global(f"numpy.{core}.multiarray", "_reconstruct"): _reconstruct for core in ("core", "_core")},
    **{Global(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
    **{Global(f"numpy.{core}.numeric", "_frombuffer"): _array for core in ("core", "_core")},
    Global("jax._src.array", "_reconstruct_array"): _jax_array,
    Global("jax._src.device_array", "reconstruct_device_array"): _jax_array,
}
