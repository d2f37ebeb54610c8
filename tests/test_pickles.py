"""data/pickles.py: what the published pickles hold is read, and nothing that a stranger's pickle says touches memory.

As a program it is the fuzzer, and ends with a traceback or a signal where one is to be had:

    python tests/test_pickles.py 100000
"""

import contextlib
import io
import itertools
import json
import pickle
import pickletools
import random
import re
import resource
import struct
import subprocess
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

DATA = Path(__file__).resolve().parents[1] / "data"
sys.path[:0] = [str(DATA), str(DATA / "miniImagenet")]

import proc_images  # noqa: E402

import archive  # noqa: E402
import pickles  # noqa: E402

# ------------------------------------------------------------------------------ as Python 2 and NumPy 1 wrote them


class Python2Pickler(pickle._Pickler):
    """Writes text and bytes as Python 2 did, which had one type for both."""

    dispatch = pickle._Pickler.dispatch.copy()

    def save_string(self, value):
        packed = value if isinstance(value, bytes) else value.encode("latin1")
        if not self.bin:
            self.write(pickle.STRING + repr(packed)[1:].encode() + b"\n")
        elif len(packed) < 256:
            self.write(pickle.SHORT_BINSTRING + bytes([len(packed)]) + packed)
        else:
            self.write(pickle.BINSTRING + struct.pack("<i", len(packed)) + packed)
        self.memoize(value)

    dispatch[str] = dispatch[bytes] = save_string


WRITERS = {f"Python 3, protocol {protocol}": (pickle._Pickler, protocol) for protocol in range(6)}
WRITERS |= {f"Python 2, protocol {protocol}": (Python2Pickler, protocol) for protocol in range(3)}


def pickled(value: object, how: str, numpy: int = 2) -> bytes:
    """The pickle that the named writer makes, with the names of NumPy 1 or 2."""
    written = io.BytesIO()
    pickler, protocol = WRITERS[how]
    pickler(written, protocol=protocol).dump(value)
    found = written.getvalue()
    if numpy == 1:
        found = found.replace(b"cnumpy._core.", b"cnumpy.core.")
        for name in (b"multiarray", b"numeric"):
            new, old = b"numpy._core." + name, b"numpy.core." + name
            found = found.replace(b"\x8c" + bytes([len(new)]) + new, b"\x8c" + bytes([len(old)]) + old)
    return found


def load(data: bytes) -> object:
    return pickles.load(io.BytesIO(data), len(data))


def assert_same(found: object, wanted: object) -> None:
    if isinstance(wanted, np.ndarray):
        assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
        assert found.tobytes() == wanted.tobytes()
    elif isinstance(wanted, dict):
        assert list(found) == list(wanted)
        for key in wanted:
            assert_same(found[key], wanted[key])
    elif isinstance(wanted, list | tuple):
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            assert_same(one, other)
    else:
        assert found == wanted
    assert type(found) is type(wanted)


NUMBERS = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 5), np.uint8)
VALUES = {
    "plain": [None, True, False, 0, 255, 65_535, -1, 2**40, -(2**62), 2**64 - 1, 1.5, float("inf"), (), (1,), (1, 2)],
    "nested": {"a": [[], {}, ((1, 2, 3), (1, 2, 3, 4))], "b": {"c": {}, 5: "d"}},
    "text": ["", "apple", "two\nlines \\ 'and' \"quotes\"", "\xe4\xff"],
    "order": [
        NUMBERS,
        np.asfortranarray(NUMBERS),
        NUMBERS.transpose(3, 0, 1, 2),
        NUMBERS[::2, :, 1:],
        NUMBERS[0, 0, 0],
    ],
    "types": [NUMBERS.astype(kind) for kind in sorted(pickles.NUMBERS)] + [np.arange(3, dtype=">i4")],
    "sizes": [np.array(7), np.zeros((0, 3)), NUMBERS > 99, np.arange(200_000, dtype=np.uint8)],
    "scalars": [np.int64(3), np.uint8(255), np.float32(0.5), np.bool_(True)],
}
VALUES["again"] = [NUMBERS, NUMBERS, VALUES["nested"], VALUES["nested"]]


