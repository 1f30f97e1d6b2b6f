"""Sessions that several servers keep in Redis.

    dyadlm:ID:state    the file of the session
    dyadlm:ID:known    what is known of it, as JSON
    dyadlm:ID:lock     the claim of a server, which runs out where the server does not renew it
    dyadlm:name:NAME   the id of the session of a name

Keys run out when the session does. A session is written by a script that compares the claim in the same step: a server
that was stopped for longer than its lease writes nothing.
"""

import errno
import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dyadlm.errors import UserError
from dyadlm.serve.session_record import ID, NAME, fits
from dyadlm.serve.session_storage import NAME_SECONDS, Claim, ClaimLost, Stored

LEASE = 30.0  # seconds
PREFIX = "dyadlm:"

# Keys: lock, state, known, name. Arguments: token, milliseconds, state, known, id, whether there is a name.
WRITE = """
if redis.call('get', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('set', KEYS[2], ARGV[3], 'PX', ARGV[2])
redis.call('set', KEYS[3], ARGV[4], 'PX', ARGV[2])
local owner = redis.call('get', KEYS[4])
if ARGV[6] == '1' and (not owner or owner == ARGV[5]) then redis.call('set', KEYS[4], ARGV[5], 'PX', ARGV[2]) end
return 1
"""
# Keys: state, known, name. Arguments: id.
DELETE = """
redis.call('del', KEYS[1], KEYS[2])
if redis.call('get', KEYS[3]) == ARGV[1] then redis.call('del', KEYS[3]) end
"""


class RedisClaim:
    """A lock of redis-py, with a lease."""

    lease: float | None = LEASE

    def __init__(self, lock: Any):
        self._lock = lock

    @property
    def token(self) -> bytes:
        """What Redis holds while the claim lasts."""
        return bytes(self._lock.local.token)

    def renew(self) -> None:
        self._lock.extend(LEASE, replace_ttl=True)

    def release(self) -> None:
        from redis.exceptions import RedisError

        with suppress(RedisError):  # it has run out, or will
            self._lock.release()


class RedisStorage:
    """url: `redis://host:port/number`, or `rediss://` with TLS. Raises `UserError` where there is no such server, or
    the package redis is missing."""

    def __init__(self, url: str, password: str | None = None):
        try:
            import redis
        except ImportError as error:
            raise UserError("Sessions in Redis need the package redis: pip install 'dyadlm[redis]'.") from error
        self._error = redis.RedisError
        self._client: Any  # in the types of redis, answers are bytes or str
        try:
            self._client = redis.Redis.from_url(url, password=password, socket_timeout=10, socket_connect_timeout=5)
            self._client.connection_pool.connection_kwargs["decode_responses"] = False  # whatever the URL asks for
            self._client.ping()
        except (redis.RedisError, ValueError) as error:
            shown = url.rpartition("@")[2]  # without a password
            raise UserError(f"Redis at {shown} cannot be used ({error}); check --sessions.") from error
        self._write, self._delete = self._client.register_script(WRITE), self._client.register_script(DELETE)

    def find(self, key: str) -> Stored | None:
        with self._reachable():
            if not ID.fullmatch(key):
                if not NAME.fullmatch(key):
                    return None
                key = (self._client.get(f"{PREFIX}name:{key}") or b"").decode(errors="replace")
            return next(self._stored([key]), None) if ID.fullmatch(key) else None

    def all(self) -> list[Stored]:
        with self._reachable():
            keys = self._client.scan_iter(match=f"{PREFIX}sess_*:known", count=1000)
            return list(self._stored(sorted({key.decode().split(":")[1] for key in keys})))

    def claim(self, session_id: str) -> RedisClaim | None:
        with self._reachable():
            lock = self._client.lock(f"{PREFIX}{session_id}:lock", timeout=LEASE, thread_local=False)
            return RedisClaim(lock) if lock.acquire(blocking=False) else None

    def take_name(self, name: str, session_id: str) -> bool:
        with self._reachable():
            return bool(self._client.set(f"{PREFIX}name:{name}", session_id, nx=True, px=_milliseconds(NAME_SECONDS)))

    @contextmanager
    def reading(self, session_id: str) -> Iterator[Path]:
        with self._reachable():
            content = self._client.get(f"{PREFIX}{session_id}:state")
        if content is None:
            raise FileNotFoundError(session_id)
        with tempfile.TemporaryDirectory(prefix="dyadlm-") as folder:
            path = Path(folder) / "session.state"
            path.write_bytes(content)
            yield path

    @contextmanager
    def writing(self, known: Mapping[str, Any], claim: Claim) -> Iterator[Path]:
        assert isinstance(claim, RedisClaim)
        with tempfile.TemporaryDirectory(prefix="dyadlm-") as folder:
            path = Path(folder) / "session.state"
            yield path
            keys = [f"{PREFIX}{known['id']}:lock", *self._keys(known)]
            named = str(int(known["name"] is not None))
            given = [claim.token, _milliseconds(known["ttl"]), path.read_bytes(), json.dumps(known), known["id"], named]
            with self._reachable():
                if not self._write(keys, given):
                    raise ClaimLost

    def used(self, known: Mapping[str, Any]) -> None:
        with self._reachable(), self._client.pipeline(transaction=False) as pipeline:
            for key in self._keys(known)[: 2 + (known["name"] is not None)]:
                pipeline.pexpire(key, _milliseconds(known["ttl"]))
            pipeline.execute()

    def delete(self, known: Mapping[str, Any]) -> None:
        with self._reachable():
            self._delete(self._keys(known), [known["id"]])

    def close(self) -> None:
        self._client.close()

    def _keys(self, known: Mapping[str, Any]) -> list[str]:
        """Of state, known and name."""
        own = PREFIX + known["id"]
        return [f"{own}:state", f"{own}:known", f"{PREFIX}name:{known['name']}"]

    def _stored(self, ids: Sequence[str]) -> Iterator[Stored]:
        """Those of these sessions that there are."""
        with self._client.pipeline(transaction=False) as pipeline:
            for session_id in ids:
                pipeline.get(f"{PREFIX}{session_id}:known")
                pipeline.pttl(f"{PREFIX}{session_id}:known")
                pipeline.strlen(f"{PREFIX}{session_id}:state")
            answers = pipeline.execute()
        for session_id, content, left, size in zip(ids, answers[::3], answers[1::3], answers[2::3], strict=True):
            try:
                known = json.loads(content or "null")
            except ValueError:
                continue
            if fits(known) and known["id"] == session_id:
                yield Stored(known, time.time() + left / 1000 - known["ttl"], size)

    @contextmanager
    def _reachable(self) -> Iterator[None]:
        try:
            yield
        except self._error as error:
            raise OSError(errno.EIO, "Redis does not answer") from error


def _milliseconds(seconds: float) -> int:
    return max(1, round(1000 * seconds))
