"""Publishes a folder of weights on the Hugging Face hub: what is uploaded, what not, and one commit that does it."""

from __future__ import annotations

import dataclasses
import fnmatch
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rwkv_jax.data.tokenizers import TOKENIZER_FILES
from rwkv_jax.weights.card import CARD_FILE, check_license, license_text, yaml_text
from rwkv_jax.weights.hub import TEMPLATES, short_reason, without_warnings_of_retries
from rwkv_jax.weights.hugging_face import CONFIG_FILE, GENERATION_FILE
from rwkv_jax.weights.pinned import check_revision, files_of
from rwkv_jax.weights.shards import is_index
from rwkv_jax.weights.sources import find_weights, open_weights, weights_among
from rwkv_jax.weights.tensors import WeightsError, join_names, prefix_errors

MAX_FILE_BYTES = 50 * 10**9
"""What the hub takes as one file."""

_READ_WITH_WEIGHTS = (CONFIG_FILE, GENERATION_FILE, *TOKENIZER_FILES, *TEMPLATES)

_BESIDE = (
    CARD_FILE,
    *(f"{name}{suffix}" for name in ("LICENSE", "NOTICE") for suffix in ("", ".txt", ".md", "-*")),
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    *_READ_WITH_WEIGHTS,
)
"""All that is uploaded besides weights."""

_MAX_TEXT_BYTES = 10**8
_TOKEN = re.compile(rb"hf_[A-Za-z0-9]{30,}")  # wherever it begins: JSON has the end of a line before it as \n
_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
_FRONT_MATTER = re.compile(r"\ufeff?---[ \t]*\r?\n")


class Upload(NamedTuple):
    """A file of the repository."""

    name: str
    content: Path | bytes
    num_bytes: int
    note: str = ""
    """What is said of it."""


@dataclasses.dataclass(frozen=True)
class Push:
    """What is to be published."""

    repository: str
    """OWNER/NAME."""
    revision: str | None
    """The branch; None is the repository's main one."""
    private: bool
    license: str
    title: str
    """What the weights are, on a line."""
    uploads: tuple[Upload, ...]
    left_out: Mapping[str, str]
    """What lies in the folder and is not uploaded, and why."""


def plan_push(
    folder: Path,
    repository: str,
    *,
    license: str | None = None,
    revision: str | None = None,
    private: bool = False,
) -> Push:
    """Checks a folder, and says what of it would be published; reads its weights once, and asks nobody.

    Args:
      license: is put into the card that is uploaded, if the folder's own states none; the folder stays as it is.

    Raises:
      WeightsError: the folder holds no weights that can be loaded whole, no card with a license, a file that is too
        large, leads out of the folder or has a token in it; or the names cannot be.
    """
    _check_repository(repository)
    if revision is not None:
        check_revision(revision)
    if license is not None:
        check_license(license)
    folder = folder.expanduser()
    weights, title = _check_weights(folder)
    allowed = {path.name for path in files_of(weights)}
    uploads: list[Upload] = []
    left_out: dict[str, str] = {}
    for path in sorted(folder.iterdir()):
        if path.name not in allowed and not any(fnmatch.fnmatchcase(path.name, pattern) for pattern in _BESIDE):
            left_out[path.name] = "a folder" if path.is_dir() else "neither weights nor what is known beside them"
        else:
            uploads.append(_upload(folder, path))
    named, card = _card(folder, license)
    uploads = [upload for upload in uploads if upload.name != CARD_FILE] + [card]
    for upload in uploads:
        if upload.name not in allowed or is_index(upload.name):
            _refuse_tokens(upload)
    return Push(repository, revision, private, named, title, tuple(sorted(uploads)), left_out)


def _check_repository(repository: str) -> None:
    name = repository.partition("/")[2]
    is_name = _REPOSITORY.fullmatch(repository) is not None and len(repository) <= 96
    if not is_name or "--" in repository or ".." in repository or name.endswith((".git", ".", "-")):
        raise WeightsError(
            f"repository = {repository!r}: must be OWNER/NAME on the Hugging Face hub, of letters, digits, - _ and ."
        )


