"""Log-probabilities of tokens in the forms of OpenAI's APIs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rwkv_jax.data.tokenizers import StreamingDecoder, Tokenizer
from rwkv_jax.inference.engine.requests import TopLogprobs
from rwkv_jax.serving.protocol.chat import ChatLogprobs, ContentLogprob, TokenLogprob
from rwkv_jax.serving.protocol.completions import Logprobs


def token_string(tokenizer: Tokenizer, token: int) -> str:
    """A token's text; `bytes:\\xe2\\x80` if it is a part of a character."""
    content = tokenizer.token_bytes(token)
    try:
        return content.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


class CompletionLogprobs:
    """Makes the `logprobs` of one text's pieces, in order."""

    def __init__(self, tokenizer: Tokenizer, count: int) -> None:
        """Before the first token.

        Args:
          count: most likely tokens to report at each position; the chosen one comes on top if it is none of them.
        """
        self._tokenizer, self._count = tokenizer, count
        self._decoder, self._offset = StreamingDecoder(tokenizer), 0

    def piece(self, ids: Sequence[int], values: Sequence[float | None], tops: Sequence[TopLogprobs]) -> Logprobs:
        """Of the next tokens.

        Args:
          values: logprob of each of `ids`; None if nothing precedes it.
          tops: the most likely tokens in the place of each; empty if there are none.
        """
        offsets = []
        for token in ids:
            offsets.append(self._offset)
            self._offset += len(self._decoder.push(token))
        tops = tops or [()] * len(ids)
        # The very number that the token has among the most likely ones, which is rounded in another place.
        values = [
            None if value is None else dict(top).get(token, value)
            for token, value, top in zip(ids, values, tops, strict=True)
        ]
        own = zip(ids, values, tops, strict=True)
        return Logprobs(
            tokens=[token_string(self._tokenizer, token) for token in ids],
            token_logprobs=values,
            top_logprobs=[None if value is None else self._top(token, value, top) for token, value, top in own],
            text_offset=offsets,
        )

    def _top(self, token: int, value: float, top: TopLogprobs) -> dict[str, float]:
        found: dict[str, float] = {}
        for other, logprob in (*top[: self._count], (token, value)):
            found.setdefault(token_string(self._tokenizer, other), logprob)  # several ids may have one text
        return found


def chat_logprobs(
    tokenizer: Tokenizer, ids: Sequence[int], values: Sequence[float], tops: Sequence[TopLogprobs]
) -> ChatLogprobs:
    """Of some tokens of a reply, in the chat API's form; arguments as those of `CompletionLogprobs.piece`."""

    def token_logprob(token: int, logprob: float) -> dict[str, Any]:
        content = tokenizer.token_bytes(token)
        return {"token": content.decode(errors="replace"), "logprob": logprob, "bytes": list(content)}

    return ChatLogprobs(
        content=[
            ContentLogprob(
                **token_logprob(token, dict(top).get(token, value)),
                top_logprobs=[TokenLogprob(**token_logprob(other, logprob)) for other, logprob in top],
            )
            for token, value, top in zip(ids, values, tops or [()] * len(ids), strict=True)
        ]
    )
