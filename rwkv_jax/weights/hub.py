"""Models on the Hugging Face hub: fetches them, and tells what was fetched."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rwkv_jax.data.tokenizers import TOKENIZER_FILES
from rwkv_jax.weights.hugging_face import CONFIG_FILE, GENERATION_FILE
from rwkv_jax.weights.shards import shard_patterns
from rwkv_jax.weights.tensors import WeightsError

_LOG = logging.getLogger(__name__)

TEMPLATES = ("chat_template.jinja", "tokenizer_config.json")
"""Files that have a template of chats."""

_COMMIT = re.compile(r"[0-9a-f]{40}")
_REPOSITORY = "models--"  # begins the names of folders in the hub's cache


class Origin(NamedTuple):
    """Where on the hub a file is from."""

    name: str
    """OWNER/NAME."""
    commit: str


def origin_of(path: Path) -> Origin | None:
    """The repository and the commit of what lies in the hub's cache; None for other places."""
    for folder in path.absolute().parents:
        repository = folder.parent.parent.name
        if folder.parent.name == "snapshots" and _COMMIT.fullmatch(folder.name) and repository.startswith(_REPOSITORY):
            return Origin(repository.removeprefix(_REPOSITORY).replace("--", "/"), folder.name)
    return None


def fetch(
    name: str, file: str | None, path: Path, revision: str | None, choose: Callable[[Sequence[str], str], str]
) -> Path:
    """Fetches a model, or finds what was fetched before if the hub cannot be reached.

    All files are those of one commit, whatever is uploaded meanwhile.

    Args:
      file: one of its files; None chooses.
      path: the path that was looked for first, for messages.
      revision: a branch, a tag or a commit; None is the hub's main branch.
      choose: from the names in a folder, and what messages call it, the file of weights.

    Raises:
      WeightsError: there is no such model, file or revision, or the hub cannot be reached.
    """
    at = "" if revision is None else f" at {revision}"
    looked_for = f"looked for the file or folder {path}, then for {name}{at} on the Hugging Face hub"
    pin: dict[str, Any] = {} if revision is None else {"revision": revision}
    try:
        import huggingface_hub
    except ImportError as error:
        raise WeightsError(
            f'{looked_for}, for which huggingface_hub is missing: pip install "rwkv-jax[hub]", or name a local folder'
        ) from error
    try:
        list_files, download = huggingface_hub.list_repo_files, huggingface_hub.snapshot_download
        with without_warnings_of_retries():
            chosen = file or choose(list_files(name, **pin), name)
            config = [] if chosen.endswith(".pth") else [CONFIG_FILE, GENERATION_FILE]
            wanted = [chosen, *TOKENIZER_FILES, *TEMPLATES, *config, *shard_patterns(chosen)]
            return Path(download(name, allow_patterns=wanted, **pin)) / chosen
    except WeightsError:
        raise
    except Exception as error:  # of the hub, of the network or of the disk, by whatever library speaks to them
        reason = short_reason(error)
        if getattr(error, "response", None) is not None:
            what = "the name" if revision is None else "the name or the revision"
            raise WeightsError(f"{looked_for}, which answered: {reason}; mend {what}, or log in there") from error
        try:
            folder = Path(huggingface_hub.snapshot_download(name, local_files_only=True, **pin))
        except Exception:  # nothing was fetched, which is said next
            folder = None
        if folder is None or not (file is None or (folder / file).is_file()):
            raise WeightsError(
                f"{looked_for} ({reason}), then among what was fetched before; name a local file or folder, or try "
                "again when the hub can be reached"
            ) from error
        _LOG.warning("%s: the hub cannot be reached (%s); taking what was fetched before, in %s", name, reason, folder)
        return folder / (file or choose([entry.name for entry in folder.iterdir()], str(folder)))


def short_reason(error: BaseException) -> str:
    """What an error of another library says, in a line."""
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__


@contextlib.contextmanager
def without_warnings_of_retries() -> Iterator[None]:
    """Silences huggingface_hub's messages about each attempt, if it is loaded; we report the last result."""
    logger = logging.getLogger("huggingface_hub")
    before = logger.level
    logger.setLevel(max(before, logging.ERROR))
    try:
        yield
    finally:
        logger.setLevel(before)