def _check_weights(folder: Path) -> tuple[Path, str]:
    """The file or index of a folder's weights, which are whole, and what they are."""
    if not folder.is_dir():
        raise WeightsError(
            f"{folder}: is no folder here; name a folder of weights, as rwkv convert and save_pretrained write one"
        )
    path = find_weights(folder)
    if path.is_dir():
        raise WeightsError(
            f"{folder}: is a run, with its optimizer's state; write its weights into a folder of their own first (rwkv "
            "convert RUN OUT --license ...) and push that"
        )
    from rwkv_jax.weights.official import check_tensors

    weights = open_weights(path)
    with prefix_errors(path):
        model = weights.model_config()
        check_tensors(weights.tensors, model)
        weights.file.verify()
    return path, f"{model.title}, {model.num_layers} layers of width {model.width}, {weights.layout} names"


def _upload(folder: Path, path: Path) -> Upload:
    """A file of the folder that may be published."""
    try:
        target = path.resolve(strict=True)
        size = target.stat().st_size
    except (OSError, RuntimeError) as error:  # RuntimeError: a link to itself, in Python 3.11
        raise WeightsError(f"{path}: is a link to nothing; put the file there") from error
    if not target.is_relative_to(folder.resolve()):
        raise WeightsError(f"{path}: is a link that leads out of the folder, to {target}; put a copy there")
    if not target.is_file():
        raise WeightsError(f"{path}: is no plain file; move it away")
    if size > MAX_FILE_BYTES:
        raise WeightsError(
            f"{path}: has {size / 1e9:.1f} GB, and the hub takes files up to {MAX_FILE_BYTES / 1e9:.0f}; write it in "
            "shards, as rwkv convert does into a folder"
        )
    return Upload(path.name, path, size)


def _refuse_tokens(upload: Upload) -> None:
    """Raises WeightsError for a file that has a token of the hub in it, or is too large to be searched for one."""
    if upload.num_bytes > _MAX_TEXT_BYTES:
        raise WeightsError(
            f"{upload.name}: has {upload.num_bytes / 1e6:.0f} MB; beside weights only files up to "
            f"{_MAX_TEXT_BYTES / 1e6:.0f} are searched for access tokens and published; move it away"
        )
    content = upload.content.read_bytes() if isinstance(upload.content, Path) else upload.content
    if _TOKEN.search(content):
        raise WeightsError(f"{upload.name}: has an access token of the hub in it (hf_...); take it out, and revoke it")


