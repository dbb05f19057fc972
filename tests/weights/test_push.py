"""What of a folder is published, what is refused, and what the hub is asked, of which nobody is asked in earnest."""

from __future__ import annotations

import inspect
import socket
import types
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml

from rwkv_jax.config import TrainConfig
from rwkv_jax.data.tokenizers import ByteTokenizer
from rwkv_jax.run_folder import write_run
from rwkv_jax.weights import push as module
from rwkv_jax.weights.card import CARD_FILE
from rwkv_jax.weights.pretrained import convert
from rwkv_jax.weights.pth.file import write_torch_file
from rwkv_jax.weights.push import front_matter_of, plan_push, push, with_license
from rwkv_jax.weights.safetensors import write_safetensors, write_sharded_safetensors
from rwkv_jax.weights.tensors import WeightsError
from tests.weights.files import CONFIGS, random_tensors

TENSORS = random_tensors(CONFIGS["7"])
CARD = '---\nlicense: "apache-2.0"\ntags:\n- "rwkv"\n---\n\n# A model\n'
TRUE_API = huggingface_hub.HfApi
TOKEN = "hf_" + "abcDEF0123" * 4


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_safetensors(tmp_path / "x" / "model.safetensors", TENSORS, is_model=True)
    (tmp_path / "x" / CARD_FILE).write_text(CARD)
    (tmp_path / "x" / "tokenizer.json").write_text("{}")
    return tmp_path / "x"


def names(folder: Path, **options: Any) -> list[str]:
    return [upload.name for upload in plan_push(folder, "owner/name", **options).uploads]


# What is uploaded


def test_weights_and_what_is_known_beside_them(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*arguments: object, **options: object) -> None:
        raise AssertionError("asked the network")

    monkeypatch.setattr(socket, "socket", no_network)
    monkeypatch.setattr(huggingface_hub, "HfApi", no_network)
    monkeypatch.setattr(huggingface_hub, "get_token", no_network)
    for name in ("config.json", "generation_config.json", "chat_template.jinja", "LICENSE", "LICENSE.txt", "NOTICE.md"):
        (folder / name).write_text("x")
    strays = (
        ".env",
        ".gitattributes",
        "token",
        "hf_token.txt",
        "optimizer.pt",
        "rng_state.pth.bak",
        "notes.md",
        "a.py",
        "LICENSE.pem",
        "LICENSE.rst",
        "NOTICE.MD",
    )
    for name in strays:
        (folder / name).write_text(TOKEN)
    for name in (".git", ".cache", "checkpoints", "README.md.d"):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text("x")
    plan = plan_push(folder, "owner/name", private=True, revision="v1")
    beside = {"LICENSE", "LICENSE.txt", "NOTICE.md", "chat_template.jinja", "config.json", "generation_config.json"}
    assert {upload.name for upload in plan.uploads} == {CARD_FILE, "model.safetensors", "tokenizer.json", *beside}
    assert plan.left_out.keys() == {*strays, ".git", ".cache", "checkpoints", "README.md.d"}
    assert plan.left_out["checkpoints"] == "a folder"
    assert all(upload.num_bytes == (folder / upload.name).stat().st_size for upload in plan.uploads)
    assert (plan.repository, plan.revision, plan.private, plan.license) == ("owner/name", "v1", True, "apache-2.0")
    assert plan.title == "RWKV-7, 3 layers of width 32, official names"


def test_all_shards_and_no_other_weights(tmp_path: Path) -> None:
    folder = write_sharded_safetensors(tmp_path / "x", TENSORS, max_shard_bytes=20_000).parent
    shards = {path.name for path in folder.iterdir()}
    assert len(shards) > 3
    (folder / CARD_FILE).write_text(CARD)
    write_torch_file(folder / "optimizer.pth", TENSORS)
    assert set(names(folder)) == {*shards, CARD_FILE}


