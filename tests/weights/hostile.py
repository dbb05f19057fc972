"""Tables of files that pretend to be a .pth of tensors, and of what is said of them.

They are what attackers write, what broken disks leave and what other programs mean; `forged` has their parts.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

from tests.weights.forged import (
    GOOD,
    HELD,
    HOOKS,
    MEMORY,
    NUMBERS,
    REBUILD,
    TRUE_END,
    End,
    Entry,
    call,
    deflated,
    integer,
    integers,
    memory,
    named,
    sizes_behind,
    state,
    tensor,
    text,
    torch_file,
    zip64_record,
    zipped,
)

# What runs a shell command where it is unpickled


def _python(command: str) -> bytes:
    return text(f"__import__('os').system({command!r})")


def _shell(command: str) -> bytes:
    return b"(" + text("sh") + text("-c") + text(command) + b"t"


def _inner(command: str) -> bytes:
    pickled = b"\x80\x02" + call("os", "system", text(command)) + b"."
    return b"B" + struct.pack("<I", len(pickled)) + pickled


def _value(build: Callable[[str], bytes]) -> Callable[[str], bytes]:
    return lambda command: state(text("w") + build(command))


_IMPORT = call("builtins", "__import__", text("os"))

RUNNING: dict[str, tuple[Callable[[str], bytes], str]] = {
    "os.system": (_value(lambda c: call("os", "system", text(c))), r"names 'os\.system'"),
    "posix.system": (_value(lambda c: call("posix", "system", text(c))), r"names 'posix\.system'"),
    "eval": (_value(lambda c: call("builtins", "eval", _python(c))), r"names 'builtins\.eval'"),
    "eval of Python 2": (_value(lambda c: call("__builtin__", "eval", _python(c))), r"names '__builtin__\.eval'"),
    "exec": (_value(lambda c: call("builtins", "exec", _python(c))), r"names 'builtins\.exec'"),
    "getattr": (
        _value(lambda c: call("builtins", "getattr", _IMPORT, text("system")) + text(c) + b"\x85R"),
        r"names 'builtins\.getattr'",
    ),
    "import": (
        _value(lambda c: b"(" + _IMPORT + call("os", "system", text(c)) + b"t"),
        r"names 'builtins\.__import__'",
    ),
    "check_output": (
        _value(lambda c: call("subprocess", "check_output", _shell(c))),
        r"names 'subprocess\.check_output'",
    ),
    "partial": (
        _value(lambda c: call("functools", "partial", named("os", "system"), text(c)) + b")R"),
        r"names 'functools\.partial'",
    ),
    "attrgetter": (
        _value(lambda c: call("operator", "attrgetter", text("system")) + _IMPORT + b"\x85R" + text(c) + b"\x85R"),
        r"names 'operator\.attrgetter'",
    ),
    "methodcaller": (
        _value(lambda c: call("operator", "methodcaller", text("system"), text(c)) + _IMPORT + b"\x85R"),
        r"names 'operator\.methodcaller'",
    ),
    "a pickle in a pickle": (_value(lambda c: call("pickle", "loads", _inner(c))), r"names 'pickle\.loads'"),
    "STACK_GLOBAL": (
        _value(lambda c: text("os") + text("system") + b"\x93" + text(c) + b"\x85R"),
        r"names 'os\.system'",
    ),
    "dotted STACK_GLOBAL": (
        lambda c: b"\x80\x04}(" + text("w") + text("shutil") + text("os.system") + b"\x93" + text(c) + b"\x85Ru.",
        r"names 'shutil\.os\.system'",
    ),
    "names from the memo": (
        lambda c: state(
            text("os") + b"q\0N" + text("system") + b"q\1N" + text("w") + b"h\0h\1\x93" + text(c) + b"\x85R"
        ),
        r"names 'os\.system'",
    ),
    "INST": (_value(lambda c: b"(" + text(c) + b"ios\nsystem\n"), "needs: INST"),
    "OBJ": (_value(lambda c: b"(" + named("os", "system") + text(c) + b"o"), r"names 'os\.system'"),
    "before the dict": (
        lambda c: b"\x80\x02" + call("os", "system", text(c)) + b"0}(" + GOOD + b"u.",
        r"names 'os\.system'",
    ),
    "for a key": (lambda c: state(call("os", "system", text(c)) + tensor()), r"names 'os\.system'"),
    "for a state": (
        lambda c: b"\x80\x02" + HOOKS + b"}" + text("_metadata") + call("os", "system", text(c)) + b"sb.",
        r"names 'os\.system'",
    ),
    "after a tensor": (lambda c: state(text("v") + b"N" + text("w") + call("os", "system", text(c))), r"'os\.system'"),
    "for a tensor's memory": (
        lambda c: state(text("w") + b"(" + text("storage") + call("os", "system", text(c)) + b"t"),
        r"names 'os\.system'",
    ),
}
"""By name, a pickle that runs a given shell command under the standard library, and what the refusal says."""


# Pickles that do no harm, or none that can be shown here


def _laughs(levels: int) -> bytes:
    steps = [b"](" + 10 * text("ha") + b"eq\0"]
    steps += [b"](" + 10 * (b"h" + bytes([i])) + b"eq" + bytes([i + 1]) for i in range(levels)]
    return b"(" + b"".join(steps) + b"t"


_ITEM = HOOKS + text("a") + b"Ns"
_BYTES = memory(kind=("torch", "ByteStorage"), count=24)


def _later(held: bytes, hooks: bytes, dtype: bytes) -> bytes:
    numbers = integer(0) + integers((2, 3)) + integers((3, 1))
    return call("torch._utils", "_rebuild_tensor_v3", held, numbers, b"\x89", hooks, dtype)


PICKLES: dict[str, tuple[Callable[[], bytes], str]] = {
    "torch.load": (lambda: state(text("w") + call("torch", "load", text("x"))), r"names 'torch\.load'"),
    "a class of Popen": (lambda: state(text("w") + named("subprocess", "Popen") + b")\x81"), r"'subprocess\.Popen'"),
    "a module": (lambda: state(text("w") + named("torch.nn.modules.linear", "Linear")), r"'torch\.nn\.modules\.linear"),
    "a near name": (lambda: state(text("w") + named("torch", "FloatStorage.x")), r"'torch\.FloatStorage\.x'"),
    "a name of two lines": (lambda: b"\x80\x02cos", "ends too soon"),
    "a backslash in a name": (lambda: state(named("to\\qrch", "\\x41")), "names"),
    "NEWOBJ": (lambda: state(text("w") + named("collections", "OrderedDict") + b")\x81"), "needs: NEWOBJ"),
    "NEWOBJ_EX": (lambda: state(text("w") + named("collections", "OrderedDict") + b")}\x92"), "needs: NEWOBJ_EX"),
    "STACK_GLOBAL of a module that is no text": (lambda: state(b"N" + text("x") + b"\x93"), "other than text"),
    "STACK_GLOBAL of an attribute that is no text": (lambda: state(text("os") + b"N\x93"), "other than text"),
    "EXT1": (lambda: state(text("w") + b"\x82\1"), "needs: EXT1"),
    "EXT2": (lambda: state(text("w") + b"\x83\1\1"), "needs: EXT2"),
    "EXT4": (lambda: state(text("w") + b"\x84\1\1\1\1"), "needs: EXT4"),
    "BUILD of a dict": (lambda: b"\x80\x02}}" + text("__class__") + b"Nsb.", r"state of a dict \(BUILD\)"),
    "BUILD of a tensor": (lambda: state(text("w") + tensor() + b"}b"), r"state of a tensor \(BUILD\)"),
    "BUILD of a name": (lambda: state(text("w") + REBUILD + b"}" + text("__code__") + b"Nsb"), r"state of a name"),
    "BUILD of another attribute": (
        lambda: b"\x80\x02" + HOOKS + b"}" + text("__class__") + b"Nsb.",
        r"state of a OrderedDict \(BUILD\)",
    ),
    "BUILD of a state and slots": (lambda: b"\x80\x02" + HOOKS + b"N}\x86b.", r"state of a OrderedDict \(BUILD\)"),
    "PERSID": (lambda: state(text("w") + b"P0\n"), "needs: PERSID"),
    "BINPERSID of text": (lambda: state(text("w") + text("storage") + b"Q"), "BINPERSID"),
    "BINPERSID of a short tuple": (lambda: state(text("w") + text("storage") + b"\x85Q"), "BINPERSID"),
    "BINPERSID of a module": (
        lambda: state(text("w") + b"(" + text("module") + memory()[1:].replace(text("storage"), b"")),
        "BINPERSID",
    ),
    "BINPERSID of the wrong class": (lambda: state(text("w") + memory(kind=("torch", "Size"))), "BINPERSID"),
    "BINPERSID of fewer than no elements": (lambda: state(text("w") + memory(count=-1)), "BINPERSID"),
    "BINPERSID of True elements": (
        lambda: state(text("w") + memory().replace(integer(6) + b"tQ", b"\x88tQ")),
        "BINPERSID",
    ),
    "recalling what was never memorised": (lambda: state(text("w") + b"h\7"), "recalls value 7, of 0"),
    "recalling the value to come": (lambda: state(text("w") + b"Nq\0h\1"), "recalls value 1, of 1"),
    "recalling far away": (lambda: state(text("w") + b"j\xff\xff\xff\xff"), "recalls value 4294967295, of 0"),
    "memorising far away": (lambda: state(text("w") + b"r\xff\xff\xff\xff"), "memorises value 4294967295 when"),
    "memorising nothing": (lambda: b"\x80\x02q\0.", "takes a value where there is none"),
    "billion laughs": (lambda: state(GOOD + text("v") + _laughs(12)), "nested deeper than 16 or too many"),
    "sets of one list": (
        lambda: state(
            GOOD
            + (text("v") + b"](](" + b"N" * 5000 + b"eq\0")
            + (b"c__builtin__\nset\nq\1" + b"h\0\x85R" + b"h\1h\0\x85R" * 500 + b"e")
        ),
        "nested deeper than 16 or too many",
    ),
    "a huge key": (
        lambda: state(text("w") + memory("0" * 101)),
        "BINPERSID",
    ),
    "doubled tuples": (
        lambda: state(GOOD + text("v") + b")" + b"".join(b"q\0h\0\x86" for _ in range(90))),
        "nested deeper than 16 or too many",
    ),
    "a list that holds itself": (lambda: state(GOOD + text("v") + b"]q\0h\0a"), "nested deeper than 16"),
    "a dict that holds itself": (lambda: b"\x80\x02}q\0" + text("w") + b"h\0s.", "nested deeper than 16"),
    "deep nesting": (lambda: state(GOOD + text("v") + b")" + b"\x85" * 20_000), "nested deeper than 16"),
    "deep nesting of a key": (lambda: state(b")" + b"\x85" * 20_000 + b"N"), "dict with a tuple for a key"),
    "deep nesting of lists": (lambda: state(GOOD + text("v") + b"]" * 20_000 + b"a" * 19_999), "piles up more values"),
    "endless marks": (lambda: b"\x80\x02" + b"(" * 20_000 + b".", "piles up more values"),
    "a number for a key": (lambda: state(b"K\1" + tensor()), "dict with a int for a key"),
    "a name twice": (lambda: state(GOOD + GOOD), "two values named 'w'"),
    "a key without a value": (lambda: state(GOOD + text("v")), "gives items to a dict"),
    "items for a tensor": (lambda: state(text("w") + tensor() + text("v") + b"Ns"), "gives items to a tensor"),
    "an append to a dict": (lambda: state(text("w") + b"}Na"), "appends to a dict"),
    "REDUCE of nothing": (lambda: b"\x80\x02R.", "takes a value where there is none"),
    "REDUCE of a tensor": (lambda: state(text("w") + tensor() + b")R"), r"calls a tensor in a way"),
    "REDUCE of a storage class": (lambda: state(text("w") + call("torch", "FloatStorage", integer(9))), "calls torch"),
    "REDUCE with a list": (lambda: state(text("w") + named("collections", "OrderedDict") + b"]R"), "calls collections"),
    "TUPLE below a mark": (lambda: state(text("w") + b"N(\x85"), "takes a value where there is none"),
    "TUPLE without a mark": (lambda: b"\x80\x02Nt.", "back to a mark that it never made"),
    "nothing at STOP": (lambda: b"\x80\x02.", "takes a value where there is none"),
    "a mark at STOP": (lambda: b"\x80\x02(}.", "leaves values behind"),
    "too much at STOP": (lambda: b"\x80\x02N}.", "leaves values behind"),
    "no STOP": (lambda: state(GOOD)[:-1], "ends too soon"),
    "an empty pickle": (lambda: b"", "ends too soon"),
    "more after STOP": (lambda: state(GOOD) + b"}.", "goes on after STOP"),
    "another pickle after STOP": (lambda: state(GOOD) + state(GOOD), "goes on after STOP"),
    "an unknown step": (lambda: b"\x80\x02\xff.", "unknown step 0xff"),
    "protocol 9": (lambda: b"\x80\x09}.", "unknown protocol"),
    "PROTO later": (lambda: b"\x80\x02}\x80\x02.", "unknown protocol"),
    "a huge LONG4": (lambda: state(text("w") + b"\x8b\xff\xff\xff\x7f"), "needs: LONG4"),
    "a LONG1 that is cut": (lambda: b"\x80\x02\x8a\xff.", "ends too soon"),
    "a huge BINBYTES8": (lambda: state(text("w") + b"\x8e" + b"\xff" * 7 + b"\x7f"), "needs: BINBYTES8"),
    "a huge BYTEARRAY8": (lambda: state(text("w") + b"\x96" + b"\xff" * 7 + b"\x7f"), "needs: BYTEARRAY8"),
    "a huge BINUNICODE8": (lambda: state(text("w") + b"\x8d" + b"\xff" * 8), "ends too soon"),
    "a huge BINUNICODE": (lambda: state(text("w") + b"X\xff\xff\xff\xff"), "ends too soon"),
    "a huge INT": (lambda: state(text("w") + b"I" + b"9" * 10_000 + b"\n"), "needs: INT"),
    "text that is not UTF-8": (lambda: state(b"X\2\0\0\0\xed\xa0N"), "not UTF-8"),
    "DUP": (lambda: state(text("w") + tensor() + b"2"), "needs: DUP"),
    "a buffer from outside": (lambda: state(text("w") + b"\x97"), "needs: NEXT_BUFFER"),
    "a class for a value": (lambda: state(GOOD + text("v") + named("torch", "Size")), "a name within the values"),
    "memory for a value": (lambda: state(GOOD + text("v") + memory()), "a tensor's memory within the values"),
    "a tensor in a value": (lambda: state(GOOD + text("v") + tensor() + b"\x85"), "a tensor within the values"),
    "two wrappers": (
        lambda: state(text("model") + b"}(" + GOOD + b"u" + text("module") + b"}(" + GOOD + b"u"),
        "tensors in both 'module' and 'model'",
    ),
    "wrappers in wrappers": (
        lambda: state(text("model") + b"}(" + text("model") + b"}(" + GOOD + b"uu"),
        "holds no tensors|a tensor within",
    ),
    "a list of tensors": (lambda: b"\x80\x02](" + tensor() + b"e.", "it holds a list"),
    "no tensors": (lambda: state(text("v") + b"N"), "holds no tensors"),
    # Tensors that are not within their memory
    "memory that is not there": (lambda: state(text("w") + tensor(memory("1"))), "'1' of a tensor is not in the zip"),
    "memory outside data": (lambda: state(text("w") + tensor(memory("../data.pkl"))), "is not in the zip"),
    "more memory than its entry": (lambda: state(text("w") + tensor(memory(count=7))), "7 elements .* the 24 bytes"),
    "huge memory": (lambda: state(text("w") + tensor(memory(count=2**62))), "for the 24 bytes"),
    "memory of two dtypes": (
        lambda: state(GOOD + text("v") + tensor(memory(kind=("torch", "IntStorage")))),
        "two dtypes or sizes",
    ),
    "a shape beyond its memory": (lambda: state(text("w") + tensor(shape=(3, 3))), "reaches element 8 of 6"),
    "an offset beyond its memory": (lambda: state(text("w") + tensor(offset=1)), "reaches element 6 of 6"),
    "a stride beyond its memory": (lambda: state(text("w") + tensor(strides=(4, 1))), "reaches element 6 of 6"),
    "a negative offset": (lambda: state(text("w") + tensor(offset=-1)), "not a whole number from 0"),
    "a negative size": (lambda: state(text("w") + tensor(shape=(-2, -3))), "not a whole number from 0"),
    "a negative stride": (lambda: state(text("w") + tensor(offset=5, strides=(-3, -1))), "not a whole number"),
    "an offset of 1.0": (
        lambda: state(text("w") + tensor().replace(integer(0), b"G" + struct.pack(">d", 0.0))),
        "not a whole number",
    ),
    "a shape that overflows": (
        lambda: state(text("w") + tensor(shape=(2**32, 2**32), strides=(2**32, 1))),
        "reaches element 18446744073709551615 of 6",
    ),
    "a stride that overflows": (lambda: state(text("w") + tensor(strides=(2**62, 1))), "reaches element"),
    "a stride beyond all memory": (lambda: state(text("w") + tensor(strides=(2**99, 1))), "not a whole number"),
    "an empty shape that overflows": (
        lambda: state(text("w") + tensor(shape=(0, 2**62), strides=(1, 1))),
        "empty, but of an offset or a shape too large",
    ),
    "expanded": (lambda: state(text("w") + tensor(shape=(10**9, 3), strides=(0, 1))), "repeats its own elements"),
    "overlapping": (lambda: state(text("w") + tensor(shape=(4, 3), strides=(1, 1))), "repeats its own elements"),
    "a shape without strides": (lambda: state(text("w") + tensor(strides=())), "do not go together"),
    "strides in a list": (
        lambda: state(text("w") + tensor().replace(integers((3, 1)), b"](" + integer(3) + integer(1) + b"e")),
        "do not go together",
    ),
    "an empty tensor beyond its memory": (
        lambda: state(text("w") + tensor(offset=7, shape=(0, 3))),
        "empty, but of an offset",
    ),
    "a shape of one number": (
        lambda: state(text("w") + tensor().replace(integers((2, 3)), integer(6))),
        "do not go together",
    ),
    "too many dimensions": (lambda: state(text("w") + tensor(shape=(1,) * 99, strides=(1,) * 99)), "99 dimensions"),
    "many times the same memory": (
        lambda: state(
            b"".join(
                text(f"w{i}") + tensor(memory("big", count=10**5), shape=(10**5,), strides=(1,)) for i in range(40)
            )
        ),
        "more than 16 times the file",
    ),
    "hooks": (
        lambda: state(text("w") + tensor(tail=b"\x89" + HOOKS + text("a") + b"Ns")),
        "calls torch._utils._rebuild_tensor_v2 in a way",
    ),
    "hooks of a parameter": (
        lambda: state(text("w") + call("torch._utils", "_rebuild_parameter", tensor(), b"\x88", _ITEM)),
        "calls torch._utils._rebuild_parameter in a way",
    ),
    "hooks of a dtype without memory of its own": (
        lambda: state(text("w") + _later(_BYTES, _ITEM, named("torch", "uint16"))),
        "calls torch._utils._rebuild_tensor_v3 in a way",
    ),
    "bytes seen as what is no dtype": (
        lambda: state(text("w") + _later(_BYTES, HOOKS, named("torch", "Size"))),
        "calls torch._utils._rebuild_tensor_v3 in a way",
    ),
    "numbers seen as another dtype": (
        lambda: state(text("w") + _later(HELD, HOOKS, named("torch", "uint16"))),
        "calls torch._utils._rebuild_tensor_v3 in a way",
    ),
    "a sign to flip": (
        lambda: state(text("w") + tensor(tail=b"\x89" + HOOKS + b"}" + text("neg") + b"\x88s")),
        "calls torch._utils._rebuild_tensor_v2 in a way",
    ),
    "complex numbers": (
        lambda: state(text("w") + memory(kind=("torch", "ComplexFloatStorage"))),
        "ComplexFloatStorage",
    ),
    "quantised numbers": (lambda: state(text("w") + named("torch._utils", "_rebuild_qtensor")), "_rebuild_qtensor"),
    "a sparse tensor": (lambda: state(text("w") + named("torch._utils", "_rebuild_sparse_tensor")), "_sparse_tensor"),
}
"""By name, a pickle and what the refusal says."""


_ZEROS = Entry("x/data/0", bytes(24))

FILES: dict[str, tuple[Callable[[], bytes], str]] = {
    "an empty file": (lambda: b"", "it is empty"),
    "text": (lambda: b"version https://git-lfs.github.com/spec/v1\n" * 9, "is not a zip by torch.save"),
    "a program before the zip": (lambda: b"\x7fELF" + torch_file(), "is not a zip by torch.save"),
    "a bare pickle": (lambda: b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19." + state(GOOD), "before 1.6"),
    "a bare pickle of protocol 5": (lambda: b"\x80\5" + state(GOOD)[2:], "before 1.6"),
    "a pickle of no protocol": (lambda: b"\x80\xff" + bytes(300), "is not a zip by torch.save"),
    "numbers alone": (lambda: bytes(300), "is not a zip by torch.save"),
    "a tar": (lambda: b"sys_info".ljust(257, b"\0") + b"ustar\x0000" + bytes(800), "before 1.6"),
    "a zip of other things": (lambda: zipped([Entry("x/y.npy", b"1")]), "no NAME/data.pkl"),
    "a zip of nothing": (lambda: zipped([]), "is not a zip by torch.save"),
    "two folders": (lambda: torch_file(state(GOOD), Entry("y/data.pkl", state(GOOD))), "no NAME/data.pkl"),
    "TorchScript": (lambda: torch_file(state(GOOD), Entry("x/constants.pkl")), "TorchScript"),
    "TorchScript's code": (lambda: torch_file(state(GOOD), Entry("x/code/a.py", method=8)), "TorchScript"),
    "big-endian": (lambda: torch_file(state(GOOD), Entry("x/byteorder", b"big")), "big-endian"),
    "little-endian or so": (lambda: torch_file(state(GOOD), Entry("x/byteorder", b"little" * 9)), "big-endian"),
    "a compressed zip": (lambda: deflated(state(GOOD)), "is compressed"),
    "a zip bomb": (lambda: deflated(bytes(20_000_000)), "is compressed"),
    "a zip bomb in disguise": (lambda: torch_file(state(GOOD), MEMORY._replace(claimed=2**31)), "outside the file"),
    "two sizes": (lambda: torch_file(state(GOOD), MEMORY._replace(packed=20)), "has 20 bytes and claims 24"),
    "an unknown method": (lambda: torch_file(state(GOOD), MEMORY._replace(method=99)), "is compressed"),
    "an encrypted entry": (lambda: torch_file(state(GOOD), MEMORY._replace(flags=1)), "encrypted"),
    "an entry encrypted in its own words": (
        lambda: torch_file(state(GOOD), MEMORY._replace(local_flags=1)),
        "contradict each other",
    ),
    "a name twice in the zip": (lambda: torch_file(state(GOOD), MEMORY, MEMORY), "two entries named 'x/data/0'"),
    "another name in its own words": (
        lambda: torch_file(state(GOOD), MEMORY._replace(local_name="x/data/1")),
        "contradict each other",
    ),
    "another size in its own words": (
        lambda: torch_file(state(GOOD), MEMORY._replace(local_claimed=20)),
        "contradict each other",
    ),
    "another checksum in its own words": (
        lambda: torch_file(state(GOOD), MEMORY._replace(local_checksum=0)),
        "contradict each other",
    ),
    "no size in its own words": (
        lambda: torch_file(state(GOOD), MEMORY._replace(local_claimed=0, local_checksum=0)),
        "contradict each other",
    ),
    "another size in its own words, and the true one behind": (
        lambda: torch_file(state(GOOD), sizes_behind(MEMORY)._replace(local_claimed=20)),
        "contradict each other",
    ),
    "another checksum behind": (
        lambda: torch_file(state(GOOD), sizes_behind(MEMORY)._replace(behind=sizes_behind(_ZEROS).behind)),
        "contradict each other",
    ),
    "sizes that never follow": (lambda: torch_file(state(GOOD), MEMORY._replace(flags=8)), "contradict each other"),
    "an absolute name": (lambda: torch_file(state(GOOD), Entry("/etc/passwd")), "not a plain path: '/etc/passwd'"),
    "a name with ..": (lambda: torch_file(state(GOOD), Entry("x/../../y")), "not a plain path"),
    "a name with a backslash": (lambda: torch_file(state(GOOD), Entry("x\\..\\y")), "not a plain path"),
    "a name with NUL": (lambda: torch_file(state(GOOD), Entry("x/data/0\0")), "not a plain path"),
    "a folder": (lambda: torch_file(state(GOOD), Entry("x/data/")), "not a plain path"),
    "no name": (lambda: torch_file(state(GOOD), Entry("")), "not a plain path: ''"),
    "a name that is not UTF-8": (lambda: torch_file().replace(b"x/data/0", b"x/data/\xff"), "not UTF-8"),
    "entries in one place": (
        lambda: torch_file(state(GOOD), MEMORY, MEMORY._replace(name="x/data/1", at=0)),
        "contradict",
    ),
    "an entry in another": (lambda: _inside_another(), "overlaps another"),
    "an entry over the directory": (
        lambda: torch_file(state(GOOD), MEMORY._replace(claimed=80)),
        "overlaps another or the directory",
    ),
    "an entry beyond the file": (lambda: torch_file(state(GOOD), MEMORY._replace(at=2**31)), "outside the file"),
    "more entries than there are": (lambda: torch_file(end=End(count=4)), "claims 4 entries|within an entry"),
    "more entries than there are, in longer ones": (
        lambda: torch_file(state(GOOD), MEMORY._replace(extra=b"FB\x28\0" + bytes(40)), end=End(count=4)),
        "directory ends within an entry",
    ),
    "a name beyond the directory": (lambda: _patched(b"PK\1\2", 28, b"\xff\0"), "directory ends within an entry"),
    "entries of another disk": (lambda: _patched(b"PK\5\6", 8, b"\2\0"), "several disks"),
    "far more entries than there are": (
        lambda: torch_file(end=End(count=60_000)),
        "claims 60000 entries in a directory of",
    ),
    "fewer entries than there are": (lambda: torch_file(end=End(count=2)), "longer than its entries"),
    "a directory elsewhere": (lambda: torch_file(end=End(start=0)), "directory is not where"),
    "a comment that is not there": (lambda: torch_file()[:-2] + b"\5\0", "directory is not where"),
    "a comment": (lambda: torch_file(end=End(comment=b"hello")), "does not end as a zip"),
    "several disks": (lambda: torch_file(end=End(disk=1)), "several disks"),
    "an entry of another disk": (lambda: torch_file(state(GOOD), MEMORY._replace(disk=1)), "several"),
    "more after the zip": (lambda: torch_file() + b"MZ", "does not end as a zip"),
    "something before its end": (lambda: torch_file(end=End(before=bytes(8))), "directory is not where"),
    "a zip64 record elsewhere": (
        lambda: torch_file(end=End(before=zip64_record(3, 1, 1, at=0))),
        "zip64 record is not where",
    ),
    "a zip64 record away from its pointer": (
        lambda: _with_record(lambda n, size, start: (n, size, start), between=bytes(8)),
        "zip64 record is not where",
    ),
    "a zip64 record of other bytes": (
        lambda: _with_record(lambda n, size, start: (n, size, start)).replace(b"PK\6\6", b"PK\6\5"),
        "zip64 record is not where",
    ),
    "a zip64 record of another length": (
        lambda: _with_record(lambda n, size, start: (n, size, start)).replace(b"PK\6\6\x2c", b"PK\6\6\x2d"),
        "record contradicts",
    ),
    "a zip64 record that lies": (
        lambda: _with_record(lambda n, size, start: (n + 1, size, start)),
        "record contradicts",
    ),
    "a huge zip64 directory": (
        lambda: _with_record(lambda n, size, start: (n, size, start), End(count=0xFFFF, size=0xFFFFFFFF), 2**62),
        "claims 4611686018427387904 entries",
    ),
    "zip64 disks": (lambda: _with_record(lambda n, size, start: (n, size, start), disks=2), "several disks"),
    "a size for zip64 without one": (
        lambda: torch_file(state(GOOD), MEMORY._replace(claimed=2**32 - 1)),
        "zip64 field .* does not match",
    ),
    "a zip64 size that lies": (
        lambda: torch_file(
            state(GOOD), MEMORY._replace(claimed=2**32 - 1, extra=struct.pack("<2H2Q", 1, 16, 2**63, 2**63))
        ),
        "outside the file",
    ),
    "a zip64 size cut short": (
        lambda: torch_file(state(GOOD), MEMORY._replace(claimed=2**32 - 1, extra=struct.pack("<2HQ", 1, 16, 24))),
        "zip64 field .* does not match",
    ),
    "extra fields beyond their end": (
        lambda: torch_file(state(GOOD), MEMORY._replace(extra=b"FB\xff\xff")),
        "does not match",
    ),
    "a directory of other bytes": (lambda: torch_file().replace(b"PK\1\2", b"PK\1\3"), "not a list of entries"),
    "a local header of other bytes": (lambda: b"PK\3\4" + torch_file()[4:].replace(b"PK\3\4", b"PK\3\5"), "contradict"),
    "cut in the middle": (lambda: torch_file()[:200], "does not end as a zip"),
    "cut at the end": (lambda: torch_file()[:-1], "does not end as a zip"),
    "its end within its start": (lambda: b"PK\3\4PK\5\6" + bytes(5), "does not end as a zip"),
    "its end alone": (lambda: torch_file()[-22:], "is not a zip"),
}
"""By name, a file and what the refusal says."""


def _inside_another() -> bytes:
    inner = zipped([Entry("x/data/1", bytes(4))])
    inner = inner[: inner.index(b"PK\1\2")]
    content = NUMBERS.tobytes() + inner
    at = zipped([Entry("x/data.pkl", state(GOOD)), Entry("x/data/0", content)]).index(inner)
    outer = zipped([Entry("x/data.pkl", state(GOOD)), Entry("x/data/0", content), Entry("x/data/1", bytes(4), at=at)])
    return outer


def _patched(signature: bytes, offset: int, content: bytes) -> bytes:
    """Other bytes in the last header that begins so."""
    true = torch_file()
    at = true.rindex(signature) + offset
    return true[:at] + content + true[at + len(content) :]


def _with_record(
    lie: Callable[[int, int, int], tuple[int, int, int]],
    end: End = TRUE_END,
    count: int = 3,
    disks: int = 1,
    between: bytes = b"",
) -> bytes:
    plain = torch_file()
    start = plain.index(b"PK\1\2")
    size = len(plain) - 22 - start
    claimed = lie(count, size, start)
    record = zip64_record(*claimed, at=start + size, disks=disks)
    pointer = record.index(b"PK\6\7")
    return torch_file(end=end._replace(before=record[:pointer] + between + record[pointer:]))