@pytest.mark.parametrize("numpy", [1, 2])
@pytest.mark.parametrize("how", WRITERS)
def test_what_every_writer_writes_is_read(how, numpy):
    for value in VALUES.values():
        assert_same(load(pickled(value, how, numpy)), value)
    again = load(pickled(VALUES["again"], how, numpy))
    assert again[0] is again[1]


@pytest.mark.parametrize("how", ["Python 3, protocol 2", "Python 3, protocol 4"])
def test_bytes_of_python_3_stay_bytes(how):
    assert_same(load(pickled([b"", b"\x00\xff", b"x" * 300], how)), [b"", b"\x00\xff", b"x" * 300])


@pytest.mark.parametrize("how", ["Python 2, protocol 2", "Python 3, protocol 2", "Python 3, protocol 5"])
def test_an_array_takes_its_memory_once(how):
    """docs/data.md promises MiniImagenet's pickles, 813 million bytes of images, in 2 GB."""
    size = 20_000_000
    written = io.BytesIO(pickled({"image_data": np.zeros(size, np.uint8)}, how))
    tracemalloc.start()
    pickles.load(written, len(written.getbuffer()))
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 1.5 * size


# ------------------------------------------------------------------------------------------------ crafted pickles


class Reduced:
    """Is pickled as a call of `function` with `values`, whose result then gets `state`."""

    def __init__(self, function, values, state=None):
        self.reduced = (function, values) if state is None else (function, values, state)

    def __reduce__(self):
        return self.reduced


RECONSTRUCT = np.empty(0).__reduce__()[0]
FROMBUFFER = np.empty(0).__reduce_ex__(5)[0]
SCALAR = np.int64().__reduce__()[0]
PLAIN = (3, "|", None, None, None, -1, -1, 0)


def dtype(name: str, state: tuple | None = PLAIN) -> Reduced:
    return Reduced(np.dtype, (name, False, True), state)


def array(kind: object, shape: object, content: object, kept: object = np.ndarray) -> Reduced:
    return Reduced(RECONSTRUCT, (kept, (0,), b"b"), (1, shape, kind, False, content))


