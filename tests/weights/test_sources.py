"""What a path or a name on the hub stands for, and what is said where it stands for nothing."""

from __future__ import annotations

import fnmatch
import inspect
import logging
import sys
import types
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from rwkv_jax import from_pretrained
from rwkv_jax.weights.layouts import to_layout
from rwkv_jax.weights.pth.file import write_torch_file
from rwkv_jax.weights.safetensors import write_safetensors, write_sharded_safetensors
from rwkv_jax.weights.sources import find_weights, open_weights
from rwkv_jax.weights.tensors import WeightsError
from tests.weights.files import CONFIGS, assert_same_bits, random_tensors

TENSORS = random_tensors(CONFIGS["4"])


def test_a_file_stands_for_itself(tmp_path: Path) -> None:
    write_torch_file(tmp_path / "a.pth", TENSORS)
    assert find_weights(tmp_path / "a.pth") == tmp_path / "a.pth"
    assert find_weights(str(tmp_path / "a.pth")) == tmp_path / "a.pth"


def test_content_decides_the_format_not_the_name(tmp_path: Path) -> None:
    write_torch_file(tmp_path / "a.pth", TENSORS)
    write_safetensors(tmp_path / "b.safetensors", TENSORS)
    (tmp_path / "a.pth").rename(tmp_path / "pytorch_model.bin")
    (tmp_path / "b.safetensors").rename(tmp_path / "b.weights")
    for name in ("pytorch_model.bin", "b.weights"):
        opened = open_weights(tmp_path / name)
        assert opened.layout == "official"
        assert_same_bits(dict(opened.tensors), TENSORS)
        opened.drop_pages()
        assert_same_bits(dict(opened.tensors), TENSORS)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["model.safetensors", "other.safetensors", "a.pth"], "model.safetensors"),
        (["model.safetensors.index.json", "model.safetensors"], "model.safetensors.index.json"),
        (["config.json", "RWKV-x070.pth", "README.md"], "RWKV-x070.pth"),
        (["only.safetensors", "a.pth"], "only.safetensors"),
        (["pytorch_model.bin"], "pytorch_model.bin"),
        (["run.json", "checkpoints"], None),
    ],
    ids=str,
)
def test_a_folder_stands_for_its_weights(tmp_path: Path, names: list[str], expected: str | None) -> None:
    for name in names:
        (tmp_path / name).write_text("")
    assert find_weights(tmp_path) == (tmp_path / expected if expected else tmp_path)


@pytest.mark.parametrize(
    ("names", "newest"),
    [
        (["rwkv-init.pth", "rwkv-0.pth", "rwkv-9.pth", "rwkv-10.pth"], "rwkv-10.pth"),
        (["rwkv-0.pth", "rwkv-12.pth", "rwkv-final.pth"], "rwkv-final.pth"),
        (["rwkv-5.pth", "rwkv-7.pth", "train_log.txt"], "rwkv-7.pth"),
        (["rwkv-30.pth", "rwkv-35.pth"], "rwkv-35.pth"),
        (["rwkv-init.pth", "rwkv-final.pth"], "rwkv-final.pth"),
    ],
    ids=str,
)
def test_a_folder_of_the_official_trainer_stands_for_its_newest_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, names: list[str], newest: str
) -> None:
    for name in names:
        (tmp_path / name).write_text("")
    assert find_weights(tmp_path) == tmp_path / newest
    assert f"files by the official trainer, of which {newest} is taken" in caplog.text


