"""Reads pickles of plain values and NumPy arrays, and can make nothing else, whatever a pickle asks for.

Python's own reader calls what a pickle names, believes what it says about the memory of an array, and reserves the
memory that a length in it claims. This one knows only the opcodes that plain values are written with, by Python 2
and 3 in protocols 0 to 5; it makes arrays itself, of the numbers listed in NUMBERS, after their shape and their
bytes were compared.
"""

import codecs
import math
import pickle
import struct
from types import FunctionType
from typing import BinaryIO, NoReturn

import numpy as np

# What the numbers of an array may be, by the names that NumPy writes. Arrays of objects are arrays of addresses.
NUMBERS = {"b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f4", "f8"}

MOST_OPCODES = 4_000_000  # CIFAR-100's training part, 50,000 names and 100,000 numbers, has less than a tenth of it
LONGEST_TEXT = 2**16  # bytes; what is longer holds the bytes of an array
LONGEST_NUMBER = 32  # letters; of 64 bits all the same
MOST_AXES = 32  # NumPy 1 has no more
PIECE = 2**20


def load(file: BinaryIO, size: int) -> object:
    """The value that a pickle holds, made of None, bool, int, float, str, bytes, list, tuple, dict and arrays.

    Python 2 has one type for text and bytes: what it wrote is read as text in Latin-1, but as bytes where it is
    longer than LONGEST_TEXT, and so are the long texts in which Python 3 packs an array's bytes for Python 2.

    Args:
        file: the pickle, open for reading.
        size: how many bytes it has. The memory in use stays below a small multiple of it.

    Raises:
        Exception: of nearly every kind, where the pickle is damaged or holds anything else.
    """
    reader = _Reader(file, size)
    value = reader.value()
    seen, waiting = set(), [value]
    while waiting:
        one = waiting.pop()
        if not isinstance(one, (list, tuple, dict)):
            if not isinstance(one, _PLAIN):
                _refuse("it holds a part of an array in a place of its own")
        elif id(one) not in seen:
            seen.add(id(one))
            waiting.extend(one.values() if isinstance(one, dict) else one)
    return value


_KEYS = (str, bytes, int, float, type(None))  # bool is an int; a tuple as a key could be nested beyond all bounds
_PLAIN = (*_KEYS, bytearray, np.ndarray, np.generic)


def _refuse(reason: str) -> NoReturn:
    raise pickle.UnpicklingError(reason)


class _Type:
    """An array's type: NumPy names it first, and tells the order of its bytes afterwards."""

    def __init__(self, name: str):
        self.name, self.order = name, "="

    def set_state(self, version: int, order: str, *rest: object) -> None:
        """rest: the record that the type is, if it is one, and its size and flags; of numbers all that is empty."""
        if order not in ("<", ">", "|", "=") or any(one is not None and one not in (0, -1) for one in rest):
            _refuse("it describes an array of other things than numbers")
        self.order = order


class _Unfilled:
    """An array that a pickle has asked for; its content follows."""

    array: np.ndarray | None = None