OUTSIDE = (3, "|", None, ("a",), {"a": (np.dtype("O"), 2**40)}, 8, 1, 0)
U1 = np.dtype("u1")
P = pickle
GIVEN = b"\x80\x04"
ATTACKS = {
    # An array of objects over bytes of the pickle's choice: its elements are addresses, which NumPy follows.
    "object dtype without its flags, _frombuffer": Reduced(FROMBUFFER, (b"A" * 8, dtype("O8"), (1,), "C")),
    "object dtype without its flags, state": array(dtype("O8"), (1,), b"A" * 8),
    "object dtype without its flags, scalar": Reduced(SCALAR, (dtype("O8"), b"A" * 8)),
    "object dtype, state": array(np.dtype("O"), (1,), b"A" * 8),
    "object array": np.array([1, "a"], object),
    "a field outside its item": Reduced(FROMBUFFER, (b"A" * 8, dtype("V8", OUTSIDE), (1,), "C")),
    "a field outside its item, of numbers": Reduced(FROMBUFFER, (b"A" * 8, dtype("u8", OUTSIDE), (1,), "C")),
    "an item larger than its number": array(dtype("u1", (3, "|", None, None, None, 2**30, 1, 0)), (1,), b"A"),
    "a record": np.zeros(2, [("a", "u1")]),
    "text in an array": np.array(["a"]),
    "dates in an array": np.zeros(1, "M8[s]"),
    "an array inside an array's type": array(dtype("u1", (3, "|", (U1, (9,)), None, None, 9, 1, 0)), (1,), b"A"),
    # Content and shape that do not agree.
    "shape too large": array(U1, (10**6,), b"A"),
    "shape too small": array(U1, (1,), b"AA"),
    "shape below zero": array(U1, (-1, -1), b"A"),
    "shape beyond 64 bits": array(U1, (2**32, 2**32), b""),
    "shape of other things": array(U1, ("a",), b"A"),
    "shape of too many sides": array(U1, (1,) * 100, b"A"),
    "content of other things": array(U1, (1,), [1]),
    "order of other things": Reduced(FROMBUFFER, (b"A", U1, (1,), 7)),
    "axes that are not there": Reduced(FROMBUFFER, (b"A", U1, (1,), "K", (5,))),
    "another class for an array": array(U1, (1,), b"A", kept=np.matrix),
    "no class for an array": array(U1, (1,), b"A", kept=None),
    "a type that is none": array("u1", (1,), b"A"),
    "an array without content": Reduced(RECONSTRUCT, (np.ndarray, (0,), b"b")),
    "a type alone": U1,
    # Other functions, and other ways to call one or to set what an object holds.
    "eval": Reduced(eval, ("1",)),
    "ndarray called": Reduced(np.ndarray, ((2**40,),)),
    "a codec": Reduced(__import__("_codecs").encode, ("A", "zip")),
    "a call without a tuple": b"c__builtin__\nbytes\n]R.",
    "a call of a text": b"U\x01A)R.",
    "state of a dict": b"}}b.",
    "state of a function": b"cnumpy\nndarray\n)b.",
    "state of an array twice": b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntU\x01btR"
    + b"(I1\n(I0\ntcnumpy\ndtype\n(U\x02u1I0\nI1\ntRI00\nU\x00tb" * 2
    + b".",
    "an object": GIVEN + b"\x8c\x05numpy\x8c\x07ndarray\x93)\x81.",
    "an old object": b"(cnumpy\nndarray\no.",
    "an old object, named": b"(inumpy\nndarray\n.",
    "a name of no text": GIVEN + b"]]\x93.",
    "a name that grows when it is written out": GIVEN + b"]q\x00" + b"(h\x00h\x00lq\x00" * 60 + b"N\x93.",
    "a persistent name": b"Psomewhere\n.",
    "an extension": GIVEN + b"\x82\x01.",
    "a buffer from elsewhere": b"\x80\x05\x97.",
    # Memory and time without end.
    "LONG4 that claims 2 GB": GIVEN + P.LONG4 + struct.pack("<i", 2**31 - 1) + b"AA.",
    "BINBYTES8 that claims 2^60": GIVEN + P.BINBYTES8 + struct.pack("<Q", 2**60) + b"AA.",
    "BINBYTES8 that claims 2^33": GIVEN + P.BINBYTES8 + struct.pack("<Q", 2**33) + b"AA.",
    "BYTEARRAY8 that claims 2^33": GIVEN + P.BYTEARRAY8 + struct.pack("<Q", 2**33) + b"AA.",
    "BINUNICODE8 that claims 2^33": GIVEN + P.BINUNICODE8 + struct.pack("<Q", 2**33) + b"AA.",
    "BINSTRING below zero": GIVEN + P.BINSTRING + struct.pack("<i", -1) + b"AA.",
    "a line without end": b"I" + b"1" * 10**6,
    "a number of many digits": b"I" + b"1" * 30 + b"\n.",
    "a key nested in tuples": b"}" + b")" + P.TUPLE1 * 10**6 + b"Ns.",
    "a key whose hash takes for ever": b"}" + b")" + b"q\x00h\x00\x86" * 99 + b"Ns.",
    "the same bytes again and again": GIVEN + P.BINBYTES + struct.pack("<I", 10**6) + b"A" * 10**6 + b"q\x00"
    b"cnumpy\ndtype\n(U\x02b1I0\nI1\ntRq\x01cnumpy.core.numeric\n_frombuffer\nq\x02("
    + b"h\x02(h\x00h\x01J@B\x0f\x00\x85U\x01CtR" * 9999
    + b"l.",
    "a pickle of too many opcodes": b"}" * 2**22 + b".",
    # Damage.
    "a text that is no UTF-8": GIVEN + b"\x8c\x01\xff.",
    "half a character": GIVEN + b"\x8c\x03\xed\xa0\x80.",
    "a long text that is no Latin-1": GIVEN + P.BINUNICODE + struct.pack("<I", 90_000) + "\u20ac".encode() * 30_000,
    "a memo that is not there": b"h\x07.",
    "a list of nothing": b"N]a.",
    "a dict of three": b"(NNNd.",
    "no mark": b"t.",
    "no value": b".",
    "nothing": b"",
}
# Hold nothing else than values, whatever they are.
HARMLESS = {
    "a memo at 2^32 - 1": (b"]r" + b"\xff" * 4 + b".", []),
    "a frame that claims 2^60": (GIVEN + P.FRAME + struct.pack("<Q", 2**60) + b"N.", None),
    "truth of other bytes": (pickle.dumps(array(np.dtype("?"), (3,), b"\x00\x01\xff")), np.array([False, True, True])),
}


