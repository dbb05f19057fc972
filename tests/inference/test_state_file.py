"""States go to files and come back bit for bit, to the model and tokenizer that they belong to and to no other."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from rwkv_jax.config import ConfigError
from rwkv_jax.data.tokenizers import ByteTokenizer
from rwkv_jax.inference.state.snapshot import Snapshot, StateError
from rwkv_jax.inference.state.state_file import (
    FORMAT,
    VERSION,
    Identity,
    checksums,
    decode_snapshot,
    encode_snapshot,
    load_snapshot,
    model_identity,
    save_snapshot,
)
from rwkv_jax.models.decoding import unstacked
from rwkv_jax.weights.safetensors import write_safetensors
from rwkv_jax.weights.tensors import UnsafeFileError
from tests.golden import QUICK
from tests.inference.operations import assert_identical
from tests.inference.small_identities import SEVEN, SINGLE, identity_of, model_of
from tests.models.parameters import SMALL


def _snapshot(identity: Identity, num_tokens: int = 17) -> Snapshot:
    """Random numbers in the form of an identity's states, whose scalars are numbers of tokens."""
    rng = np.random.default_rng(num_tokens)

    def draw(like: jax.ShapeDtypeStruct) -> jax.Array:
        if not like.shape:
            return jnp.asarray(num_tokens, like.dtype)
        return jax.device_put(rng.standard_normal(like.shape).astype(like.dtype))

    return Snapshot(jax.tree.map(draw, identity.state), draw(identity.logits), num_tokens)


@pytest.mark.parametrize("generation", SINGLE)
def test_states_come_back_bit_for_bit(tmp_path: Path, generation: str) -> None:
    identity = identity_of(SINGLE[generation])
    snapshot = _snapshot(identity)
    save_snapshot(tmp_path / "x", snapshot, identity)
    loaded = load_snapshot(tmp_path / "x", identity)
    assert jax.tree.structure(loaded.state) == jax.tree.structure(snapshot.state)
    assert_identical(loaded, snapshot)


@pytest.mark.parametrize("generation", SINGLE)
def test_the_form_is_that_of_an_unstacked_models_state(generation: str) -> None:
    identity, model = identity_of(SINGLE[generation]), unstacked(model_of(SINGLE[generation]))
    state = jax.eval_shape(lambda: model.initial_state(1))
    assert jax.tree.structure(identity.state) == jax.tree.structure(state)
    for row, leaf in zip(jax.tree.leaves(identity.state), jax.tree.leaves(state), strict=True):
        assert ((1, *row.shape), row.dtype) == (leaf.shape, leaf.dtype)


def test_dtypes_are_kept(tmp_path: Path) -> None:
    identity = identity_of(dataclasses.replace(SEVEN, dtype="bfloat16"))
    snapshot = _snapshot(identity)
    save_snapshot(tmp_path / "x", snapshot, identity)
    loaded = load_snapshot(tmp_path / "x", identity)
    assert loaded.state[0].att_shift.dtype == jnp.bfloat16
    assert loaded.state[0].wkv.dtype == loaded.logits.dtype == jnp.float32
    assert_identical(loaded, snapshot)


def test_float64_is_kept(tmp_path: Path) -> None:
    with jax.enable_x64(True):
        config = SMALL["4"]
        identity = model_identity(model_of(config), ByteTokenizer())
        snapshot = _snapshot(identity)
        assert snapshot.state[0].att_shift.dtype == jnp.float64
        save_snapshot(tmp_path / "x", snapshot, identity)
        assert_identical(load_snapshot(tmp_path / "x", identity), snapshot)


def test_a_text_goes_on_as_it_would_have(tmp_path: Path) -> None:
    config = SINGLE["4"]
    graphdef, params = nnx.split(unstacked(model_of(config)))

    @functools.partial(jax.jit, compiler_options=QUICK)
    def read(tokens: jax.Array, state: Any) -> Any:
        logits, state = nnx.merge(graphdef, params)(tokens[None], jax.tree.map(lambda x: x[None], state))
        return logits[0, -1], jax.tree.map(lambda x: x[0], state)

    tokens = np.arange(5)
    logits, state = read(tokens, jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), identity_of(config).state))
    save_snapshot(tmp_path / "x", Snapshot(state, logits, 5), identity_of(config))
    loaded = load_snapshot(tmp_path / "x", identity_of(config))
    assert_identical(loaded, Snapshot(state, logits, 5))
    for found, expected in zip(read(tokens, loaded.state), read(tokens, state), strict=True):
        jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_what_is_in_a_file(tmp_path: Path) -> None:
    config = SINGLE["4"]
    identity = identity_of(config)
    save_snapshot(tmp_path / "x", _snapshot(identity), identity)
    parts = ("att_shift", "ffn_shift", "wkv.numerator", "wkv.denominator", "wkv.max_exponent")
    assert load_file(tmp_path / "x").keys() == {"logits", *(f"blocks.{i}.{part}" for i in range(3) for part in parts)}
    with safe_open(tmp_path / "x", framework="numpy") as file:
        metadata = file.metadata()
    assert metadata.pop("producer").startswith("rwkv-jax")
    assert json.loads(metadata.pop("checksums")).keys() == {*load_file(tmp_path / "x"), "metadata"}
    assert metadata == {
        "format": FORMAT,
        "version": VERSION,
        "generation": "4",
        "model": identity.model,
        "tokenizer": ByteTokenizer().fingerprint,
        "num_tokens": "17",
    }