@pytest.mark.parametrize("names", [["rwkv-4.pth", "rwkv-7.pth"], ["rwkv-0.pth", "rwkv-1.pth", "mine.pth"]], ids=str)
def test_files_that_may_be_different_models_are_listed(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        (tmp_path / name).write_text("")
    with pytest.raises(WeightsError, match=r"holds \d files of weights \(.*\); name one of them"):
        find_weights(tmp_path)


def test_several_files_are_listed(tmp_path: Path) -> None:
    for name in ("b.pth", "a.pth"):
        (tmp_path / name).write_text("")
    with pytest.raises(WeightsError, match=r"holds 2 files of weights \(a\.pth, b\.pth\); name one of them"):
        find_weights(tmp_path)


def test_an_empty_folder_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(
        WeightsError, match=r"holds no weights; looked for run\.json of a run, model\.safetensors\.index"
    ):
        find_weights(tmp_path)


@pytest.mark.parametrize(
    "source", ["nowhere.pth", "./nowhere", "../nowhere", "a/b/c/d", "/no/such/folder", "owner/name/notes.txt"]
)
def test_what_is_nowhere_is_said_to_be(source: str) -> None:
    with pytest.raises(
        WeightsError, match=r"no such file or folder, and no name on the Hugging Face hub \(OWNER/NAME\)"
    ):
        find_weights(source)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "runs/mine",
            r"^runs/mine: no such run folder; train the run first \(rwkv train --run-dir runs/mine\)",
        ),
        ("runs/mine/a.pth", "^runs/mine/a.pth: no such run folder"),
        ("folder/mine", "^folder/mine: no such file or run folder; name one that is there, or OWNER/NAME on the"),
        ("owner/a.pth", "^owner/a.pth: no such file or run folder"),
        ("owner/a.safetensors", "^owner/a.safetensors: no such file or run folder"),
        ("./mine", "no such file or folder"),
    ],
)
def test_what_is_meant_to_be_here_is_not_looked_for_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, message: str
) -> None:
    hub = Hub(tmp_path, online=False, fetched=False)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(WeightsError, match=message):
        find_weights(source)
    assert hub.asked == 0


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("https://huggingface.co/owner/name", "owner/name"),
        ("https://huggingface.co/owner/name/tree/main", "owner/name"),
        ("https://huggingface.co/owner/name/resolve/main/a/b.pth?download=true", "owner/name/a/b.pth"),
        ("https://hf.co/owner/name/blob/main/b.pth", "owner/name/b.pth"),
    ],
)
def test_an_address_of_the_hub_says_what_to_name(source: str, named: str) -> None:
    for given in (source, Path(source)):
        with pytest.raises(WeightsError, match=rf"from the Hugging Face hub, name {named}, without the rest$"):
            find_weights(given)


def test_another_address_is_no_path() -> None:
    with pytest.raises(WeightsError, match=r"^https://example\.com/a\.pth: is a web address, not a path; down"):
        find_weights("https://example.com/a.pth")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid x\nsize 99\n",
            "it is a Git LFS pointer to 99 bytes",
        ),
        (b"<!doctype html><title>Log in</title>", r"it is a web page \('Log in'\)"),
        (b'{"error": "Entry not found"}', "it is the error answer of a server"),
        (
            b"Entry not found",
            r"it is text \('Entry not found'\); name a \.pth, \.safetensors or \.gguf file of weights",
        ),
        (b"lmgg\1\0\0\0", r"it is a GGML file; name a \.pth, \.safetensors or \.gguf file"),
        (b"\x89PNG\r\n\x1a\n\0", "it is an image"),
        (b"\x1f\x8b\x08\0" + bytes(20), r"it is compressed \(gzip\); unpack it"),
        (b"\n\x0e\n\x05<unk>\x15\0\0\0\0", "it is a sentencepiece tokenizer"),
        (bytes(9999), "it begins with 4096 zeros: the download or copy did not finish"),
        (b'{"model_type": "rwkv"}', "it is JSON"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("name", ["a.pth", "a.safetensors", "a"])
def test_what_is_not_weights_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(WeightsError, match=rf"{name}: .*{message}"):
        open_weights(tmp_path / name)


def test_a_download_that_did_not_finish_says_so(tmp_path: Path) -> None:
    write_torch_file(tmp_path / "a.pth", TENSORS)
    write_safetensors(tmp_path / "b.safetensors", TENSORS)
    for path in (tmp_path / "a.pth", tmp_path / "b.safetensors"):
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(
            WeightsError, match=rf"{path.name}: .*: it is cut short.*the download or copy did not finish"
        ):
            open_weights(path)


@pytest.mark.parametrize("config", [None, '{"tie_word_embeddings": true}', '{"tie_word_embeddings": false}', "[", "3"])
def test_tied_weights_are_read_unless_their_config_denies_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, config: str | None
) -> None:
    foreign = dict(to_layout(TENSORS, "transformers"))
    del foreign["head.weight"]
    write_safetensors(tmp_path / "model.safetensors", {f"module.{name}": x for name, x in foreign.items()})
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    tensors = open_weights(find_weights(tmp_path)).tensors
    assert "model.safetensors: every name begins with 'module.', which is taken off" in caplog.text
    said = len(caplog.records)
    open_weights(find_weights(tmp_path), warn=False)
    assert len(caplog.records) == said
    if config is not None and "false" in config:
        with pytest.raises(WeightsError, match=r"missing +head\.weight"):
            from_pretrained(tmp_path)
    else:
        assert_same_bits({name: tensors[name] for name in tensors}, TENSORS | {"head.weight": TENSORS["emb.weight"]})
        assert "model.safetensors: there is no head: its matrix is the embedding's" in caplog.text
        assert from_pretrained(tmp_path).config.vocab_size == 29


