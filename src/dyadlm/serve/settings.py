"""The bounds of a server. Everything that a client can make grow has one."""

from dataclasses import dataclass

MEBI, GIBI, DAY = 2**20, 2**30, 86_400.0


@dataclass(frozen=True)
class Limits:
    """streams: texts that are written or read at the same time, by each model. queue: requests that wait beyond them.
    body_bytes: of a request. max_tokens: new tokens of an answer. choices: answers to one request. deadline: seconds of
    a request. grace: seconds that running requests have when the server is stopped. sessions: how many are kept.
    session_memory, session_disk: bytes of all states. ttl: seconds for which a session is kept unused. autosave:
    seconds after which a changed session is written; 0: only where it is asked for, and when the server ends.
    """

    streams: int = 256
    queue: int = 512
    body_bytes: int = 8 * MEBI
    max_tokens: int = 65_536
    choices: int = 128
    deadline: float = 600.0
    grace: float = 10.0
    sessions: int = 10_000
    session_memory: int = GIBI
    session_disk: int = 10 * GIBI
    ttl: float = 30 * DAY
    autosave: float = 10.0