def test_names_of_matrix_states(tmp_path: Path) -> None:
    snapshot = _snapshot(identity_of(SEVEN))
    save_snapshot(tmp_path / "x", snapshot, identity_of(SEVEN))
    tensors = load_file(tmp_path / "x")
    np.testing.assert_array_equal(tensors["blocks.2.wkv"], snapshot.state[2].wkv)
    np.testing.assert_array_equal(tensors["blocks.1.ffn_shift"], snapshot.state[1].ffn_shift)


def test_the_same_state_gives_the_same_bytes(tmp_path: Path) -> None:
    identity = identity_of(SEVEN)
    for name in "ab":
        save_snapshot(tmp_path / name, _snapshot(identity), identity)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("generation", SINGLE)
def test_bytes_are_those_of_the_file(tmp_path: Path, generation: str) -> None:
    identity = identity_of(SINGLE[generation])
    save_snapshot(tmp_path / "x", _snapshot(identity), identity)
    content = encode_snapshot(_snapshot(identity), identity)
    assert content == (tmp_path / "x").read_bytes()
    assert_identical(decode_snapshot(content, identity), _snapshot(identity))


@pytest.mark.parametrize("padding", range(0, 64, 8))
def test_a_loaded_state_needs_its_file_no_more(tmp_path: Path, padding: int) -> None:
    # Of headers of every length, since JAX takes over an array of the host, without copying, where it is aligned.
    path = _write(tmp_path / "x", _tensors(tmp_path), producer="x" * padding)
    loaded = load_snapshot(path, identity_of(SEVEN))
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert_identical(loaded, _snapshot(identity_of(SEVEN)))


# What is refused


def _saved(path: Path) -> Path:
    save_snapshot(path, _snapshot(identity_of(SEVEN)), identity_of(SEVEN))
    return path


@pytest.mark.parametrize(
    ("change", "lines"),
    [
        ({"generation": "6"}, ["generation: '7' in the file, '6' here; load a model of the file's generation"]),
        ({"model": "abc"}, [f"model: '{identity_of(SEVEN).model}' in the file, 'abc' here; load the very parameters"]),
        ({"tokenizer": "abc"}, ["tokenizer: '", "' in the file, 'abc' here; take the tokenizer that it was made with"]),
        ({"generation": "6", "model": "x", "tokenizer": "y"}, ["generation: ", "model: ", "tokenizer: "]),
    ],
)
def test_states_of_others_are_refused_by_each_difference(
    tmp_path: Path, change: dict[str, str], lines: list[str]
) -> None:
    path = _saved(tmp_path / "x")
    with pytest.raises(StateError) as refusal:
        load_snapshot(path, dataclasses.replace(identity_of(SEVEN), **change))
    assert str(refusal.value).startswith(f"{path}: this state does not belong to")
    for line in lines:
        assert line in str(refusal.value)
    assert str(refusal.value).count("\n") == len(change)


def test_another_compute_dtype_is_refused(tmp_path: Path) -> None:
    path = _saved(tmp_path / "x")
    lower = model_identity(model_of(dataclasses.replace(SEVEN, dtype="bfloat16")), ByteTokenizer())
    with pytest.raises(StateError, match=r"different +blocks\.0\.att_shift is float32 \[32\], must be bfloat16 \[32\]"):
        load_snapshot(path, lower)


def _write(path: Path, tensors: dict[str, NDArray], **metadata: str | None) -> Path:
    """A file as ours, but for some metadata (None leaves them out)."""
    identity = identity_of(SEVEN)
    ours: dict[str, str | None] = {
        "format": FORMAT,
        "version": VERSION,
        "producer": "somebody else",
        "generation": "7",
        "model": identity.model,
        "tokenizer": identity.tokenizer,
        "num_tokens": "17",
    }
    present = {name: x for name, x in (ours | metadata).items() if x is not None}
    write_safetensors(path, tensors, {"checksums": checksums(tensors, present)} | present)
    return path


