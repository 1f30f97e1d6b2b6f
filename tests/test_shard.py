"""The text of `benchmarks/shard.py` is prose: without markup, tables, code, repetitions and held-out text."""

import gzip
import importlib
import io
import json
import struct
import sys
import tarfile
import zlib
from functools import partial
from pathlib import Path

import pytest

from dyadlm.data.formats import Passage
from dyadlm.data.sources import Source

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def shard(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield importlib.import_module("shard")
    del sys.modules["shard"]


def test_clean_text_has_newlines_and_no_control_characters(shard):
    assert shard.clean("\ufeffone\r\ntwo\t \rthree\0\n\n\n\n\n\nfour\u00a0five \n") == "one\ntwo\nthree\n\n\nfour five"


def test_a_word_divided_at_its_hyphen_is_joined(shard):
    assert shard.unwrap(["a well-", "   known line --", "  indented"]) == "a well-known line -- indented"


def test_long_paragraphs_are_kept_once_and_quotations_not_at_all(shard):
    held_out = shard.runs("Absent thee from felicity awhile, and in this harsh world draw thy breath in pain")
    long, other = "One of many. " * 8, "short"
    quotation = 'He said: "absent thee from felicity a while -- and in this harsh world draw thy breath"'
    shorter = "in this harsh world draw thy breath"
    quoting = quotation.replace("a while", "awhile")
    seen: set[bytes] = set()
    kept = list(shard.new_paragraphs([long, other, quoting, shorter, quotation, other], seen, held_out))
    assert kept == [long.strip(), other, shorter, quotation, other]
    assert list(shard.new_paragraphs([long, other], seen, held_out)) == [other]


def test_the_last_hundredth_is_for_validation(shard):
    paragraphs = [f"paragraph {number:03}" for number in range(200)]
    parts = shard.divide(paragraphs)
    assert parts["validation"] == "paragraph 198\n\nparagraph 199\n"
    assert parts["train"].rstrip("\n").split("\n\n") == paragraphs[:198]
    large = shard.divide(["x" * 1000] * 100_000)
    assert 199_000 < len(large["validation"]) <= shard.MOST_VALIDATION_BYTES


def test_a_split_of_a_corpus_is_its_documents_with_a_line_between(shard, monkeypatch):
    passages = {
        "train": [
            Passage("one", b"a\n", starts=True),
            Passage("one", b"\nb\n", offset=2, starts=False),
            Passage("two", b"c", starts=True),
        ],
        "test": [Passage("three", b"d\n", starts=True)],
    }
    source = Source("name", "public domain", "key", {name: partial(iter, part) for name, part in passages.items()})
    monkeypatch.setattr(shard, "open_corpus", lambda name: source)
    assert shard.corpus_text("name", "train") == "a\n\nb\n\nc\n"
    assert shard.corpus_text("name", "test") == "d\n"


def sword(shard, osis: str, kind: str = "texts/ztext") -> list[str]:
    """What is read of a module with this content, in two blocks that divide a letter."""
    content = osis.encode()
    blocks = [zlib.compress(content[:333]), b"", zlib.compress(content[333:])]
    starts = [0, len(blocks[0]), len(blocks[0])]
    index = b"".join(struct.pack("<III", at, len(b), 9) for at, b in zip(starts, blocks, strict=True))
    folder = f"./usr/share/sword/modules/{kind}/name/nt"
    return list(shard.read_sword([(f"{folder}.bzs", index), (f"{folder}.bzz", b"".join(blocks)), ("./other", b"")]))


OSIS = (
    '<div canonical="true" osisID="Gen" sID="gen1" type="book"/> <title level="1">The First <hi>Book</hi></title> '
    '<div sID="gen2" type="x-p"/>In the <w lemma="strong:H7225">beginning</w>'
    '<note placement="foot"><reference>1:1 </reference>Or, at first</note>, God &amp; his '
    '<div type="x-milestone" subType="x-preverse" sID="pv1"/>heaven’s light. <div eID="gen2" type="x-p"/>'
    '<lg sID="gen3"/> <l level="1" sID="gen4"/>a line,<l eID="gen4" level="1"/> <l level="2" sID="gen5"/>and a second.'
    '<l eID="gen5" level="2"/> <lg eID="gen3"/>'
    '<div canonical="true" osisID="Ruth" sID="gen6" type="book"/><div sID="gen7" type="x-p"/>Now it happened.'
)


def test_sword_modules_are_read_without_held_out_books(shard):
    genesis = ["The First Book", "In the beginning, God & his heaven’s light.", "a line,\nand a second."]
    assert sword(shard, OSIS) == genesis
    assert sword(shard, OSIS, "comments/zcom") == [*genesis, "Now it happened."]


WORDNET = """\
00-database-info
    n 1: not an entry
jangle
    n 1: a metallic sound; "the jangle of
         coins" [syn: {jingle}, {jangle}]
    v 1: make a sound; "keys were
         jingling" [syn: {jingle}, {jin-
         gle}]
jingle
    n 1: a metallic sound; "the jangle of
         coins" [syn: {jingle}, {jangle}]
    2: a comic verse of {irregular} measure [ant: {poem}]
jink
    n 1: a metallic sound; "the jangle of coins" [syn: {jink}]
"""


def test_a_gloss_is_written_under_the_first_of_its_synonyms(shard):
    assert list(shard.wordnet_paragraphs(WORDNET)) == [
        'jangle (noun): a metallic sound; "the jangle of coins"\njangle (verb): make a sound; "keys were jingling"',
        "jingle (noun): a comic verse of irregular measure",
    ]


GCIDE = """\
00-database-short
   A dictionary [1913 Webster]

Germander \\Ger*man"der\\ (j[~e]r*m[a^]n"d[~e]r), Germandree
\\Ger"man*dree\\, n. [OE. germaunder, F. germandr['e]e. See
   {Humble} and [ae]. ] (Bot.)
   A plant of the genus {Teucrium}; a mint-
   like herb [Obs.] of the r[^o]le. -- Ger*man"drous*ly, adv.
   [1913 Webster]

         Wert thou a leopard, thou wert german
         to the lion.                    --Shak.
   [1913 Webster]

   1. (f[=e]"n[i^]ks) A ph[oe]nix.
      (a) A second herb.
   Note: It is rare.
      [1913 Webster]

   Syn: Herb; plant; mint.
        [1913 Webster]

1st-class \\1st-class\\ n.
   1. a class of mail.
        [WordNet 1.5 +PJC]
"""


def test_definitions_and_quotations_of_1913_are_kept(shard):
    (paragraph,) = shard.gcide_paragraphs(GCIDE)
    assert paragraph.split("\n") == [
        "Germander",
        "A plant of the genus Teucrium; a mint-like herb of the rôle.",
        "Wert thou a leopard, thou wert german to the lion. -- Shak.",
        "A phœnix.",
        "A second herb. Note: It is rare.",
    ]


RST = """\
.. SPDX-License-Identifier: GPL-2.0
.. _tasks:

=====
Tasks
=====

:Author: Somebody <somebody@example.org>
         and others

A :class:`~asyncio.Task` is *never* a ``Future``; see :rfc:`822`,
`the site <https://example.org>`_ and tasks_ of ``__new__`` [1]_.  It runs::

    import asyncio

    asyncio.run(main())
  still indented less than the code

.. note::
   Call :func:`asyncio.run` once:

   * with one task
     alone;
   * or with *two* of them.

.. code-block:: python
   :linenos:

   wait = 1

.. function:: run(main, *, debug=False)

   Run the coroutine.

   .. versionadded:: 3.7

======= =====
Column  Other
======= =====
value   words
======= =====

+------+
| cell |
+------+

name          and its description in a column

>>> run(main)
'result'

int run(struct task *task, int flags) { return 0; }

term
   What it means.

.. [1] A footnote of
   two lines.
"""


def test_prose_of_restructured_text(shard):
    assert list(shard.rst_paragraphs(RST)) == [
        "Tasks",
        "A Task is never a Future; see RFC 822, the site and tasks of __new__. It runs:",
        "still indented less than the code",
        "Call asyncio.run once:",
        "- with one task alone;\n- or with two of them.",
        "Run the coroutine.",
        "term\nWhat it means.",
        "A footnote of two lines.",
    ]


def test_files_of_tables_and_other_languages_are_left_out(shard):
    prose = ("Read this sentence. " * 9 + "\n\n") * 3
    table = "Registers\n\n" + "0x00  0x01  0x02\n" * 50
    folder = "./usr/share/doc/linux-doc/Documentation/"
    files = [
        (f"{folder}b.rst.gz", gzip.compress(prose.encode())),
        (f"{folder}a.txt", b"A first sentence.\n"),
        (f"{folder}c.rst", table.encode()),
        (f"{folder}translations/d.rst", prose.encode()),
        (f"{folder}e.svg", prose.encode()),
    ]
    assert list(shard.read_kernel(files)) == ["A first sentence.", *[("Read this sentence. " * 9).strip()] * 3]


def test_the_file_is_the_same_for_the_same_contents(shard, tmp_path):
    contents = {"b.train.txt": b"text\n" * 1000, "LICENCES.json": json.dumps([]).encode()}
    sizes = [shard.pack(contents, tmp_path / name) for name in ("one", "two")]
    one, two = ((tmp_path / name).read_bytes() for name in ("one", "two"))
    assert one == two
    assert sizes == [len(one)] * 2
    with tarfile.open(fileobj=io.BytesIO(one)) as archive:
        assert archive.getnames() == ["LICENCES.json", "b.train.txt"]
        assert archive.extractfile("b.train.txt").read() == contents["b.train.txt"]


def test_what_is_in_the_cache_is_not_fetched(shard, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    (tmp_path / "dict-wn_1_all.deb").touch()
    assert shard.fetch_package("dict-wn", tmp_path) == tmp_path / "dict-wn_1_all.deb"