def test_a_folder_without_weights_a_run_and_a_file(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"model\.safetensors: is no folder here; name a folder of weights"):
        plan_push(folder / "model.safetensors", "owner/name")
    with pytest.raises(WeightsError, match=r"nowhere/at-all: is no folder here"):
        plan_push(Path("nowhere/at-all"), "owner/name")
    (tmp_path / "empty").mkdir()
    with pytest.raises(WeightsError, match="holds no weights"):
        plan_push(tmp_path / "empty", "owner/name")
    (tmp_path / "run").mkdir()
    write_run(tmp_path / "run", TrainConfig(), {}, ByteTokenizer())
    with pytest.raises(WeightsError, match=r"is a run, with its optimizer's state; write its weights into a folder of"):
        plan_push(tmp_path / "run", "owner/name")


def test_weights_are_whole(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(WeightsError, match="is damaged, it differs from its checksum"):
        plan_push(folder, "owner/name")
    path.unlink()
    write_safetensors(path, {name: x for name, x in TENSORS.items() if name != "blocks.1.ffn.key.weight"})
    with pytest.raises(WeightsError, match=r"missing +blocks\.1\.ffn\.key\.weight"):
        plan_push(folder, "owner/name")


@pytest.mark.parametrize("name", ["tokenizer.json", CARD_FILE, "model.safetensors"])
def test_links_that_lead_out_are_refused(folder: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "elsewhere").mkdir()
    target = tmp_path / "elsewhere" / "secret"
    (folder / name).rename(target)
    (folder / name).symlink_to(target)
    with pytest.raises(WeightsError, match=rf"{name}: is a link that leads out of the folder, to .*secret; put a copy"):
        plan_push(folder, "owner/name")


def test_links_within_the_folder_are_files(folder: Path) -> None:
    (folder / "tokenizer.json").rename(folder / "blob")
    (folder / "tokenizer.json").symlink_to("blob")
    plan = plan_push(folder, "owner/name")
    assert "tokenizer.json" in [upload.name for upload in plan.uploads]
    assert plan.left_out.keys() == {"blob"}
    (folder / "config.json").symlink_to("nothing")
    with pytest.raises(WeightsError, match=r"config\.json: is a link to nothing"):
        plan_push(folder, "owner/name")
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    with pytest.raises(WeightsError, match=r"config\.json: is no plain file; move it away"):
        plan_push(folder, "owner/name")


def test_files_too_large_for_the_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_FILE_BYTES", 1000)
    with pytest.raises(WeightsError, match=r"model\.safetensors: has 0\.0 GB, and the hub takes files up to 0; write"):
        plan_push(folder, "owner/name")


@pytest.mark.parametrize("name", ["tokenizer.json", CARD_FILE, "LICENSE", "chat_template.jinja"])
def test_a_token_in_a_file_is_not_published(folder: Path, name: str) -> None:
    (folder / name).write_text(f"{CARD}\n{TOKEN}\n")
    with pytest.raises(WeightsError, match=rf"{name}: has an access token of the hub in it \(hf_\.\.\.\)") as caught:
        plan_push(folder, "owner/name")
    assert TOKEN not in str(caught.value)


@pytest.mark.parametrize("name", ["LICENSE-APACHE-2.0", "NOTICE-x.pem", "tokenizer.model", "tokenizer_config.json"])
def test_no_file_is_published_without_a_search(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / name).write_text(f'{{"chat_template": "a\\n{TOKEN}"}}')  # JSON has the two signs \\n before it
    with pytest.raises(WeightsError, match=rf"{name}: has an access token of the hub in it"):
        plan_push(folder, "owner/name")
    (folder / name).write_text("a" * 200)
    assert name in names(folder)
    monkeypatch.setattr(module, "_MAX_TEXT_BYTES", 199)
    with pytest.raises(WeightsError, match=rf"{name}: has 0 MB; beside weights only files up to 0 are searched for"):
        plan_push(folder, "owner/name")


@pytest.mark.parametrize(
    "repository",
    [
        *("", "name", "a/b/c", "owner/", "/name", "owner/na me", "owner/x.git", "owner/a--b", "o/a..b", "o/é"),
        *("a/" + "b" * 99, "https://huggingface.co/owner/name", "owner/name-", "-o/name", "owner/name\n"),
    ],
)
def test_what_is_no_repository(folder: Path, repository: str) -> None:
    with pytest.raises(WeightsError, match=r"repository = .*: must be OWNER/NAME on the Hugging Face hub"):
        plan_push(folder, repository)


def test_what_is_no_branch(folder: Path) -> None:
    with pytest.raises(WeightsError, match="revision = 'a b': must be a branch"):
        plan_push(folder, "owner/name", revision="a b")


# Cards and licenses


def test_without_a_license_nothing_is_published(folder: Path) -> None:
    card = folder / CARD_FILE
    for text in (
        "# A model\n",
        "---\ntags: [a]\n---\n",
        "---\n---\n",
        "---\nlicense:\n---\n",
        "---\nlicense: unknown\n---\n",
        "---\nlicense: Unknown\n---\n",
        "---\nlicense: none\n---\n",
        "---\nlicense: NONE\n---\n",
        '---\nlicense: " "\n---\n',
    ):
        card.write_text(text)
        with pytest.raises(WeightsError, match=r"README\.md: states no license, without which nobody may use what is"):
            plan_push(folder, "owner/name")
    card.unlink()
    for license in (None, "mit"):
        with pytest.raises(WeightsError, match=r"has no model card \(README\.md\); rwkv convert writes one"):
            plan_push(folder, "owner/name", license=license)


@pytest.mark.parametrize(
    "text",
    [
        *("# A model\n", "", "---\ntags:\n- a\nx: 1\n---\n# A\n", "---\r\ntags: [a]\r\n---\r\nText\r\n"),
        *("\ufeff---\na: b\n---\n", "---\n---\nText"),
    ],
)
def test_a_license_is_put_into_what_is_uploaded(folder: Path, text: str) -> None:
    (folder / CARD_FILE).write_bytes(text.encode())
    plan = plan_push(folder, "owner/name", license="mit")
    (card,) = (upload for upload in plan.uploads if upload.name == CARD_FILE)
    assert isinstance(card.content, bytes)
    sent = card.content.decode()
    assert front_matter_of(sent, "x") == {"license": "mit", **front_matter_of(text, "x")}
    assert len(card.content) == card.num_bytes
    assert card.note
    assert plan.license == "mit"
    assert (folder / CARD_FILE).read_bytes() == text.encode()  # which stays as it is
    assert sent.endswith(text.rpartition("---")[2])


def test_a_card_of_ours_no_longer_says_that_none_is_stated(tmp_path: Path) -> None:
    write_torch_file(tmp_path / "m.pth", TENSORS)
    convert(tmp_path / "m.pth", tmp_path / "out")
    assert "## License\n\nNot stated: " in (tmp_path / "out" / CARD_FILE).read_text()
    (sent,) = (x.content for x in plan_push(tmp_path / "out", "o/n", license="mit").uploads if x.name == CARD_FILE)
    assert isinstance(sent, bytes)
    assert sent.decode().endswith("\n## License\n\nmit\n")


def test_a_license_that_differs_is_refused(folder: Path) -> None:
    with pytest.raises(WeightsError, match=r"license = 'mit': .*README\.md states 'apache-2\.0'; leave it out"):
        plan_push(folder, "owner/name", license="mit")
    assert plan_push(folder, "owner/name", license="apache-2.0").license == "apache-2.0"
    (folder / CARD_FILE).write_text("---\nlicense: unknown\n---\n")
    with pytest.raises(WeightsError, match="take that line out to have --license put in"):
        plan_push(folder, "owner/name", license="mit")
    with pytest.raises(WeightsError, match=r"license = 'Mit': must be the hub's identifier"):
        plan_push(folder, "owner/name", license="Mit")


def test_a_license_of_one_s_own_has_a_name(folder: Path) -> None:
    (folder / CARD_FILE).write_text("---\nlicense: other\n---\n")
    with pytest.raises(WeightsError, match=r"license = 'other': does not say which; write an identifier"):
        plan_push(folder, "owner/name")
    (folder / CARD_FILE).write_text("---\nlicense: other\nlicense_name: mine\nlicense_link: LICENSE\n---\n")
    assert plan_push(folder, "owner/name").license == "other"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"---\nlicense: mit\n", "its front matter has no end; put a line of three dashes there"),
        (b"---\nlicense: [mit\n---\n", "its front matter is no YAML"),
        (b"---\n- mit\n---\n", "its front matter has no fields"),
        (b"---\na: !!python/object/apply:os.system ['true']\n---\n", "its front matter is no YAML"),
        (b"---\nlicense: [mit]\n---\n", r"license = \['mit'\]: does not say which"),
        (b"---\nlicense: The MIT one\n---\n", "license = 'The MIT one': must be the hub's identifier"),
        (b"\xff\xfe", "cannot be read as UTF-8"),
    ],
)
def test_cards_that_cannot_be_read(folder: Path, text: bytes, message: str) -> None:
    (folder / CARD_FILE).write_bytes(text)
    with pytest.raises(WeightsError, match=f"README.md: {message}"):
        plan_push(folder, "owner/name")


