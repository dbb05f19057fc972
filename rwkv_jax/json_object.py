"""JSON objects from files that nobody vouches for, and the digest by which one of ours is known to be unchanged."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

from rwkv_jax.checks import ConfigError

_DIGEST = "digest"
_LISTED = 8


def parse_object(
    content: bytes, place: object, error_type: type[ConfigError] = ConfigError, remedy: str = "get the file again"
) -> dict[str, Any]:
    """Parses a JSON object.

    Args:
      place: the file, for messages.

    Raises:
      error_type: it is not UTF-8 or not JSON, is nested too deeply, is no object, or has a name twice, of which readers
        take one or the other.
    """

    def refuse_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        parsed = dict(pairs)
        if len(parsed) < len(pairs):
            repeated = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
            more = f" and {len(repeated) - _LISTED} more" if len(repeated) > _LISTED else ""
            shown = ", ".join(ascii(name)[1:-1] for name in repeated[:_LISTED])
            raise error_type(f"{place}: has names twice: {shown}{more}; readers would differ about it")
        return parsed

    try:
        parsed = json.loads(content, object_pairs_hook=refuse_repeats)
    except ConfigError:
        raise
    except (ValueError, RecursionError) as error:
        raise error_type(f"{place}: its JSON cannot be understood ({error}); {remedy}") from error
    if not isinstance(parsed, dict):
        raise error_type(f"{place}: its JSON is no object; {remedy}")
    return parsed


def with_digest(content: Mapping[str, Any]) -> dict[str, Any]:
    """The same object with the digest of its content, by which `is_unchanged` knows it."""
    return {**content, _DIGEST: _digest_of(content)}


def is_unchanged(content: Mapping[str, Any], *, required: bool = False) -> bool:
    """Whether an object is as `with_digest` made it; one without a digest is taken as it is, unless it is required."""
    if _DIGEST not in content:
        return not required
    return content[_DIGEST] == _digest_of(content)


def _digest_of(content: Mapping[str, Any]) -> str:
    others = {name: value for name, value in content.items() if name != _DIGEST}
    return hashlib.blake2b(json.dumps(others, sort_keys=True).encode(), digest_size=16).hexdigest()
