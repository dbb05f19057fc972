"""States in Redis, which several servers share: any of them continues any conversation.

    rwkv:{TENANT}:state:ID    hash: version, kind, num_tokens, num_bytes, model, created, used, data
    rwkv:{TENANT}:ids         sorted set of the tenant's ids, by the time at which they expire

TENANT is a digest of the tenant. The braces keep a tenant's keys on one node of a cluster. How much memory Redis may
take, what it evicts then and what survives its restart are Redis's settings (docs/serving.md).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from rwkv_jax.checks import ConfigError, require
from rwkv_jax.serving.states.store import (
    StateInfo,
    StateRecord,
    TooLargeError,
    UnavailableError,
    conflict,
    new_version,
    tenant_key,
)

_PUT = """
local found = redis.call('HGET', KEYS[1], 'version')
if found == ARGV[2] then return 1 end -- this very call again, after its first answer was lost
if ARGV[1] ~= '' and (found or '0') ~= ARGV[1] then return 0 end
redis.call('HSET', KEYS[1], 'version', ARGV[2], unpack(ARGV, 6))
redis.call('PEXPIRE', KEYS[1], ARGV[4])
redis.call('ZADD', KEYS[2], ARGV[5], ARGV[3])
redis.call('PEXPIRE', KEYS[2], ARGV[4])
return 1
"""
_GET = """
local found = redis.call('HGETALL', KEYS[1])
if #found == 0 then
  redis.call('ZREM', KEYS[2], ARGV[1])
  return found
end
redis.call('HSET', KEYS[1], 'used', ARGV[2])
redis.call('PEXPIRE', KEYS[1], ARGV[3])
redis.call('ZADD', KEYS[2], ARGV[4], ARGV[1])
redis.call('PEXPIRE', KEYS[2], ARGV[3])
return found
"""
_CONNECT_SECONDS = 2.0
_ANSWER_SECONDS = 10.0
_RETRIES = 2
_INFO = ("kind", "num_tokens", "num_bytes", "model", "created", "used")


class RedisStateStore:
    """Records in a Redis database, with a time to live from their last use on."""

    def __init__(
        self,
        url: str,
        *,
        max_bytes: int,
        max_idle_seconds: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Connects; a Redis that is away now may be there later.

        Args:
          url: redis://, rediss:// or unix://, as redis-py takes it, with the password if there is one.
          max_bytes: maximum of one record.
          max_idle_seconds: after which an unused record expires.
          clock: Unix time.

        Raises:
          ConfigError: a bound that is not positive, an invalid address, Redis refuses the password, or redis-py is not
            installed.
        """
        require(max_bytes > 0, "max_bytes", max_bytes, "must be 1 or more")
        require(max_idle_seconds > 0, "max_idle_seconds", max_idle_seconds, "must be positive")
        try:
            import redis
            from redis import exceptions
            from redis.backoff import ExponentialWithJitterBackoff
            from redis.retry import Retry
        except ImportError as error:
            raise ConfigError("states in Redis: redis-py is not installed; pip install 'rwkv-jax[redis]'") from error
        self._max_bytes, self._max_milliseconds, self._clock = max_bytes, int(1000 * max_idle_seconds), clock
        self._errors = exceptions
        try:
            self._client: Any = redis.Redis.from_url(
                url,
                socket_connect_timeout=_CONNECT_SECONDS,
                socket_timeout=_ANSWER_SECONDS,
                retry=Retry(ExponentialWithJitterBackoff(base=0.05, cap=0.5), _RETRIES),
            )
        except ValueError as error:  # without the address, which may have a password
            raise ConfigError(f"states in Redis: the address cannot be used ({error})") from None
        self._put, self._get = self._client.register_script(_PUT), self._client.register_script(_GET)
        try:
            self._client.ping()
        except self._errors.AuthenticationError as error:
            raise ConfigError(
                f"states in Redis: it does not let us in ({error}); put the password into the address"
            ) from None
        except self._errors.RedisError:
            pass  # requests that need it are answered so until it is there

    def put(self, tenant: str, id: str, record: StateRecord, *, expected: int | None = None) -> int:
        """As `StateStore.put`; durable as Redis's settings are."""
        if len(record.data) > self._max_bytes:
            raise TooLargeError(f"{id}: takes {len(record.data)} bytes where a state may take {self._max_bytes}")
        version, now = new_version(), self._clock()
        expires = now + self._max_milliseconds / 1000
        values: dict[str, Any] = {
            "kind": record.kind,
            "num_tokens": record.num_tokens,
            "num_bytes": len(record.data),
            "model": record.model,
            "created": repr(record.created),
            "used": repr(now),
            "data": record.data,
        }
        flat = [part for item in values.items() for part in item]
        wanted = "" if expected is None else str(expected)
        with self._reporting():
            is_stored = self._put(
                keys=[_key(tenant, id), _ids(tenant)],
                args=[wanted, str(version), id, self._max_milliseconds, expires, *flat],
            )
        if not is_stored:
            raise conflict(id)
        return version

    def get(self, tenant: str, id: str) -> StateRecord | None:
        """As `StateStore.get`; a record that Redis has evicted or lost is none, too."""
        now = self._clock()
        with self._reporting():
            found = self._get(
                keys=[_key(tenant, id), _ids(tenant)],
                args=[id, repr(now), self._max_milliseconds, now + self._max_milliseconds / 1000],
            )
        if not found:
            return None
        fields = {name.decode(): value for name, value in zip(found[::2], found[1::2], strict=True)}
        return StateRecord(
            data=fields["data"],
            num_tokens=int(fields["num_tokens"]),
            model=fields["model"].decode(),
            created=float(fields["created"]),
            kind=fields["kind"].decode(),
            version=int(fields["version"]),
        )

    def delete(self, tenant: str, id: str) -> bool:
        """As `StateStore.delete`."""
        with self._reporting(), self._client.pipeline() as pipeline:
            pipeline.delete(_key(tenant, id))
            pipeline.zrem(_ids(tenant), id)
            return pipeline.execute()[0] > 0

    def list(self, tenant: str) -> list[StateInfo]:
        """As `StateStore.list`."""
        with self._reporting():
            self._client.zremrangebyscore(_ids(tenant), "-inf", self._clock())
            ids = [id.decode() for id in self._client.zrange(_ids(tenant), 0, -1)]
            with self._client.pipeline(transaction=False) as pipeline:
                for id in ids:
                    pipeline.hmget(_key(tenant, id), _INFO)
                rows = pipeline.execute()
        found = [_info(id, row) for id, row in zip(ids, rows, strict=True) if row[0] is not None]
        return sorted(found, key=lambda info: (-info.used, info.id))

    def close(self) -> None:
        """Ends the connections."""
        self._client.close()

    @contextlib.contextmanager
    def _reporting(self) -> Iterator[None]:
        try:
            yield
        except self._errors.RedisError as error:  # away, loading, read-only, out of memory
            raise UnavailableError(f"states in Redis: cannot be reached or written now ({error})") from error


def _key(tenant: str, id: str) -> str:
    return f"rwkv:{{{tenant_key(tenant)}}}:state:{id}"


def _ids(tenant: str) -> str:
    return f"rwkv:{{{tenant_key(tenant)}}}:ids"


def _info(id: str, row: list[Any]) -> StateInfo:
    kind, num_tokens, num_bytes, model, created, used = row
    return StateInfo(id, kind.decode(), int(num_tokens), int(num_bytes), model.decode(), float(created), float(used))
