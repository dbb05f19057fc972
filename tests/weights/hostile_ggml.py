"""A table of GGUF and ggmf files that contradict themselves or mean other programs, and of what is said of them."""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable

from tests.weights.files import CONFIGS
from tests.weights.forged_ggml import (
    ARRAY,
    BOOL,
    GGMF,
    GGUF,
    TEXT,
    U32,
    GGMFTensor,
    ggmf_model,
    gguf_model,
    text,
    texts,
    u32,
    u64,
)

SEVEN = gguf_model(CONFIGS["7"])
SIX = gguf_model(CONFIGS["6"])
KEY, NORM = "blk.1.time_mix_key.weight", "blk.0.attn_norm.bias"
_HUGE = 2**63 + 5


def _with(file: GGUF = SEVEN, **changes: object) -> Callable[[], bytes]:
    return lambda: dataclasses.replace(file, **changes).bytes()


def _told(file: GGUF = SEVEN, **changes: object) -> Callable[[], bytes]:
    return lambda: file.told(**changes).bytes()


def _tensor(of: str = KEY, /, **changes: object) -> Callable[[], bytes]:
    return lambda: SEVEN.tensor(of, **changes).bytes()


def _cut(size: int) -> Callable[[], bytes]:
    return lambda: SEVEN.bytes()[:size]


def _offset(name: str) -> int:
    """Where a tensor begins."""
    position = 0
    for entry in SEVEN.tensors:
        if entry.name == name:
            return position
        position += SEVEN.padded(len(entry.content))
    raise KeyError(name)


def _array(kind: int, count: int, content: bytes = b"") -> bytes:
    return u32(ARRAY) + u32(kind) + u64(count) + content


_SIZE, _HEADER = len(SEVEN.bytes()), len(SEVEN.header())

