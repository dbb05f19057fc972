"""`rwkv push`: publishes a folder of weights on the Hugging Face hub."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from rwkv_jax.tables import format_table

if TYPE_CHECKING:
    from rwkv_jax.weights.push import Push


@dataclasses.dataclass(frozen=True)
class PushCommand:
    """Publish a folder of weights on the Hugging Face hub, as one commit, as who has logged in (hf auth login)."""

    folder: tyro.conf.Positional[Path]
    """A folder with weights and a model card, as `rwkv convert` and `save_pretrained` write one."""
    repository: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="OWNER/NAME")]]
    """The repository, which is made if it is not there."""
    license: str | None = None
    """The hub's identifier of the license, such as apache-2.0, for a card that states none; the folder's own file stays
    as it is. Without a license nothing is published."""
    private: bool = False
    """Make a private repository; refuse one that is there and public."""
    revision: str | None = None
    """Branch to upload to, which is made if it is not there; None is the main one."""
    dry_run: bool = False
    """Check everything and say what would be uploaded, without asking the hub anything."""

    def run(self) -> None:
        """Checks the folder, says what is uploaded, and uploads it."""
        from rwkv_jax.weights.push import plan_push, push

        plan = plan_push(
            self.folder, self.repository, license=self.license, revision=self.revision, private=self.private
        )
        print(described(plan))
        if self.dry_run:
            print("nothing was uploaded (--dry-run)")
            return
        commit = push(plan, print)
        print(f'pushed; pinned: from_pretrained("{plan.repository}", revision="{commit}")')


def described(plan: Push) -> str:
    """What is to be published, on some lines."""
    at = "" if plan.revision is None else f", branch {plan.revision}"
    seen = "private" if plan.private else "for everybody to see, unless the repository is private"
    rows = [(upload.name, f"{upload.num_bytes:,}", upload.note) for upload in plan.uploads]
    rows.append(("in all", f"{sum(upload.num_bytes for upload in plan.uploads):,}", "bytes"))
    lines = [
        plan.title,
        f"to {plan.repository}{at}, {seen}; license {plan.license}",
        format_table(rows, "<><"),
    ]
    if plan.left_out:
        lines += ["not uploaded:", format_table([*plan.left_out.items()], "<<")]
    return "\n".join(lines)