# Of some, what is said, where NumPy or Python would else be asked, and might refuse as well.
SAID = {
    "shape below zero": "it has an array of no order",
    "shape of too many sides": "it has an array of no shape",
    "BINBYTES8 that claims 2^33": "it declares 8,589,934,592 bytes, more than there are",
    "BINUNICODE8 that claims 2^33": "it declares 8,589,934,592 bytes, more than there are",
    "a name of no text": "it names something by other than a text",
    "a call of a text": "it calls something other than a function",
}


def attacks() -> None:
    """Reads every crafted pickle, and prints as JSON what was said of it, or ""."""
    with contextlib.suppress(ValueError, OSError):  # so that a fault here does not stop the machine
        resource.setrlimit(resource.RLIMIT_AS, (2**34, 2**34))
    with tempfile.TemporaryDirectory() as folder:
        for name, attack in ATTACKS.items():
            path = Path(folder) / "mini.pkl"
            path.write_bytes(attack if isinstance(attack, bytes) else pickle.dumps(attack, protocol=4))
            said = ""
            try:
                archive.unpickle(path)
            except SystemExit as error:
                said = str(error)
            print(json.dumps([name, said]), flush=True)


@pytest.fixture(scope="module")
def said_of_attacks() -> dict[str, str]:
    child = subprocess.run([sys.executable, __file__, "attacks"], capture_output=True, text=True, timeout=100)
    return dict(map(json.loads, child.stdout.splitlines())) | {"stderr": child.stderr, "code": str(child.returncode)}


@pytest.mark.parametrize("name", ATTACKS)
def test_a_crafted_pickle_is_refused_in_one_line(said_of_attacks, name):
    refused = (
        rf"error: .*/mini\.pkl is not a pickle of plain values and arrays \({SAID.get(name, '.+')}\): fetch it again"
    )
    assert re.fullmatch(refused, said_of_attacks.get(name, "it ended the process")), said_of_attacks


@pytest.mark.parametrize("name", HARMLESS)
def test_odd_pickles_of_values_are_read(name):
    data, value = HARMLESS[name]
    assert_same(load(data), value)


def laughs(depth: int) -> list:
    """Of some hundred bytes, but of 2^depth words if it is written out."""
    found = ["ha"]
    for _ in range(depth):
        found = [found, found]
    return found


@pytest.mark.parametrize("part", ["filenames", "fine_labels", "data", "fine_label_names"])
def test_values_that_grow_when_they_are_written_out_are_refused(tmp_path, part):
    official = {"filenames": ["a.png"], "fine_labels": [0], "data": np.zeros((1, 3072), np.uint8)}
    names = {"fine_label_names": ["apple"]}
    bomb = [laughs(60)] if part != "data" else laughs(60)
    for name, value in (("train", official), ("test", official), ("meta", names)):
        (tmp_path / name).write_bytes(pickle.dumps(value | {part: bomb}))
    started = time.monotonic()
    with pytest.raises(SystemExit, match="is not the official CIFAR-100"):
        archive.cifar100([tmp_path])
    assert time.monotonic() - started < 60  # not the age of the universe


# ------------------------------------------------------------------------------------------------------ the fuzzer

NAMES = [
    b"numpy\nndarray\n", b"numpy\ndtype\n", b"numpy.core.multiarray\n_reconstruct\n",
    b"numpy.core.multiarray\nscalar\n", b"numpy.core.numeric\n_frombuffer\n", b"_codecs\nencode\n",
    b"__builtin__\nbytes\n", b"__builtin__\neval\n",
]  # fmt: skip
LENGTHS = [0, 1, 7, 127, 128, 255, 256, 65_535, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**60, 2**63, 2**64 - 1]
TOKENS = [
    *(opcode.code.encode("latin1") for opcode in pickletools.opcodes),
    *(b"c" + name for name in NAMES),
    *(struct.pack("<Q", length)[:width] for length in LENGTHS for width in (1, 2, 4, 8) if length < 256**width),
    *(b"U\x02" + kind for kind in (b"O8", b"V8", b"u1", b"b1", b"f8", b"M8", b"i8", b"U4")),
    b"(I3\nU\x01|NNNI-1\nI-1\nI0\ntb", b"(I3\nU\x01|NU\x01a}I8\nI1\nI0\ntb", b"I-1\n", b"I99999999999\n", b"F1e400\n",
]  # fmt: skip