def _tensors(tmp_path: Path) -> dict[str, NDArray]:
    return load_file(_saved(tmp_path / "true"))


def test_files_of_others_that_are_right_are_read(tmp_path: Path) -> None:
    path = _write(tmp_path / "x", _tensors(tmp_path))
    assert_identical(load_snapshot(path, identity_of(SEVEN)), _snapshot(identity_of(SEVEN)))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"format": None}, "is not the state of a text .its format is None, not 'rwkv-jax state'"),
        ({"format": "pt"}, "its format is 'pt'"),
        ({"version": "3"}, "is of version '3', written by 'somebody else', where version '2' is read; use"),
        ({"version": None}, "is of version None"),
        ({"version": "9" * 10**6}, "is of version '9{50,80}, written"),
        ({"generation": None}, "generation: None in the file, '7' here"),
        ({"model": "x" * 10**6}, "model: 'x{50,80} in the file"),
        *(
            ({"num_tokens": count}, "is no number of tokens; save the state again")
            for count in (None, "", "0", "-1", "1.5", "1_000", " 17", "\u0661", "9" * 19, "9" * 10**5)
        ),
    ],
)
def test_metadata_that_cannot_be(tmp_path: Path, metadata: dict[str, str | None], message: str) -> None:
    path = _write(tmp_path / "x", _tensors(tmp_path), **metadata)
    with pytest.raises(StateError, match=message):
        load_snapshot(path, identity_of(SEVEN))


def _set(value: float) -> Callable[[NDArray], NDArray]:
    def change(x: NDArray) -> NDArray:
        changed = x.copy()
        changed.reshape(-1)[-1] = value
        return changed

    return change


CHANGES: dict[str, tuple[Callable[[NDArray], NDArray | None], str]] = {
    "missing": (lambda x: None, r"missing +{} float32 \[{}\]"),
    "turned": (lambda x: x.reshape(-1, 2), r"different +{} is float32 \[.*, 2\], must be float32 \[{}\]"),
    "empty": (lambda x: x[:0], r"different +{} is float32 \[0.*\], must be"),
    "a scalar": (lambda x: x.reshape(-1)[0], r"different +{} is float32 \[\], must be"),
    "doubles": (lambda x: x.astype(np.float64), r"different +{} is float64 \[{}\], must be float32"),
    "integers": (lambda x: x.view(np.int32), r"different +{} is int32 \[{}\], must be float32"),
    "NaN": (_set(np.nan), "tensor '{}' holds numbers that are not finite"),
    "infinity": (_set(-np.inf), "tensor '{}' holds numbers that are not finite"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["blocks.0.att_shift", "blocks.2.wkv", "logits"])
def test_tensors_that_cannot_be(tmp_path: Path, name: str, change: str) -> None:
    tensors = _tensors(tmp_path)
    apply, message = CHANGES[change]
    shape = ", ".join(map(str, tensors[name].shape))
    changed = apply(tensors.pop(name)) if name != "logits" or change != "turned" else tensors.pop(name)[None, :]
    if change == "turned" and name == "logits":
        message = r"different +{} is float32 \[1, 41\], must be float32 \[{}\]"
    path = _write(tmp_path / "x", tensors if changed is None else tensors | {name: changed})
    with pytest.raises(StateError, match=message.format(name, shape)):
        load_snapshot(path, identity_of(SEVEN))


def test_tensors_that_are_not_expected(tmp_path: Path) -> None:
    more = {f"blocks.{i}.wkv": np.zeros(1, np.float32) for i in range(3, 40)}
    path = _write(tmp_path / "x", _tensors(tmp_path) | more)
    with pytest.raises(StateError, match=r"not expected blocks\.3\.wkv float32 \[1\]\n") as refusal:
        load_snapshot(path, identity_of(SEVEN))
    assert str(refusal.value).endswith("and 17 more")


@pytest.mark.parametrize("part", [0.0, 0.001, 0.1, 0.5, 0.999])
def test_files_cut_short(tmp_path: Path, part: float) -> None:
    content = _saved(tmp_path / "true").read_bytes()
    path = tmp_path / "x"
    path.write_bytes(content[: int(part * len(content))])
    with pytest.raises(ConfigError, match=str(path)) as refusal:
        load_snapshot(path, identity_of(SEVEN))
    assert part == 0 or isinstance(refusal.value, UnsafeFileError)


@pytest.mark.parametrize("recorded", [None, "", "[]", "{}", "[" * 10**5])
def test_a_state_needs_its_checksums(tmp_path: Path, recorded: str | None) -> None:
    path = _write(tmp_path / "x", _tensors(tmp_path), checksums=recorded)
    if recorded is None:  # by default the right ones stand there
        load_snapshot(path, identity_of(SEVEN))
    else:
        with pytest.raises(StateError, match="is damaged, its metadata differ from their checksum; get another copy"):
            load_snapshot(path, identity_of(SEVEN))


def test_a_damaged_tensor_is_named(tmp_path: Path) -> None:
    path = _saved(tmp_path / "x")
    content = bytearray(path.read_bytes())
    place = content.find(np.asarray(_snapshot(identity_of(SEVEN)).state[1].wkv).tobytes())
    content[place + 5] ^= 1  # still a number, and finite
    path.write_bytes(content)
    with pytest.raises(StateError, match=r"the tensor 'blocks\.1\.wkv' is damaged, it differs from its checksum; get"):
        load_snapshot(path, identity_of(SEVEN))


def _load(path: Path) -> Snapshot | ConfigError:
    try:
        return load_snapshot(path, identity_of(SEVEN))
    except ConfigError as error:
        return error


def test_a_flipped_byte_is_found_wherever_it_is(tmp_path: Path) -> None:
    path = _saved(tmp_path / "x")
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    for place in (*range(8, header, 7), *range(header, len(content), 199)):
        damaged = bytearray(content)
        damaged[place] ^= 0x04
        path.write_bytes(damaged)
        found = _load(path)
        if isinstance(found, Snapshot):  # harmless: one of the spaces that fill the header up
            assert place < header
            assert_identical(found, _snapshot(identity_of(SEVEN)))
        else:
            assert str(path) in str(found)


def test_bytes_are_refused_as_files_are(tmp_path: Path) -> None:
    identity = identity_of(SEVEN)
    content = encode_snapshot(_snapshot(identity), identity)
    header = 8 + int.from_bytes(content[:8], "little")
    for place in (*range(0, header, 13), *range(header, len(content), 397)):
        damaged = bytearray(content)
        damaged[place] ^= 0x04
        (tmp_path / "x").write_bytes(damaged)
        expected = _load(tmp_path / "x")
        if isinstance(expected, Snapshot):
            assert_identical(decode_snapshot(bytes(damaged), identity), expected)
            continue
        with pytest.raises(type(expected), match=r"^the upload: "):
            decode_snapshot(bytes(damaged), identity, name="the upload")


@pytest.mark.parametrize("content", [b"", b"{", b"\x80\x04\x95", bytes(64), b"PK\3\4" + bytes(60), b"\xff" * 64])
def test_bytes_of_anything_else_are_refused(content: bytes) -> None:
    with pytest.raises(UnsafeFileError, match="the upload: is not a whole safetensors file"):
        decode_snapshot(content, identity_of(SEVEN), name="the upload")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 1\n", "Git LFS pointer"),
        (b"", "is empty"),
        (b"<!DOCTYPE html><html><body>Not found</body></html>", "web page"),
    ],
)
def test_what_is_no_state_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load_snapshot(path, identity_of(SEVEN))


