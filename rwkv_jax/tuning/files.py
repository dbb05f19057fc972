"""Opens adapters of every kind of file or folder, and writes them."""

from __future__ import annotations

import os
from pathlib import Path

from rwkv_jax.checks import shown
from rwkv_jax.config import ModelConfig
from rwkv_jax.file_kinds import is_url
from rwkv_jax.run_folder import RUN_FILE
from rwkv_jax.tuning.adapter import Adapter, AdapterError
from rwkv_jax.tuning.peft_files import CONFIG_FILE, TENSORS_FILE, read_peft, write_peft
from rwkv_jax.tuning.run_adapter import open_run_adapter
from rwkv_jax.tuning.rwkv_peft import read_rwkv_peft

_REMEDY = f"name the folder of an adapter (with {CONFIG_FILE}) or of a run, or a .pth by RWKV-PEFT"


def open_adapter(
    source: str | os.PathLike[str],
    *,
    alpha: float | None = None,
    init: str | os.PathLike[str] | None = None,
) -> Adapter:
    """Reads an adapter: a folder of Hugging Face's peft, a run of `rwkv train`, or a .pth by RWKV-PEFT.

    Args:
      alpha: of a .pth with LoRA, which does not have it; folders do.
      init: a .pth with PiSSA's initial values; None looks beside the adapter.

    Raises:
      AdapterError: there is none, alpha is missing or superfluous, or it is not whole.
      WeightsError: a file cannot be read, or is damaged.
    """
    if not isinstance(source, str | os.PathLike) or not os.fspath(source):
        raise AdapterError(f"adapter = {shown(source)}: {_REMEDY}")
    path = Path(source).expanduser()
    if is_url(path):
        raise AdapterError(f"adapter = {shown(os.fspath(source))}: is a web address; fetch it, and {_REMEDY}")
    if not path.exists():
        raise AdapterError(f"adapter = {shown(str(path))}: there is no such file or folder; {_REMEDY}")
    if path.is_file() and path.name in (CONFIG_FILE, TENSORS_FILE):
        path = path.parent
    if path.is_file():
        return read_rwkv_peft(path, alpha, None if init is None else Path(init).expanduser())
    is_run = (path / RUN_FILE).is_file()
    if not is_run and not (path / CONFIG_FILE).is_file():
        raise AdapterError(f"adapter = {shown(str(path))}: has no {CONFIG_FILE}; {_REMEDY}")
    if alpha is not None or init is not None:
        field, value = ("adapter_alpha", alpha) if init is None else ("adapter_init", init)
        raise AdapterError(f"{field} = {shown(value)}: {path} says that itself; leave it out")
    return open_run_adapter(path) if is_run else read_peft(path)


def save_adapter(
    adapter: Adapter,
    folder: str | os.PathLike[str],
    model: ModelConfig,
    *,
    layout: str = "official",
    base: str | None = None,
) -> None:
    """Writes an adapter as a folder of Hugging Face's peft; arguments and errors as those of `write_peft`."""
    write_peft(adapter, Path(folder), model, layout=layout, base=base)