def seeds() -> list[bytes]:
    """Pickles as CIFAR-100's and MiniImagenet's, with little in them, by every writer."""
    pixels = np.arange(2 * 3072, dtype=np.uint8).reshape(2, 3072) // 255
    batch = {
        "filenames": ["a.png", "b.png"],
        "fine_labels": [0, 1],
        "data": pixels,
        "fine_label_names": ["apple", "bed"],
    }
    cache = {"class_dict": {"n01532829": [0, np.int64(0)]}, "image_data": np.ones((1, 84, 84, 3), np.uint8)}
    small = [
        np.asfortranarray(np.ones((2, 3), "f4")),
        NUMBERS[0, 0].T,
        np.array([True]),
        np.float64(1),
        b"\xff",
        "\xe4",
    ]
    values = (batch | cache, batch, cache, small, VALUES["nested"])
    return [pickled(value, how, numpy) for value in values for how in WRITERS for numpy in (1, 2)]


def mutated(data: bytes, others: list[bytes], chance: random.Random) -> bytes:
    for _ in range(chance.choice([1, 1, 1, 2, 8])):
        at = chance.randrange(len(data) + 1)
        if chance.random() < 0.5:  # where the opcodes are, which is rarely within the bytes of an array
            at = chance.choice([at % 300, -at % 300])
        width = chance.choice([0, 1, 1, 1, 2, 4, 8, 40])
        match chance.randrange(6):
            case 0:
                new = bytes(chance.randrange(256) for _ in range(width))
            case 1 | 2:
                new = chance.choice(TOKENS)
            case 3:
                new = data[at : at + chance.choice([1, 5, 50])] * chance.choice([1, 2, 9])
            case 4:
                other = chance.choice(others)
                start = chance.randrange(len(other))
                new = other[start : start + chance.choice([3, 30, 300])]
            case _:
                new = b""
        data = data[:at] + new + data[at + width :]
    return data


def fuzz(count: int, seed: int) -> None:
    """Reads so many mutations as the scripts do; prints how many held values, and the most memory at once, in bytes."""
    chance, whole = random.Random(seed), seeds()
    read = prepared = 0
    tracemalloc.start()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("meta", "train", "test"):
            (folder / part).write_bytes(whole[0])
        for part in ("train", "val", "test"):
            (folder / f"mini-imagenet-cache-{part}.pkl").write_bytes(whole[0])
        for number in range(count):
            data = mutated(chance.choice(whole), whole, chance)
            part = folder / ("train" if number % 2 else "mini-imagenet-cache-train.pkl")
            part.write_bytes(data)
            try:
                archive.unpickle(part)
                read += 1
                images = (
                    archive.cifar100([folder]).values()
                    if number % 2
                    else (one.images for one in proc_images.classes_of_pickles(folder))
                )
                for pixels in itertools.chain.from_iterable(one.values() for one in images):
                    pixels.sum()
                prepared += 1
            except SystemExit as error:
                assert re.fullmatch(r"error: \S+ (is not|has not) [^\n]+: fetch it again", str(error)), (
                    str(error),
                    data,
                )
    print(
        json.dumps({"count": count, "read": read, "prepared": prepared, "memory": tracemalloc.get_traced_memory()[1]})
    )


def test_mutated_pickles_are_read_or_refused_and_nothing_else():
    child = subprocess.run([sys.executable, __file__, "3000", "1"], capture_output=True, text=True)
    assert (child.returncode, child.stderr) == (0, "")
    found = json.loads(child.stdout)
    assert 200 < found["read"] < 2800  # else the mutations are too strong, or none
    assert found["memory"] < 100e6


if __name__ == "__main__":
    if sys.argv[1] == "attacks":
        attacks()
    else:
        fuzz(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
