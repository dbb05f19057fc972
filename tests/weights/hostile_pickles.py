"""Tables of pickles that pretend to be those of a .pth of tensors, and of what is said of them.

They are what attackers write, what broken disks leave and what other programs mean; `forged` has their parts.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

from tests.weights.forged import GOOD, HELD, HOOKS, REBUILD, call, integer, integers, memory, named, state, tensor, text

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
    "recalling what was never memorized": (lambda: state(text("w") + b"h\7"), "recalls value 7, of 0"),
    "recalling the value to come": (lambda: state(text("w") + b"Nq\0h\1"), "recalls value 1, of 1"),
    "recalling far away": (lambda: state(text("w") + b"j\xff\xff\xff\xff"), "recalls value 4294967295, of 0"),
    "memorizing far away": (lambda: state(text("w") + b"r\xff\xff\xff\xff"), "memorizes value 4294967295 when"),
    "memorizing nothing": (lambda: b"\x80\x02q\0.", "takes a value where there is none"),
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
    "quantized numbers": (lambda: state(text("w") + named("torch._utils", "_rebuild_qtensor")), "_rebuild_qtensor"),
    "a sparse tensor": (lambda: state(text("w") + named("torch._utils", "_rebuild_sparse_tensor")), "_sparse_tensor"),
}
"""By name, a pickle and what the refusal says."""