def test_damaged_files_name_themselves(tmp_path: Path) -> None:
    for name, content in {"a.safetensors": b"", "b.pth": b"", "c.pth": b"PK\3\4....", "d.json": b"{}"}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(WeightsError, match=name.replace(".", r"\.")):
            open_weights(tmp_path / name)


# The hub, by a package that knows one repository and counts what is asked of it


class Hub(types.ModuleType):
    def __init__(self, folder: Path, online: bool, fetched: bool) -> None:
        super().__init__("huggingface_hub")
        self.folder, self.online, self.fetched = folder, online, fetched
        self.patterns: list[str] = []
        self.asked = 0
        self.revisions: list[str | None] = []

    def list_repo_files(self, name: str, *, revision: str | None = None) -> list[str]:
        self.asked += 1
        self.revisions.append(revision)
        logging.getLogger("huggingface_hub.utils").warning("retrying")
        if not self.online:
            raise ConnectionError("no network")
        assert name == "owner/name"
        return [path.name for path in self.folder.iterdir()]

    def snapshot_download(
        self, name: str, *, allow_patterns: Any = None, local_files_only: bool = False, revision: str | None = None
    ) -> str:
        assert name == "owner/name"
        self.revisions.append(revision)
        if not (self.fetched if local_files_only else self.online):
            raise ConnectionError("no network")
        self.patterns += allow_patterns or []
        return str(self.folder)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    write_sharded_safetensors(tmp_path / "hub", TENSORS, max_shard_bytes=20_000)
    write_torch_file(tmp_path / "hub" / "other.pth", TENSORS)
    return tmp_path / "hub"