GGUF_FILES: dict[str, tuple[Callable[[], bytes], str]] = {
    "the magic alone": (_cut(4), "ends within the version"),
    "no counts": (_cut(10), "ends within the number of tensors"),
    "cut within the keys": (_cut(40), "it claims 9 keys, with 16 bytes left"),
    "cut within the tensors": (_cut(_HEADER - 8), "ends within the place of"),
    "cut within the numbers": (_cut(_SIZE - 64), r"needs \d+ bytes at \d+, the file has"),
    "cut before the numbers": (_cut(_HEADER), r"needs \d+ bytes at \d+, the file has"),
    "version 1": (_with(version=1), "version 1, which llama.cpp has given up"),
    "version 0": (_with(version=0), "version 0, which is not known"),
    "version 4": (_with(version=4), "version 4, which is not known"),
    "big-endian": (_with(version=0x03000000), "was written for big-endian machines"),
    "more tensors than bytes": (_with(num_tensors=2**40), "claims 1099511627776 tensors"),
    "tensors that overflow": (_with(num_tensors=_HUGE), f"claims {_HUGE} tensors"),
    "a tensor more": (_with(num_tensors=len(SEVEN.tensors) + 1), r"the name of a tensor claims \d+ bytes"),
    "keys that overflow": (_with(num_keys=_HUGE), f"claims {_HUGE} keys"),
    "more keys than bytes": (_with(num_keys=2**13 * 5), "claims 40960 keys"),
    "a key beyond the file": (
        _with(tensors=[], keys=text("x", 2**15) + u32(U32)),
        "a key claims 32768 bytes, of 25 that are left",
    ),
    "a key that overflows": (_with(keys=text("x", 2**64 - 1)), "a key claims 18446744073709551615 bytes"),
    "a key too long": (_with(keys=text("x" * 2**16) + u32(U32) + u32(0)), "a key claims 65536 bytes"),
    "a key that is no text": (_with(keys=text(b"\xff\xfe") + u32(U32) + u32(0)), "a key is not UTF-8"),
    "a key twice": (_with(keys=text("rwkv7.block_count") + u32(U32) + u32(3)), "the key 'rwkv7.block_count' twice"),
    "a text beyond the file": (_with(keys=text("x") + u32(TEXT) + u64(2**19)), "the value of 'x' claims 524288 bytes"),
    "a text that overflows": (_with(keys=text("x") + u32(TEXT) + u64(2**64 - 1)), "the value of 'x' claims 1844"),
    "a text that is none": (_told(x=u32(TEXT) + text(b"\xc3(")), "the value of 'x' is not UTF-8"),
    "texts without end": (
        _with(keys=b"".join(text(f"x{i}") + u32(TEXT) + text("x" * 2**20) for i in range(5)), num_keys=14),
        "names and texts take more than 4194304 bytes",
    ),
    "an unknown type of value": (_told(x=u32(13) + u64(0)), "'x' is of type 13"),
    "neither true nor false": (_told(x=u32(BOOL) + b"\2"), "neither true nor false"),
    "numbers that overflow": (_told(x=_array(U32, 2**62)), "claims 4611686018427387904 numbers in the value of 'x'"),
    "numbers beyond the file": (_told(x=_array(0, 10**6)), "claims 1000000 numbers"),
    "texts that overflow": (_told(x=_array(TEXT, 2**61)), "claims 2305843009213693952 texts"),
    "texts beyond the file": (_told(x=texts(["a", "b"], 1000)), r"the value of 'x' claims \d+ bytes"),
    "a text of many that overflows": (_told(x=_array(TEXT, 1, u64(2**64 - 8))), "claims 18446744073709551608 bytes"),
    "arrays in an array": (_told(x=_array(ARRAY, 1, u32(U32) + u64(0))), "arrays within an array"),
    "arrays nested a thousand times": (
        _told(x=u32(ARRAY) + (u32(ARRAY) + u64(1)) * 1000),
        "arrays within an array",
    ),
    "an unknown type of numbers": (_told(x=_array(77, 0)), "'x' is of type 77"),
    "an alignment of 0": (_told(general__alignment=0), "general.alignment = 0"),
    "an odd alignment": (_told(general__alignment=24), "general.alignment = 24"),
    "a huge alignment": (_told(general__alignment=2**31), "general.alignment = 2147483648"),
    "an alignment in words": (_told(general__alignment="32"), "general.alignment = '32'"),
    "one part of three": (_told(split__count=3), "is one of 3 parts; put them together by llama-gguf-split --merge"),
    "a tensor twice": (_with(tensors=[*SEVEN.tensors, SEVEN.tensors[0]]), "two tensors named 'token_embd.weight'"),
    "a name too long": (_tensor(name="x" * 64), "the name of a tensor claims 64 bytes"),
    "a name that is no text": (_tensor(name=b"\xff"), "the name of a tensor is not UTF-8"),
    "no axes": (_tensor(num_axes=0, shape=()), "has 0 axes"),
    "five axes": (_tensor(shape=(1, 1, 1, 32, 32)), "has 5 axes"),
    "axes that overflow": (_tensor(num_axes=2**32 - 1), "has 4294967295 axes"),
    "an axis of nothing": (_tensor(shape=(0, 32)), "which holds nothing"),
    "a product that overflows": (_tensor(shape=(2**32, 2**32, 4, 4)), "needs 1180591620717411303424 bytes"),
    "a product that overflows to the true size": (_tensor(shape=(2**63, 2, 1, 1024)), r"needs \d{22,} bytes"),
    "an unknown type": (_tensor(kind=99), "is of type 99 of ggml, which is not read"),
    "a type given up": (_tensor(kind=4), "is of type 4 of ggml"),
    "a type of importance": (_tensor(kind=23), "is of type 23 of ggml, which is not read"),
    "integers": (_tensor(kind=26), "is of type 26 of ggml"),
    "rows that are no blocks": (
        _tensor("blk.1.time_mix_w2.weight", kind=8),
        "rows of 4, which are not whole blocks of q8_0",
    ),
    "a wider type": (_tensor(kind=28), r"begins at 46592, and the one before it ends at 50688"),
    "a narrower type": (_tensor(kind=1), "begins at 46592, and the one before it ends at 44544"),
    "an offset not aligned": (_tensor(offset=_offset(KEY) + 4), "begins at 42500, and the one before it ends at 42496"),
    "an offset on another": (_tensor(offset=0), "begins at 0, and the one before it ends at"),
    "an offset beyond the end": (_tensor(offset=2**40), "begins at 1099511627776"),
    "an offset that overflows": (_tensor(offset=2**64 - 32), "begins at 18446744073709551584"),
    "a gap": (_tensor(content=bytes(32 * 32 * 4 + 64)), "begins at 46656, and the one before it ends at 46592"),
    "bytes behind": (_with(behind=bytes(4096)), "4096 bytes follow its last tensor"),
    "no tensors": (_with(tensors=[]), r"no generation of RWKV has such names \(there is no tensor"),
    "a Llama": (_told(general__architecture="llama"), "'llama': of GGUF files only rwkv6 and rwkv7 are read"),
    "RWKV-7 in a Qwen": (_told(general__architecture="arwkv7"), "'arwkv7': is RWKV-7's time mixing in a Qwen2"),
    "RWKV-6 in a Qwen": (_told(general__architecture="rwkv6qwen2"), "'rwkv6qwen2': is RWKV-6's time mixing in a Qwen2"),
    "no architecture": (_told(general__architecture=None), "general.architecture = None"),
    "an architecture of a thousand letters": (
        _told(general__architecture="x" * 1000),
        r"general\.architecture = 'x{499}\.\.\.: of GGUF files",
    ),
    "a width of a thousand letters": (
        _told(rwkv7__embedding_length="9" * 1000),
        r"= '9{499}\.\.\., but by the tensors",
    ),
    "an alignment of a thousand letters": (_told(general__alignment="9" * 1000), r"= '9{499}\.\.\.: must be a power"),
    "an architecture in numbers": (_told(general__architecture=7), "general.architecture = 7"),
    "an architecture of lists": (
        _told(general__architecture=texts(["rwkv7"])),
        "general.architecture = an array of 1 texts: of GGUF",
    ),
    "another generation": (_told(general__architecture="rwkv6", rwkv6__wkv__head_size=8), "not llama.cpp's rwkv6"),
    "an adapter": (_told(general__type="adapter"), "general.type = 'adapter'"),
    "no size of a head": (_told(rwkv7__wkv__head_size=None), "rwkv7.wkv.head_size = None"),
    "heads of size 0": (_told(rwkv7__wkv__head_size=0), "rwkv7.wkv.head_size = 0"),
    "heads of an odd size": (_told(rwkv7__wkv__head_size=5), "rwkv7.wkv.head_size = 5"),
    "heads in words": (_told(rwkv7__wkv__head_size="8"), "rwkv7.wkv.head_size = '8'"),
    "heads of another size": (
        _told(SIX, rwkv6__wkv__head_size=16),
        "rwkv6.wkv.head_size = 16, but by the tensors it is 8",
    ),
    "another width": (_told(rwkv7__embedding_length=64), "embedding_length = 64, but by the tensors it is 32"),
    "a layer more": (_told(rwkv7__block_count=4), "block_count = 4, but by the tensors it is 3"),
    "another rank": (_told(rwkv7__attention__gate_lora_rank=8), "gate_lora_rank = 8, but by the tensors it is 7"),
    "another width of ffn": (_told(rwkv7__feed_forward_length=2**31), "feed_forward_length = 2147483648, but by"),
    "widths of each layer": (_told(rwkv7__feed_forward_length=_array(U32, 1, u32(48))), "feed_forward_length = "),
    "one shift of tokens": (_told(rwkv7__token_shift_count=1), "token_shift_count = 1, but"),
    "another epsilon": (_told(rwkv7__attention__layer_norm_epsilon=1e-3), "only 1e-05 is computed here"),
    "an epsilon in words": (_told(rwkv7__attention__layer_norm_epsilon="1e-5"), "layer_norm_epsilon = '1e-5'"),
    "another vocabulary": (_told(tokenizer__ggml__tokens=texts(["a", "b"])), "has 2 tokens and its embedding 29 rows"),
    "layers divided by words": (_told(SIX, rwkv6__rescale_every_n_layers="6"), "rescale_every_n_layers = '6'"),
    "a dtype that is none": (_told(rwkv_jax__dtype="float64"), "rwkv_jax.dtype = 'float64'"),
    "a dtype of lists": (_told(rwkv_jax__dtype=texts(["bfloat16"])), "rwkv_jax.dtype = "),
    "a tensor missing": (lambda: SEVEN.without(KEY).bytes(), r"missing +blocks\.1\.att\.key\.weight"),
    "a norm missing": (lambda: SEVEN.without(NORM).bytes(), r"missing +blocks\.0\.ln1\.bias"),
    "blends missing": (
        lambda: SEVEN.without("blk.1.time_mix_lerp_fused.weight").bytes(),
        r"missing +blocks\.1\.att\.x_r",
    ),
    "a tensor of nobody": (_tensor(name="blk.1.attn_q.weight"), r"not llama.cpp's rwkv7: blk\.1\.attn_q\.weight"),
    "a name that moves the cursor": (_tensor(name="blk.1.\x1b[2Jx"), r"rwkv7: 'blk\.1\.\\x1b\[2Jx'"),
    "a layer far away": (_tensor(name="blk.999999999.time_mix_key.weight"), "layer 999999999"),
    "a name with braces": (_tensor(name="blk.{}.time_mix_key.weight"), "not llama.cpp's rwkv7"),
    "another shape": (_tensor(shape=(64, 16)), r"misshapen +blocks\.1\.att\.key\.weight"),
    "five blends": (
        _tensor("blk.0.time_mix_lerp_fused.weight", shape=(1, 1, 1, 6 * 32)),
        r"cannot be made of blk\.0\.time_mix_lerp_fused",
    ),
}