def test_front_matter_is_put_first() -> None:
    assert yaml.safe_load(with_license("# A\n", "mit").split("---")[1]) == {"license": "mit"}
    assert with_license("---\na: b\n---\n", "mit") == '---\nlicense: "mit"\na: b\n---\n'


# The hub, which records what it is asked


class Api:
    """As `huggingface_hub.HfApi`; whatever is called must fit the true one's signature."""

    def __init__(self, **options: Any) -> None:
        inspect.signature(TRUE_API).bind(**options)
        self.asked: list[str] = []
        self.commits: list[dict[str, Any]] = []
        self.made: list[dict[str, Any]] = []
        self.exists = False
        self.private = False
        self.files: list[str] = [".gitattributes"]
        self.branches = ["main"]
        self.fails: Exception | None = None

    def _called(self, name: str, *arguments: Any, **options: Any) -> None:
        inspect.signature(getattr(TRUE_API, name)).bind(self, *arguments, **options)
        assert "token" not in options
        self.asked.append(name)

    def repo_exists(self, name: str) -> bool:
        self._called("repo_exists", name)
        return self.exists

    def model_info(self, name: str) -> Any:
        self._called("model_info", name)
        assert "private" in huggingface_hub.ModelInfo.__dataclass_fields__
        return types.SimpleNamespace(private=self.private)

    def list_repo_refs(self, name: str) -> Any:
        self._called("list_repo_refs", name)
        assert "branches" in huggingface_hub.GitRefs.__dataclass_fields__
        assert "name" in huggingface_hub.GitRefInfo.__dataclass_fields__
        return types.SimpleNamespace(branches=[types.SimpleNamespace(name=name) for name in self.branches])

    def list_repo_files(self, name: str, **options: Any) -> list[str]:
        self._called("list_repo_files", name, **options)
        return self.files

    def create_repo(self, name: str, **options: Any) -> None:
        self._called("create_repo", name, **options)
        self.made.append(options)

    def create_branch(self, name: str, **options: Any) -> None:
        self._called("create_branch", name, **options)

    def create_commit(self, name: str, operations: Any, **options: Any) -> Any:
        self._called("create_commit", name, operations, **options)
        if self.fails is not None:
            raise self.fails
        self.commits.append({"name": name, "operations": operations, **options})
        assert "oid" in huggingface_hub.CommitInfo.__dataclass_fields__
        return types.SimpleNamespace(oid="c" * 40)


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Api:
    api = Api()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda **options: api)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: TOKEN)
    return api


