"""What is known of a session: as the routes handle it, and as a file beside its state tells it."""

import asyncio
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from dyadlm.errors import UserError
from dyadlm.serve.errors import ApiError
from dyadlm.serve.rows import Row
from dyadlm.serve.served import ServedModel
from dyadlm.state_file import BESIDE

ID_PREFIX = "sess_"
ID = re.compile(r"^sess_[A-Za-z0-9_-]{22}$")
NAME = re.compile(r"^[A-Za-z0-9._-]{1,64}$")
# Beside the state in a file: what is known of the session, as the bytes of JSON.
ABOUT = "serve.session"
SUFFIX = ".state"
LARGEST = 2**53  # number, that every reader of JSON takes
TAIL = 200  # characters of the text that are shown


@dataclass(eq=False)
class ServedSession:
    """row: as the session stands; None while it is on disk alone. It is never changed, only replaced. parent: the
    session that it was forked from. tail: the end of what was read. created, used: seconds since 1970. ttl: seconds for
    which it is kept unused. saved: whether the file is as the row is. busy: whether a request continues it.
    """

    id: str
    model: ServedModel
    name: str | None
    parent: str | None
    row: Row | None
    tokens: int
    nbytes: int
    tail: str
    created: float
    used: float
    ttl: float
    saved: bool = False
    version: str = ""
    busy: bool = False
    deleted: bool = False
    changed: float = 0.0
    file_bytes: int = 0
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def expires(self) -> float:
        return self.used + self.ttl

    def described(self) -> dict[str, Any]:
        """For answers."""
        return {
            "id": self.id,
            "object": "session",
            "name": self.name,
            "model": self.model.name,
            "tokens": self.tokens,
            "state_bytes": self.nbytes,
            "created": round(self.created, 3),
            "used": round(self.used, 3),
            "expires": round(self.expires, 3),
            "place": "shared" if self.version else "disk" if self.row is None else "memory",
            "saved": self.saved,
            "parent": self.parent,
            "tail": self.tail,
        }

    def known(self) -> dict[str, Any]:
        """What another server has to know of it."""
        return {
            "id": self.id,
            "name": self.name,
            "parent": self.parent,
            "model": self.model.name,
            "identity": self.model.identity,
            "tokens": self.tokens,
            "nbytes": self.nbytes,
            "tail": self.tail,
            "created": self.created,
            "used": self.used,
            "ttl": self.ttl,
            "version": self.version,
        }

    def about(self) -> dict[str, np.ndarray]:
        """What is written beside the state."""
        return {ABOUT: np.frombuffer(json.dumps(self.known()).encode(), np.uint8)}


def require_valid_name(name: str) -> None:
    """Raise `ApiError` for what cannot be the name of a session."""
    if not NAME.fullmatch(name) or name.startswith(ID_PREFIX):
        message = (
            f"A name has 1 to 64 letters, digits, dots, dashes or underscores, and does not begin with {ID_PREFIX}."
        )
        raise ApiError(400, message, param="name")


def not_found(key: str) -> ApiError:
    return ApiError(404, f"There is no session {key[:80]!r}.", param="session", code="session_not_found")


def name_taken(name: str) -> ApiError:
    return ApiError(409, f"There is a session {name!r} already.", param="name", code="name_taken")


def session_busy() -> ApiError:
    message = "Another request continues this session; wait for it, or fork the session."
    return ApiError(409, message, param="session", code="session_busy", retry_after=1)


KINDS: dict[str, tuple[type, ...]] = {
    "id": (str,),
    "name": (str, type(None)),
    "parent": (str, type(None)),
    "model": (str,),
    "identity": (str,),
    "tokens": (int,),
    "nbytes": (int,),
    "tail": (str,),
    "created": (int, float),
    "used": (int, float),
    "ttl": (int, float),
}


def known_of(path: Path) -> dict[str, Any] | None:
    """What a file says of its session, without reading the state; None if it says nothing that can be used."""
    try:
        with safe_open(str(path), framework="np") as file:
            known = json.loads(file.get_tensor(BESIDE + ABOUT).tobytes())
    except (SafetensorError, OSError, ValueError):
        return None
    return known if fits(known) else None


def fits(known: Any) -> bool:
    """Whether this can be what is known of a session."""
    if not isinstance(known, dict) or any(not isinstance(known.get(key), kinds) for key, kinds in KINDS.items()):
        return False
    numbers = [known[key] for key in ("tokens", "nbytes", "created", "used", "ttl")]
    texts = [known[key] for key in ("parent", "model", "identity") if known[key] is not None]
    return bool(
        ID.fullmatch(known["id"])
        and (known["name"] is None or NAME.fullmatch(known["name"]))
        and all(0 <= number < LARGEST for number in numbers)
        and all(map(is_text, texts))
        and isinstance(known.get("version", ""), str)
    )


def tail_of(path: Path) -> str:
    """The end of what was read, as a file says; empty where it does not. Raises `UserError` if it cannot be sent."""
    known = known_of(path)
    if known is None:
        return ""
    if not is_text(known["tail"]):
        raise UserError(f"{path} holds text that is not Unicode; use a file that a server wrote.")
    return str(known["tail"][-TAIL:])


def is_text(text: str) -> bool:
    """Whether it can be sent: JSON can spell one half of a pair of surrogates, which is no character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