_FOUR, _SIX = ggmf_model(CONFIGS["4"]), ggmf_model(CONFIGS["6"])
_SEVEN = ggmf_model(CONFIGS["7"])
_EMB = "emb.weight"


def _g(file: GGMF = _SEVEN, **changes: object) -> Callable[[], bytes]:
    return lambda: dataclasses.replace(file, **changes).bytes()


def _t(of: str = _EMB, file: GGMF = _SEVEN, /, **changes: object) -> Callable[[], bytes]:
    return lambda: file.tensor(of, **changes).bytes()


GGMF_FILES: dict[str, tuple[Callable[[], bytes], str]] = {
    "the magic alone": (lambda: b"fmgg", "is no whole ggmf file"),
    "cut within a header": (lambda: _SEVEN.bytes()[:30], "ends within the header of a tensor"),
    "cut within the numbers": (lambda: _SEVEN.bytes()[:-4], r"needs \d+ bytes"),
    "a version to come": (_g(version=102), "version 102, which is not known"),
    "blocks of old": (_g(version=100, kind=2), "q4_0 as before May 2023"),
    "a tensor in blocks of old": (
        lambda: dataclasses.replace(_SEVEN.tensor(_EMB, kind=9), version=100).bytes(),
        "q8_0 as",
    ),
    "a type given up": (_g(kind=4), "the model is of type 4"),
    "a type to come": (_t(kind=2**32 - 1), "'emb.weight' is of type 4294967295"),
    "no axes": (_t(num_axes=0), "has 0 axes"),
    "four axes": (_t(num_axes=4), "has 4 axes"),
    "no name": (_t(name=""), "claims 0 bytes"),
    "a name that overflows": (_t(length=2**32 - 1), "claims 4294967295 bytes"),
    "a name that is no text": (_t(name=b"\xff\xff"), "is not UTF-8"),
    "an axis of nothing": (_t(shape=(0, 32)), "which holds nothing"),
    "a product that overflows": (_t(shape=(2**31, 2**31, 2**31)), r"needs \d{29} bytes"),
    "rows that are no blocks": (_t("blocks.0.att.w1", kind=9, shape=(4, 33)), "rows of 33, which are not whole blocks"),
    "a tensor twice": (_g(tensors=[*_SEVEN.tensors, _SEVEN.tensors[0]]), "two tensors named 'emb.weight'"),
    "bytes behind": (_g(behind=b"\0" * 5), "ends within the header"),
    "more bytes behind": (_g(behind=b"\0" * 64), "has 0 axes"),
    "another width": (_g(width=33), "vocabulary 29 and width 33, its embedding"),
    "another vocabulary": (_g(vocab_size=2**32 - 1), "vocabulary 4294967295 and width 32"),
    "layers that overflow": (_g(num_layers=2**32 - 1), "has 4294967295 layers, its tensors 3"),
    "a layer far away": (_t("blocks.2.ln1.bias", name="blocks.999999999.ln1.bias"), "has 3 layers, its tensors 4"),
    "no embedding": (_t(name="embedding"), "its embedding the shape"),
    "a tensor of nobody": (_t("head.weight", name="tail.weight"), r"missing +head\.weight"),
    "a name with a brace": (_t("blocks.1.ln1.bias", name="blocks.1.ln1}bias"), r"not rwkv\.cpp: blocks\.1\.ln1}bias"),
    "a name with braces": (_t("blocks.1.ln1.bias", name="blocks.1.{0.x}"), r"not rwkv\.cpp: blocks\.1\.{0\.x}"),
    "blends of another number": (
        _t("blocks.1.att.x_rwkvag", shape=(5, 1, 32), content=bytes(640)),
        "cannot be made of",
    ),
    "a decay of another shape": (
        _t("blocks.1.att.time_decay", _SIX, shape=(5, 1, 8), content=bytes(160)),
        r"misshapen +blocks\.1\.att\.time_decay is \[1, 1, 40\]",
    ),
    "a tensor missing": (
        lambda: dataclasses.replace(
            _FOUR, tensors=[x for x in _FOUR.tensors if x.name != "blocks.1.att.key.weight"]
        ).bytes(),
        r"missing +blocks\.1\.att\.key\.weight",
    ),
    "nothing but a header": (lambda: struct.pack("<4s5I", b"fmgg", 101, 29, 32, 3, 0), "its embedding the shape"),
    "one tensor of many axes": (
        lambda: GGMF(1, 1, 1, [GGMFTensor("x", (1, 1, 1), bytes(4))]).bytes(),
        "its embedding the shape",
    ),
}