def test_a_name_on_the_hub_is_fetched(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(repository, online=True, fetched=False)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    place = find_weights("owner/name")
    assert place == repository / "model.safetensors.index.json"
    assert_same_bits(dict(open_weights(place).tensors), TENSORS)
    assert "model-*.safetensors" in hub.patterns
    assert "tokenizer.json" in hub.patterns
    assert "other.pth" not in hub.patterns


@pytest.mark.parametrize("source", ["owner/name", "owner/name/other.pth"])
def test_all_is_asked_for_at_the_revision(repository: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    for online in (True, False):
        hub = Hub(repository, online=online, fetched=True)
        monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
        assert find_weights(source, revision="v1.0").parent == repository
        assert set(hub.revisions) == {"v1.0"}
    hub = Hub(repository, online=True, fetched=True)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    with pytest.raises(WeightsError, match=f"the SHA-256 .*, and {'0' * 64} was asked for; nothing was loaded"):
        find_weights(source, revision="v1.0", sha256="0" * 64)


def test_the_hub_s_functions_take_what_they_are_called_with() -> None:
    inspect.signature(huggingface_hub.list_repo_files).bind("owner/name", revision="v1.0")
    download = inspect.signature(huggingface_hub.snapshot_download)
    download.bind("owner/name", allow_patterns=["a"], revision="v1.0")
    download.bind("owner/name", local_files_only=True, revision="v1.0")


def test_one_file_of_a_repository_is_fetched(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(repository, online=True, fetched=False)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert find_weights("owner/name/other.pth") == repository / "other.pth"
    assert [pattern for pattern in hub.patterns if "tokenizer" not in pattern] == ["other.pth", "chat_template.jinja"]


@pytest.mark.parametrize("source", ["owner/name", "owner/name/a-00002-of-00002.pth"])
def test_all_numbered_shards_of_a_repository_are_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    names = list(TENSORS)
    for i in (1, 2):
        write_torch_file(tmp_path / f"a-0000{i}-of-00002.pth", {name: TENSORS[name] for name in names[i - 1 :: 2]})
    hub = Hub(tmp_path, online=True, fetched=False)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert_same_bits(dict(open_weights(find_weights(source)).tensors), TENSORS)
    for file in tmp_path.iterdir():
        assert any(fnmatch.fnmatch(file.name, pattern) for pattern in hub.patterns), file


@pytest.mark.parametrize("source", ["owner/name", "owner/name/other.pth"])
def test_offline_what_was_fetched_before_serves_and_is_said_to(
    repository: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, source: str
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub(repository, online=False, fetched=True))
    assert find_weights(source).parent == repository
    assert "owner/name: the hub cannot be reached (no network); taking what was fetched before" in caplog.text
    assert "retrying" not in caplog.text
    logging.getLogger("huggingface_hub.utils").warning("speaks again")
    assert "speaks again" in caplog.text


def test_what_the_hub_answers_is_not_passed_over(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(repository, online=True, fetched=True)

    class NotFoundError(Exception):
        response = 404

    def answer(name: str, **options: Any) -> list[str]:
        raise NotFoundError("404: no such repository")

    monkeypatch.setattr(hub, "list_repo_files", answer)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    with pytest.raises(WeightsError, match="which answered: 404: no such repository; mend the name, or log in there"):
        find_weights("owner/name")
    with pytest.raises(WeightsError, match=r"owner/name at v2 on .*: 404.*; mend the name or the revision, or log in"):
        find_weights("owner/name", revision="v2")


def test_a_repository_of_several_files_lists_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.pth", "b.pth"):
        write_torch_file(tmp_path / name, TENSORS)
    for online in (True, False):
        monkeypatch.setitem(sys.modules, "huggingface_hub", Hub(tmp_path, online=online, fetched=True))
        with pytest.raises(WeightsError, match=r"holds 2 files of weights \(a\.pth, b\.pth\); name one of them"):
            find_weights("owner/name")


def test_nothing_is_no_name() -> None:
    with pytest.raises(WeightsError, match="no weights are named"):
        find_weights("")
    with pytest.raises(WeightsError, match=r"source = None: name a file, a folder or OWNER/NAME"):
        from_pretrained(None)  # pyright: ignore[reportArgumentType]  what a caller has who looked for a file in vain


def test_offline_and_never_fetched_says_what_was_looked_for(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub(repository, online=False, fetched=False))
    with pytest.raises(
        WeightsError,
        match=r"looked for the file or folder owner/name, then for owner/name on the Hugging Face hub \(no network\), "
        "then among what was fetched before; name a local file or folder",
    ):
        find_weights("owner/name")


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(WeightsError, match=r'huggingface_hub is missing: pip install "rwkv-jax\[hub\]"'):
        find_weights("owner/name")
