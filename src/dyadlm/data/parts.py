"""Tokenised text between the workers that made it and the folder that it becomes, in files that outlast both.

OUTPUT.parts/AB/ABCD….safetensors   the tokens of about a megabyte of text, named by a digest of the tokenizer and the
text. A preparation that was stopped finds them again; one that comes to its end removes them.
"""

import hashlib
import json
import re
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from dyadlm.cluster import RETRIES, result_of
from dyadlm.data.formats import Passage
from dyadlm.errors import UserError
from dyadlm.files import OWN_PREFIX, locked, make_folder, write_atomically


@dataclass(frozen=True)
class Piece:
    """Tokens of a document; passages: where in them each passage begins, and the passage."""

    ids: np.ndarray
    byte_lengths: np.ndarray
    passages: list[tuple[int, Passage]]


_OWN = re.compile(r"[0-9a-f]{2}(/[0-9a-f]{64}\.safetensors)?")
Tokenise: TypeAlias = Callable[[Iterable[list[Passage]]], Iterator[list[Piece]]]


@contextmanager
def kept_parts(output: Path) -> Iterator[Path]:
    """The folder of the parts of `output`, removed where the block ends well.

    Raises `UserError` if it is in use, or holds anything else than parts.
    """
    folder = output.absolute().with_name(f"{output.name}.parts")  # workers stand in folders of their own
    make_folder(folder)
    with locked(folder):
        if any(not _is_own(path.relative_to(folder)) for path in folder.rglob("*")):
            raise UserError(f"{folder} holds other files, and would be removed at the end; choose another --output.")
        yield folder
        shutil.rmtree(folder.resolve())
        if folder.is_symlink():
            folder.unlink()


def tokenise_on_ray(
    ray: Any,
    encoder: Any,
    encode: Callable[[Any, list[Passage]], list[Piece]],
    folder: Path,
    work: Iterable[list[Passage]],
) -> Iterator[list[Piece]]:
    """Lists of passages as tasks of Ray, twice as many at once as it has CPUs, and their tokens in order.

    encoder: what `encode` takes; its `parts_identity` changes with what it makes of a text. folder: of the parts, where
    the workers and this process see the same files.
    """
    task = ray.remote(num_cpus=1, max_retries=RETRIES)(_make_part)
    shared, most = ray.put(encoder), 2 * int(ray.cluster_resources().get("CPU", 1))
    waiting: deque[tuple[Path, Any]] = deque()

    def first() -> list[Piece]:
        path, running = waiting.popleft()
        if running is not None:
            result_of(ray, running, "A part of the text")
        try:
            return read_part(path)
        except FileNotFoundError as error:
            raise UserError(
                f"A worker wrote {path}, which is not seen here; choose an --output on storage that all machines share."
            ) from error

    identity = encoder.parts_identity
    for passages in work:
        path = _path(folder, identity, passages)
        waiting.append((path, None if _is_whole(path) else task.remote([shared], identity, encode, passages, path)))
        if len(waiting) > most:
            yield first()
    while waiting:
        yield first()


def _is_own(path: Path) -> bool:
    """Whether a path within the folder is of parts, or of one that is being written."""
    return bool(_OWN.fullmatch(path.as_posix())) or path.name.startswith(OWN_PREFIX)


# Of this worker, by identity: one that is unpacked for each task would begin with an empty cache of words each time.
_encoders: dict[str, Any] = {}


def _make_part(
    shared: Sequence[Any],
    identity: str,
    encode: Callable[[Any, list[Passage]], list[Piece]],
    passages: list[Passage],
    path: Path,
) -> None:
    """shared: the reference to the encoder, in a list, so that Ray does not unpack it by itself."""
    if identity not in _encoders:
        import ray

        _encoders.clear()
        _encoders[identity] = ray.get(shared[0])
    write_part(path, encode(_encoders[identity], passages))


def _path(folder: Path, identity: str, passages: Sequence[Passage]) -> Path:
    digest = hashlib.sha256(identity.encode())
    for passage in passages:
        tags = asdict(replace(passage, content=b"")) | {"content": len(passage.content)}
        digest.update(json.dumps(tags, sort_keys=True).encode() + passage.content)
    name = digest.hexdigest()
    return folder / name[:2] / f"{name}.safetensors"


def write_part(path: Path, pieces: Sequence[Piece]) -> None:
    """Atomically. What the passages contain is left out: their tokens stand for it."""
    told = [
        {"tokens": len(piece.ids), "passages": [(place, _tags(passage)) for place, passage in piece.passages]}
        for piece in pieces
    ]
    tensors = {
        "ids": _small([piece.ids for piece in pieces]),
        "byte_lengths": _small([piece.byte_lengths for piece in pieces]),
    }
    pieces_json = json.dumps(told)
    write_atomically(path, save(tensors, {"pieces": pieces_json, "sha256": _checksum(tensors, pieces_json)}))


def read_part(path: Path) -> list[Piece]:
    """What `write_part` wrote, without the content of the passages."""
    with safe_open(str(path), framework="np") as file:
        told = json.loads(file.metadata()["pieces"])
        ids, byte_lengths = (file.get_tensor(name).astype(np.int32) for name in ("ids", "byte_lengths"))
    edges = np.cumsum([piece["tokens"] for piece in told])[:-1]
    parts = zip(np.split(ids, edges), np.split(byte_lengths, edges), told, strict=True)
    return [
        Piece(tokens, lengths, [(place, Passage(**tags, content=b"")) for place, tags in piece["passages"]])
        for tokens, lengths, piece in parts
    ]


def _is_whole(path: Path) -> bool:
    """Whether there is a part, as it was written."""
    try:
        with safe_open(str(path), framework="np") as file:
            tensors = {name: file.get_tensor(name) for name in ("ids", "byte_lengths")}
            told = file.metadata()
            return bool(told["sha256"] == _checksum(tensors, told["pieces"]))
    except (OSError, SafetensorError, KeyError, TypeError):
        return False


def _tags(passage: Passage) -> dict[str, Any]:
    return {name: value for name, value in asdict(passage).items() if name != "content"}


def _small(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """In the smallest type that holds them."""
    values = np.concatenate(arrays)
    return values.astype(np.min_scalar_type(int(values.max(initial=0))))


def _checksum(tensors: dict[str, np.ndarray], pieces: str) -> str:
    digest = hashlib.sha256(pieces.encode())
    for name in sorted(tensors):
        digest.update(np.ascontiguousarray(tensors[name]).data)
    return digest.hexdigest()