def test_one_commit_has_it_all(folder: Path, api: Api) -> None:
    said: list[str] = []
    plan = plan_push(folder, "owner/name", revision="v1", private=True)
    assert push(plan, said.append) == "c" * 40
    assert api.asked == ["repo_exists", "create_repo", "create_branch", "create_commit"]
    assert api.made == [{"private": True}]
    (commit,) = api.commits
    assert (commit["name"], commit["revision"]) == ("owner/name", "v1")
    sent = {operation.path_in_repo: operation.path_or_fileobj for operation in commit["operations"]}
    assert sent == {
        CARD_FILE: CARD.encode(),
        "model.safetensors": str(folder / "model.safetensors"),
        "tokenizer.json": str(folder / "tokenizer.json"),
    }
    assert all(isinstance(operation, huggingface_hub.CommitOperationAdd) for operation in commit["operations"])
    assert said == ["made the repository owner/name"]


def test_a_repository_that_is_there_is_pushed_to(folder: Path, api: Api) -> None:
    api.exists = True
    api.files = [".gitattributes", "model.safetensors", "README.md", "sub/old.safetensors"]
    push(plan_push(folder, "owner/name"))
    assert not api.made
    assert "create_branch" not in api.asked
    assert api.commits[0]["revision"] is None


def test_nothing_private_goes_where_everybody_sees_it(folder: Path, api: Api) -> None:
    api.exists = True
    with pytest.raises(WeightsError, match=r"private = True: owner/name is there already, and public; name another"):
        push(plan_push(folder, "owner/name", private=True))
    api.private = True
    push(plan_push(folder, "owner/name", private=True))
    assert len(api.commits) == 1