class _Reader:
    """Follows a pickle's opcodes, as the comments in Python's pickletools.py describe them."""

    def __init__(self, file: BinaryIO, size: int):
        self.file, self.size = file, size
        self.stack: list = []
        self.below: list[list] = []  # the stacks under each open mark
        self.memo: dict[int, object] = {}
        self.used = 0  # bytes of texts and arrays, see `use`

    def value(self) -> object:
        for _ in range(MOST_OPCODES):
            opcode = self.read(1)
            if opcode == pickle.STOP:
                return self.stack.pop()
            if opcode not in _STEPS:
                _refuse(f"it has the opcode {opcode!r}")
            _STEPS[opcode](self)
        _refuse(f"it has more than {MOST_OPCODES:,} opcodes")

    # -- what is in the file ------------------------------------------------------------------------------------------

    def read(self, count: int) -> bytes:
        if count > self.size:
            _refuse(f"it declares {count:,} bytes, more than there are")
        found = self.file.read(count)
        if len(found) < count:
            _refuse("it ends too early")
        return found

    def line(self, most: int) -> bytes:
        found = self.file.readline(most + 1)
        if not found.endswith(b"\n"):
            _refuse("a line of it is too long, or cut off")
        return found[:-1]

    def unsigned(self, count: int) -> int:
        return int.from_bytes(self.read(count), "little")

    def signed(self, count: int) -> int:
        return _checked(int.from_bytes(self.read(count), "little", signed=True))

    def decimal(self) -> int | bool:
        written = self.line(LONGEST_NUMBER)
        return written == b"01" if written in (b"00", b"01") else _checked(int(written.rstrip(b"L")))

    def text(self, count: int) -> str | bytearray:
        if count <= LONGEST_TEXT:
            return self.read(count).decode("utf-8")
        if count > self.size:
            _refuse(f"it declares {count:,} bytes, more than there are")
        decoder, found = codecs.getincrementaldecoder("utf-8")(), bytearray()
        for start in range(0, count, PIECE):
            read = self.read(min(PIECE, count - start))
            found += decoder.decode(read, final=start + PIECE >= count).encode("latin1")
        return found

    def escaped_text(self) -> str | bytes:
        found = self.line(self.size).decode("raw-unicode-escape")
        return found.encode().decode() if len(found) <= LONGEST_TEXT else found.encode("latin1")

    def escaped_bytes(self) -> str | bytes:
        line = self.line(self.size)
        if len(line) < 2 or line[:1] not in (b"'", b'"') or line[-1:] != line[:1]:
            _refuse("it has a text without quotation marks")
        return _text_or_bytes(codecs.escape_decode(line[1:-1])[0])

    # -- the stack and the memo ---------------------------------------------------------------------------------------

    def mark(self) -> None:
        self.below.append(self.stack)
        self.stack = []

    def since_mark(self) -> list:
        found, self.stack = self.stack, self.below.pop()
        return found

    def uppermost(self, count: int) -> tuple:
        """Takes so many values off the stack."""
        if len(self.stack) < count:
            _refuse("it takes values that are not there")
        found = tuple(self.stack[len(self.stack) - count :])
        del self.stack[len(self.stack) - count :]
        return found

    def extend(self, values: list) -> None:
        if not isinstance(self.stack[-1], list):
            _refuse("it appends to something other than a list")
        self.stack[-1].extend(values)

    def set_items(self, values: list | tuple) -> None:
        """values: key, value, key, value, ..."""
        place = self.stack[-1]
        if not isinstance(place, dict) or len(values) % 2 or not all(isinstance(key, _KEYS) for key in values[::2]):
            _refuse("it has a dict with something other than plain keys")
        place.update(zip(values[::2], values[1::2], strict=True))

    def new_dict(self) -> None:
        values = self.since_mark()
        self.stack.append({})
        self.set_items(values)

    def remember(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def recall(self, index: int) -> None:
        if index not in self.memo:
            _refuse("it recalls what it has not kept")
        found = self.memo[index]
        self.stack.append(found.array if isinstance(found, _Unfilled) and found.array is not None else found)

    # -- what a pickle names ------------------------------------------------------------------------------------------

    def name(self, module: object, name: object) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            _refuse("it names something by other than a text")
        wanted = f"{module}.{name}".removeprefix("numpy._core.").removeprefix("numpy.core.")
        if wanted not in _NAMED:
            _refuse(f"it names {module}.{name}")
        self.stack.append(_NAMED[wanted])

    def call(self) -> None:
        named, values = self.uppermost(2)
        if not isinstance(named, FunctionType) or not isinstance(values, tuple):  # we alone put functions there
            _refuse("it calls something other than a function")
        self.stack.append(named(self, *values))

    def build(self) -> None:
        state = self.stack.pop()
        place = self.stack[-1]
        if not isinstance(state, tuple):
            _refuse("it sets the state of something by other than a tuple")
        if isinstance(place, _Type):
            place.set_state(*state)
        elif isinstance(place, _Unfilled):
            _, shape, number, by_columns, content = state
            self.stack[-1] = place.array = self.array(shape, number, "F" if by_columns else "C", content)
        else:
            _refuse("it sets the state of something other than an array")

    def use(self, content: object) -> bytes | bytearray:
        """The bytes that a text stands for, or an array is made of.

        An honest pickle uses each of its bytes twice at most, from text to bytes and from bytes to array. One that
        uses the same ones again and again could fill the memory.
        """
        if not isinstance(content, (str, bytes, bytearray)):
            _refuse("it has an array of other things than bytes")
        self.used += len(content)
        if self.used > 2 * self.size:
            _refuse("it uses the same bytes again and again")
        return content.encode("latin1") if isinstance(content, str) else content

    def array(self, shape: object, number: object, order: object, content: object) -> np.ndarray:
        if not isinstance(shape, tuple) or len(shape) > MOST_AXES or not all(isinstance(side, int) for side in shape):
            _refuse("it has an array of no shape")
        if order not in ("C", "F") or any(side < 0 for side in shape):
            _refuse("it has an array of no order")
        if not isinstance(number, _Type):
            _refuse("it has an array of no type")
        kind = np.dtype(number.name).newbyteorder(number.order)
        content = self.use(content)
        if math.prod(shape) * kind.itemsize != len(content):
            _refuse(f"it has an array of {len(content):,} bytes that is to be of shape {shape}")
        if number.name == "b1":  # NumPy relies on it that the bytes of such an array are 0 and 1
            return np.ndarray(shape, np.uint8, content, order=order) != 0
        return np.ndarray(shape, kind, content, order=order)


def _checked(number: int) -> int:
    if not -(2**63) <= number < 2**64:  # many larger ones can have one hash, as keys of a dict that takes for ever
        _refuse("it has a number of more than 64 bits")
    return number


def _text_or_bytes(found: bytes) -> str | bytes:
    return found if len(found) > LONGEST_TEXT else found.decode("latin1")


# Each stands for a name in a pickle, and takes the reader and the values that the pickle gives.


def _ndarray(reader: _Reader) -> NoReturn:
    _refuse("it makes an array by itself")


def _dtype(reader: _Reader, name: str, align: object = False, copy: object = False) -> _Type:
    if not isinstance(name, str) or name not in NUMBERS:
        _refuse("it has an array of other things than numbers")
    return _Type(name)


def _reconstruct(reader: _Reader, kind: object, shape: object, letter: object) -> _Unfilled:
    if kind is not _ndarray:
        _refuse("it has an array of a kind of its own")
    return _Unfilled()


def _frombuffer(
    reader: _Reader, content: object, number: object, shape: object, order: object, axes: tuple | None = None
) -> np.ndarray:
    if order == "K" and axes is not None:
        return reader.array(shape, number, "C", content).transpose(axes)
    return reader.array(shape, number, order, content)


def _scalar(reader: _Reader, number: object, content: object) -> np.generic:
    return reader.array((), number, "C", content)[()]


def _encode(reader: _Reader, text: object, encoding: object) -> bytes | bytearray:
    if encoding not in ("latin1", "latin-1"):
        _refuse("it encodes a text in another way than Latin-1")
    return reader.use(text)


def _empty(reader: _Reader) -> bytes:
    return b""


# All that a pickle may name: what NumPy 1 and 2 name for arrays, and what Python 3 names for bytes where Python 2
# is to read them.
_NAMED = {
    "numpy.ndarray": _ndarray,
    "numpy.dtype": _dtype,
    "multiarray._reconstruct": _reconstruct,
    "multiarray.scalar": _scalar,
    "numeric._frombuffer": _frombuffer,
    "_codecs.encode": _encode,
    "__builtin__.bytes": _empty,
    "builtins.bytes": _empty,
}


def _pushing(make):
    """A step that puts on the stack what `make` finds."""

    def step(reader: _Reader) -> None:
        value = make(reader)  # may itself change which stack is the reader's
        reader.stack.append(value)

    return step


_STEPS = {
    pickle.PROTO: lambda reader: reader.read(1),
    pickle.FRAME: lambda reader: reader.read(8),
    pickle.NONE: _pushing(lambda reader: None),
    pickle.NEWTRUE: _pushing(lambda reader: True),
    pickle.NEWFALSE: _pushing(lambda reader: False),
    pickle.INT: _pushing(_Reader.decimal),
    pickle.LONG: _pushing(_Reader.decimal),
    pickle.BININT: _pushing(lambda reader: reader.signed(4)),
    pickle.BININT1: _pushing(lambda reader: reader.unsigned(1)),
    pickle.BININT2: _pushing(lambda reader: reader.unsigned(2)),
    pickle.LONG1: _pushing(lambda reader: reader.signed(reader.unsigned(1))),
    pickle.LONG4: _pushing(lambda reader: reader.signed(reader.unsigned(4))),
    pickle.FLOAT: _pushing(lambda reader: float(reader.line(LONGEST_NUMBER))),
    pickle.BINFLOAT: _pushing(lambda reader: struct.unpack(">d", reader.read(8))[0]),
    pickle.STRING: _pushing(_Reader.escaped_bytes),
    pickle.BINSTRING: _pushing(lambda reader: _text_or_bytes(reader.read(reader.unsigned(4)))),
    pickle.SHORT_BINSTRING: _pushing(lambda reader: _text_or_bytes(reader.read(reader.unsigned(1)))),
    pickle.UNICODE: _pushing(_Reader.escaped_text),
    pickle.BINUNICODE: _pushing(lambda reader: reader.text(reader.unsigned(4))),
    pickle.SHORT_BINUNICODE: _pushing(lambda reader: reader.text(reader.unsigned(1))),
    pickle.BINUNICODE8: _pushing(lambda reader: reader.text(reader.unsigned(8))),
    pickle.BINBYTES: _pushing(lambda reader: reader.read(reader.unsigned(4))),
    pickle.SHORT_BINBYTES: _pushing(lambda reader: reader.read(reader.unsigned(1))),
    pickle.BINBYTES8: _pushing(lambda reader: reader.read(reader.unsigned(8))),
    pickle.BYTEARRAY8: _pushing(lambda reader: reader.read(reader.unsigned(8))),
    pickle.MARK: _Reader.mark,
    pickle.EMPTY_LIST: _pushing(lambda reader: []),
    pickle.LIST: _pushing(_Reader.since_mark),
    pickle.APPEND: lambda reader: reader.extend([reader.stack.pop()]),
    pickle.APPENDS: lambda reader: reader.extend(reader.since_mark()),
    pickle.EMPTY_TUPLE: _pushing(lambda reader: ()),
    pickle.TUPLE: _pushing(lambda reader: tuple(reader.since_mark())),
    pickle.TUPLE1: _pushing(lambda reader: reader.uppermost(1)),
    pickle.TUPLE2: _pushing(lambda reader: reader.uppermost(2)),
    pickle.TUPLE3: _pushing(lambda reader: reader.uppermost(3)),
    pickle.EMPTY_DICT: _pushing(lambda reader: {}),
    pickle.DICT: _Reader.new_dict,
    pickle.SETITEM: lambda reader: reader.set_items(reader.uppermost(2)),
    pickle.SETITEMS: lambda reader: reader.set_items(reader.since_mark()),
    pickle.GET: lambda reader: reader.recall(reader.decimal()),
    pickle.BINGET: lambda reader: reader.recall(reader.unsigned(1)),
    pickle.LONG_BINGET: lambda reader: reader.recall(reader.unsigned(4)),
    pickle.PUT: lambda reader: reader.remember(reader.decimal()),
    pickle.BINPUT: lambda reader: reader.remember(reader.unsigned(1)),
    pickle.LONG_BINPUT: lambda reader: reader.remember(reader.unsigned(4)),
    pickle.MEMOIZE: lambda reader: reader.remember(len(reader.memo)),
    pickle.GLOBAL: lambda reader: reader.name(reader.line(99).decode(), reader.line(99).decode()),
    pickle.STACK_GLOBAL: lambda reader: reader.name(*reader.uppermost(2)),
    pickle.REDUCE: _Reader.call,
    pickle.BUILD: _Reader.build,
}