def _card(folder: Path, license: str | None) -> tuple[str, Upload]:
    """The license that is stated, and the card with it."""
    path = folder / CARD_FILE
    try:
        text = path.read_bytes().decode()
    except FileNotFoundError as error:
        raise WeightsError(
            f"{folder}: has no model card ({CARD_FILE}); rwkv convert writes one into a folder: rwkv convert {folder} "
            "OUT --license ..."
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise WeightsError(f"{path}: cannot be read as UTF-8 ({error}); mend it") from error
    fields = front_matter_of(text, path)
    stated = fields.get("license")
    if stated is None or str(stated).strip().lower() in ("", "unknown", "none"):
        if license is None:
            raise WeightsError(
                f"{path}: states no license, without which nobody may use what is published; give --license, such as "
                "apache-2.0, or write license: ... into its front matter"
            )
        if "license" in fields:
            raise WeightsError(f"{path}: license = {stated!r}: take that line out to have --license put in")
        text = with_license(text, license)
        if front_matter_of(text, path) != {**fields, "license": license}:
            raise WeightsError(f"{path}: a license cannot be put into its front matter; write it there yourself")
        content = text.encode()
        return license, Upload(CARD_FILE, content, len(content), "with the license put in")
    if not isinstance(stated, str) or (stated == "other" and not fields.get("license_name")):
        raise WeightsError(
            f"{path}: license = {stated!r}: does not say which; write an identifier of the hub, or license_name and "
            "license_link beside license: other"
        )
    if stated != "other":
        with prefix_errors(path):
            check_license(stated)
    if license not in (None, stated):
        raise WeightsError(f"license = {license!r}: {path} states {stated!r}; leave it out, or mend the card")
    content = text.encode()
    return stated, Upload(CARD_FILE, content, len(content))


def front_matter_of(text: str, place: object) -> dict[str, Any]:
    """The fields of a card; none without front matter. Raises WeightsError for what is no YAML, or no fields."""
    opened = _FRONT_MATTER.match(text)
    if opened is None:
        return {}
    closed = re.search(r"^---[ \t]*(?:\r?\n|$)", text[opened.end() :], re.MULTILINE)
    if closed is None:
        raise WeightsError(f"{place}: its front matter has no end; put a line of three dashes there")
    try:
        import yaml
    except ImportError as error:
        raise WeightsError(f'{place}: cannot be read without PyYAML: pip install "rwkv-jax[hub]"') from error
    try:
        fields = yaml.safe_load(text[opened.end() : opened.end() + closed.start()])
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise WeightsError(f"{place}: its front matter is no YAML ({short_reason(error)}); mend it") from error
    if fields is None:
        return {}
    if not isinstance(fields, dict):
        raise WeightsError(f"{place}: its front matter has no fields; write name: value, a line each")
    return {str(name): value for name, value in fields.items()}


def with_license(text: str, license: str) -> str:
    """A card that states a license in its front matter, and where its text said that none is."""
    text = text.replace(license_text(None), license_text(license))
    line = f"license: {yaml_text(license)}\n"
    opened = _FRONT_MATTER.match(text)
    if opened is None:
        return f"---\n{line}---\n\n{text}"
    return text[: opened.end()] + line + text[opened.end() :]


def push(plan: Push, report: Callable[[str], None] = lambda line: None) -> str:
    """Uploads what was planned as one commit, by the token of the environment or of `hf auth login`.

    Returns:
      The commit.

    Raises:
      WeightsError: nobody is logged in, the repository is public where a private one was asked for, it has weights, or
        files that are read with weights, that would stay beside these, or the hub refuses. Nothing is uploaded then.
    """
    try:
        import huggingface_hub as hub
    except ImportError as error:
        raise WeightsError('huggingface_hub is missing: pip install "rwkv-jax[hub]"') from error
    if hub.get_token() is None:
        raise WeightsError(
            f"{plan.repository}: nobody is logged in to the Hugging Face hub; hf auth login, or set HF_TOKEN"
        )
    api = hub.HfApi(library_name="rwkv-jax")
    made = False
    try:
        with without_warnings_of_retries():
            if api.repo_exists(plan.repository):
                _check_present(api, plan)
            else:
                api.create_repo(plan.repository, private=plan.private or None)
                made = True
                report(f"made the repository {plan.repository}")
            if plan.revision is not None:
                api.create_branch(plan.repository, branch=plan.revision, exist_ok=True)
            operations = [hub.CommitOperationAdd(upload.name, upload.content) for upload in plan.uploads]
            done = api.create_commit(
                plan.repository, operations, commit_message=f"Upload {plan.title}", revision=plan.revision
            )
    except WeightsError:
        raise
    except Exception as error:  # of the hub, of the network or of the disk, by whatever library speaks to them
        left = f"; the repository {plan.repository} was made, and is empty" if made else ""
        reason = re.sub(r"hf_\w+", "hf_...", short_reason(error))
        raise WeightsError(
            f"{plan.repository}: could not be pushed ({reason}); nothing was uploaded{left}. Mend it and push again"
        ) from error
    return str(done.oid)


def _check_present(api: Any, plan: Push) -> None:
    """Raises WeightsError if a repository that is there must not get what is planned."""
    info = api.model_info(plan.repository)
    if plan.private and info.private is not True:
        raise WeightsError(
            f"private = True: {plan.repository} is there already, and public; name another, or make it private there"
        )
    branches = {branch.name for branch in api.list_repo_refs(plan.repository).branches}
    if plan.revision is not None and plan.revision not in branches:
        return _refuse_beside(api.list_repo_files(plan.repository), plan)
    return _refuse_beside(api.list_repo_files(plan.repository, revision=plan.revision), plan)


def _refuse_beside(present: Sequence[str], plan: Push) -> None:
    """Raises WeightsError if what is there would lie beside these weights, and be read in their place or with them."""
    ours = {upload.name for upload in plan.uploads}
    others = {
        "weights": set(weights_among(present)),
        "files that are read with weights": {*present} & {*_READ_WITH_WEIGHTS},
    }
    for what, names in others.items():
        if names := sorted(names - ours):
            raise WeightsError(
                f"{plan.repository}: holds other {what}, which would lie beside these ({join_names(names)}); delete "
                "them there, or name another repository or --revision"
            )