@pytest.mark.parametrize("other", ["model.safetensors.index.json", "old.pth", "pytorch_model.bin", "a.gguf"])
def test_weights_that_would_stay_beside_are_refused(folder: Path, api: Api, other: str) -> None:
    api.exists, api.files = True, ["README.md", other]
    with pytest.raises(WeightsError, match=rf"holds other weights, which would lie beside these \({other}\)"):
        push(plan_push(folder, "owner/name"))
    assert not api.commits


@pytest.mark.parametrize(
    "other",
    ["tokenizer.model", "chat_template.jinja", "tokenizer_config.json", "config.json", "generation_config.json"],
)
def test_what_would_be_read_with_these_weights_is_refused(folder: Path, api: Api, other: str) -> None:
    api.exists, api.files = True, ["README.md", "sub/config.json", other]
    with pytest.raises(
        WeightsError, match=rf"holds other files that are read with weights, .*\({other}\); delete them"
    ):
        push(plan_push(folder, "owner/name"))
    assert not api.commits
    (folder / other).write_text("{}")
    push(plan_push(folder, "owner/name"))
    assert len(api.commits) == 1


def test_who_is_not_logged_in_is_told(folder: Path, api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(WeightsError, match="nobody is logged in to the Hugging Face hub; hf auth login, or"):
        push(plan_push(folder, "owner/name"))
    assert not api.asked


def test_what_the_hub_refuses_is_said_without_the_token(folder: Path, api: Api) -> None:
    api.fails = RuntimeError(f"403 for x{TOKEN}: no write access\nand more")
    with pytest.raises(
        WeightsError,
        match=r"owner/name: could not be pushed \(403 for xhf_\.\.\.: no write access\); nothing was uploaded; "
        r"the repository owner/name was made, and is empty\. Mend it and push again",
    ):
        push(plan_push(folder, "owner/name"))
    api.exists = True
    with pytest.raises(WeightsError, match=r"no write access\); nothing was uploaded\. Mend it and push again"):
        push(plan_push(folder, "owner/name"))


def test_the_hub_s_own_checks_take_what_is_sent(folder: Path) -> None:
    """The true operations read the files, as before an upload."""
    for upload in plan_push(folder, "owner/name").uploads:
        operation = huggingface_hub.CommitOperationAdd(upload.name, upload.content)
        assert operation.upload_info.size == upload.num_bytes