def test_metadata_that_are_there_twice(tmp_path: Path) -> None:
    header = json.dumps({"__metadata__": {"format": FORMAT}}).replace("}}", ', "format": "x"}}').encode()
    path = tmp_path / "x"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(UnsafeFileError):
        load_snapshot(path, identity_of(SEVEN))


def test_weights_are_no_state(tmp_path: Path) -> None:
    save_file({"emb.weight": np.zeros((3, 4), np.float32)}, tmp_path / "x")  # without any metadata
    with pytest.raises(StateError, match="is not the state of a text"):
        load_snapshot(tmp_path / "x", identity_of(SEVEN))


@pytest.mark.parametrize("name", ["nowhere", "."])
def test_no_such_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(StateError, match="there is no such file; name a file that a session was saved to"):
        load_snapshot(tmp_path / name, identity_of(SEVEN))


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("mine")
    with pytest.raises(ConfigError, match="exists already and is not overwritten"):
        _saved(path)
    assert path.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("trouble", ["another model", "NaN"])
def test_what_could_not_be_loaded_is_not_saved(tmp_path: Path, trouble: str) -> None:
    snapshot = _snapshot(identity_of(SINGLE["4"] if trouble == "another model" else SEVEN))
    if trouble == "NaN":
        snapshot = dataclasses.replace(snapshot, logits=snapshot.logits.at[3].set(jnp.nan))
    message = "not the tensors of a state of this model" if trouble == "another model" else "'logits' holds numbers"
    with pytest.raises(StateError, match=message):
        save_snapshot(tmp_path / "x", snapshot, identity_of(SEVEN))
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rwkv_jax.weights.safetensors._write_tensor", fail)
    with pytest.raises(OSError, match="No space left"):
        _saved(tmp_path / "x")
    assert not list(tmp_path.iterdir())
