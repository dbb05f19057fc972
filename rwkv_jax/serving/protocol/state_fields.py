"""Fields of requests for texts that begin or end with a state."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from rwkv_jax.checks import ConfigError
from rwkv_jax.serving.protocol.base import Answer, RequestBody, Usage

MAX_ID_LENGTH = 64
"""A longer `state` is base64: no state file is as short."""

ID_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
"""Of ids of states and names of sessions."""

Id = Annotated[str, Field(pattern=ID_PATTERN)]


class StateFields(RequestBody):
    """What a request for one text continues, and what is kept of it."""

    state: str | None = None
    """Continue from this state: an id of /v1/states, the name of a session, or base64 of a state file. It stays as it
    is."""
    return_state: Literal["none", "id", "base64"] = "none"
    """Return the state after the answer: as an id of /v1/states, or as base64 of a state file."""
    session: Id | None = None
    """Continue this conversation, or begin it, from `state` if that is given. Give the new messages only: the state has
    read the others. With the same name in `state`, a conversation that is not there is an error."""
    cache_prompt: bool = True
    """Look the prompt up in the prefix cache, and keep its state there."""
    no_store: bool = False
    """Keep nothing of this request: no session, no state by id, nothing in the prefix cache."""

    def check_states(self, num_texts: int) -> None:
        """Raises ConfigError for fields that do not go together.

        Args:
          num_texts: texts that the request asks for.
        """
        for name, is_given in (
            ("state", self.state is not None),
            ("return_state", self.return_state != "none"),
            ("session", self.session is not None),
            ("cache_prompt", not self.reads_cache()),
        ):
            if is_given and num_texts != 1:
                raise ConfigError(f"{name}: is for one text; this request asks for {num_texts}")
        if self.no_store and (self.session is not None or self.return_state == "id"):
            raise ConfigError("no_store: a session and a state by id are stored; leave no_store out, or these")

    def reads_cache(self) -> bool:
        """Whether the prefix cache may be used."""
        return self.cache_prompt and not self.no_store


class KeptState(Answer):
    """The state after an answer. It has read the prompt and the text of the answer, and nothing after these."""

    id: str | None = None
    """Of /v1/states, if asked for; until it expires."""
    session: str | None = None
    """Name of the conversation that has advanced."""
    base64: str | None = None
    """State file, if asked for."""
    num_tokens: int
    """Tokens that it has read since its text began."""


def _is_none(value: object) -> bool:
    return value is None


Kept = Annotated[KeptState | None, Field(exclude_if=_is_none)]
"""Type of an answer's field that is there only if something was kept."""


class TextAnswer(Answer):
    """What answers of one or several texts, and chunks of their streams, have in common."""

    id: str
    created: int
    """Unix time."""
    model: str
    usage: Usage | None = None
    """Of a stream in the last chunk, if asked for."""
    state: Kept = None
    """What was kept, if anything was to be; of a stream in the chunk with the `finish_reason`."""
