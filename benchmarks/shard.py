"""Free English text in one compressed file, for training on a machine without a network.

    python benchmarks/shard.py --output shard.tar.xz [--cache FOLDER]

The file holds, for each text, NAME.train.txt and NAME.validation.txt, LICENCES.json (package, version, licence, bytes
and sha256 of each part) and the copyright file of each Debian package. Test splits are left out.

    the corpora    Shakespeare, King James Bible, State of the Union: the splits of `dyadlm.data`, document for
                   document, with an empty line between two.
    the others     Debian packages, fetched by `apt-get download` and kept in the cache. Markup, tables and code are
                   taken out; a paragraph is one line, except verse and lists. The last hundredth of each is for
                   validation, at most 200 kB.

Paragraphs of more than 80 bytes are written once. What quotes ten words or more of the held-out text of a corpus
(books of the Bible in another translation, too) is left out, so that figures on it stay honest.
"""

import argparse
import gzip
import hashlib
import html
import io
import json
import lzma
import re
import struct
import subprocess
import tarfile
import tempfile
import unicodedata
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from dyadlm.data.corpora import cache_folder, find_corpus, open_corpus
from dyadlm.data.sources import TEST, TRAIN, VALIDATION
from dyadlm.files import OWN_PREFIX, require_new, require_writable, write_atomically

CORPORA = ("shakespeare", "kjv", "sotu")
MOST_MEGABYTES = 30
LEAST_DUPLICATE_BYTES = 80
QUOTATION_WORDS = 10
VALIDATION_SHARE, MOST_VALIDATION_BYTES = 0.01, 200_000
LEAST_PROSE = 0.4  # of a file of documentation; with less it is tables or code
Files = Iterable[tuple[str, bytes]]


@dataclass(frozen=True)
class Text:
    """A text inside a Debian package. read: its paragraphs, given the files of the package by path."""

    name: str
    package: str
    licence: str
    read: Callable[[Files], Iterator[str]]


# ---- any text


# Control and format characters (soft hyphens, marks of direction and of byte order) but the newline.
_CONTROL = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\xad\u200b-\u200f\u202a-\u202e\u2060-\u206f\ue000-\uf8ff\ufeff]")


def clean(text: str) -> str:
    """Lines that end in a newline alone, without control characters and spaces at their ends; at most two empty."""
    text = unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n"))
    text = _CONTROL.sub("", re.sub(r"[^\S\n]", " ", text))
    return re.sub(r"\n{4,}", "\n\n\n", re.sub(r" +\n", "\n", text)).strip()


def unwrap(lines: Iterable[str]) -> str:
    """Wrapped lines as one; a word divided at a hyphen keeps it."""
    return re.sub(r"(?<=\w-)\n(?=\w)", "", "\n".join(line.strip() for line in lines)).replace("\n", " ")


def words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def runs(text: str) -> set[int]:
    """A number for each run of QUOTATION_WORDS words."""
    found = words(text)
    return {hash(tuple(found[at : at + QUOTATION_WORDS])) for at in range(len(found) - QUOTATION_WORDS + 1)}


def new_paragraphs(paragraphs: Iterable[str], seen: set[bytes], held_out: set[int]) -> Iterator[str]:
    """The paragraphs that neither were there before nor quote held-out text. `seen` grows."""
    for paragraph in map(clean, paragraphs):
        if not paragraph or not held_out.isdisjoint(runs(paragraph)):
            continue
        content = paragraph.encode()
        if len(content) > LEAST_DUPLICATE_BYTES:
            digest = hashlib.blake2b(content, digest_size=16).digest()
            if digest in seen:
                continue
            seen.add(digest)
        yield paragraph


def divide(paragraphs: list[str]) -> dict[str, str]:
    """Training and validation text, cut between two paragraphs."""
    sizes = [len(paragraph.encode()) + 2 for paragraph in paragraphs]
    rest = min(VALIDATION_SHARE * sum(sizes), MOST_VALIDATION_BYTES)
    cut = len(paragraphs)
    while cut > 0 and rest >= sizes[cut - 1]:
        cut -= 1
        rest -= sizes[cut]
    parts = {TRAIN: paragraphs[:cut], VALIDATION: paragraphs[cut:]}
    return {split: "\n\n".join(part) + "\n" for split, part in parts.items()}


# ---- SWORD modules: an index of zlib blocks (offset, size, size of the content), OSIS XML in them

_BOOK = re.compile(r'<div [^>]*osisID="(\w+)"[^>]*type="book"/>')
_PARAGRAPH_EDGE = re.compile(r"<(?:div|lg|chapter|title|/title|table|/table|list|/list)\b(?![^>]*x-preverse)[^>]*>")
_LINE_EDGE = re.compile(r"<(?:l\b[^>]*sID=|lb\b|row\b|item\b)[^>]*>")
# Books of the World English Bible whose text the King James Bible holds out.
_OSIS_NAMES = {
    "Ruth": "Ruth",
    "Prov": "Proverbs",
    "Dan": "Daniel",
    "DanGr": "Daniel",
    "Acts": "Acts",
    "Esth": "Esther",
    "EsthGr": "Esther",
    "Eccl": "Ecclesiastes",
    "Amos": "Amos",
    "Rom": "Romans",
    "Rev": "Revelation",
}


def sword_blocks(index: bytes, content: bytes) -> Iterator[bytes]:
    for offset, size, _ in struct.iter_unpack("<III", index):
        if size:
            yield zlib.decompress(content[offset : offset + size])


def read_osis(source: str) -> Iterator[str]:
    """The paragraphs of OSIS XML, verse with a line for each `l`; footnotes are left out."""
    text = " ".join(re.sub(r"<note\b.*?</note>", " ", source, flags=re.DOTALL).split())
    text = _LINE_EDGE.sub("\n", _PARAGRAPH_EDGE.sub("\n\n", text))
    text = html.unescape(re.sub(r"<[^>]*>", "", text.replace("</cell>", " ")))
    text = re.sub(r" +(?=[,.;:?!’”)])", "", re.sub(r" {2,}", " ", text))
    for paragraph in re.split(r"\n(?: *\n)+", re.sub(r"\n +", "\n", text)):
        if paragraph.strip():
            yield re.sub(r" *\n+", "\n", paragraph.strip())


def read_sword(files: Files) -> Iterator[str]:
    """A module's paragraphs, Old Testament first, without the books that the King James Bible holds out."""
    by_path = {path: content for path, content in files if "/modules/" in path}
    indices = [path for path in by_path if path.endswith((".bzs", ".czs"))]
    for index in sorted(indices, reverse=True):
        blocks = sword_blocks(by_path[index], by_path[f"{index[:-1]}z"])
        source = b"".join(blocks).decode(errors="ignore")
        parts = _BOOK.split(source)
        for book, part in zip(["", *parts[1::2]], parts[::2], strict=True):
            is_scripture = "/texts/" in index
            if not (is_scripture and find_corpus("kjv").held_out(_OSIS_NAMES.get(book, book))):
                yield from read_osis(part)


# ---- dictionaries: an entry begins at the left edge, its senses are indented

_SENSE = re.compile(r" +(?:(n|v|adj|adv) )?\d+: (.*)")
_PARTS_OF_SPEECH = {"n": "noun", "v": "verb", "adj": "adjective", "adv": "adverb"}
_LETTERS = {"ae": "æ", "AE": "Æ", "oe": "œ", "OE": "Œ", "eth": "ð", "thorn": "þ", "deg": "°", "root": "", "pounds": "£"}
_HEAD_GOES_ON = re.compile(r" *(?:\\|\[|\(\S*[\[\"*`]|(?:a|n|v|t|i|adv|p|pl|prep|pron|conj|interj)\.)")
_PRONUNCIATION = re.compile(r"\w[*`]\w|\w\"\*|[\[\]\\]")  # or what is left of an etymology
# A mark before or after a letter, as in ['e] and [a^], and the combining character for it.
_MARKS = {"'": "\u0301", "`": "\u0300", "^": "\u0302", '"': "\u0308", "~": "\u0303", "=": "\u0304", ",": "\u0327"}


def entries(content: str) -> Iterator[tuple[str, list[str]]]:
    """Headline and indented lines of each entry; the notes on the database are none."""
    headline, body = "", []
    for line in content.split("\n"):
        if line.startswith(" ") or not line:
            body.append(line)
        else:
            if body and not headline.startswith("00-"):
                yield headline, body
            headline, body = line, []
    if body and not headline.startswith("00-"):
        yield headline, body


def dictionary_of(files: Files) -> str:
    content = next(content for path, content in files if path.endswith(".dict.dz"))
    return gzip.decompress(content).decode(errors="ignore")


def read_wordnet(files: Files) -> Iterator[str]:
    return wordnet_paragraphs(dictionary_of(files))


def wordnet_paragraphs(content: str) -> Iterator[str]:
    """`word (noun): gloss; "example"`, a line for each sense. What synonyms share is written under the first."""
    written: set[str] = set()
    for headline, body in entries(content):
        senses: list[list[str]] = []
        kinds: list[str] = []
        for line in body:
            if sense := _SENSE.fullmatch(line):
                kinds.append(sense[1] or (kinds[-1] if kinds else ""))
                senses.append([sense[2]])
            elif senses:
                senses[-1].append(line)
        lines = []
        for kind, wrapped in zip(kinds, senses, strict=True):
            gloss = re.sub(r"\s*\[(?:syn|ant|also): .*?\]", "", unwrap(wrapped)).translate(_NO_BRACES).strip()
            if gloss and gloss not in written:
                written.add(gloss)
                lines.append(f"{headline.strip()} ({_PARTS_OF_SPEECH[kind]}): {gloss}" if kind else gloss)
        if lines:
            yield "\n".join(lines)


_NO_BRACES = str.maketrans("", "", "{}")


def read_gcide(files: Files) -> Iterator[str]:
    return gcide_paragraphs(dictionary_of(files))


def gcide_paragraphs(content: str) -> Iterator[str]:
    """Definitions and quotations of Webster's dictionary of 1913; entries from WordNet are in WordNet.

    A paragraph is an entry: the word, then a line for each definition or quotation.
    """
    for headline, body in entries(re.sub(r"\n(?=\\)", " ", content)):  # a headline of several words goes on there
        if not any("Webster" in line and "1913" in line for line in body):
            continue
        lines = []
        for number, block in enumerate(blocks_of([headline, *body])):
            kept = after_headword(block) if number == 0 else block
            text = plain_gcide(unwrap(kept))
            if not text.startswith("Syn:") and not _PRONUNCIATION.search(text) and len(words(text)) >= 2:
                lines.append(text)
        word = plain_gcide(headline.split("\\")[0])
        if lines and word:
            yield "\n".join([word, *lines])


def blocks_of(lines: Iterable[str]) -> Iterator[list[str]]:
    """Runs of lines that are not empty; a numbered definition begins a new one."""
    block: list[str] = []
    for line in lines:
        if block and (not line.strip() or re.match(r" +(?:\d+\.|\([a-z]\)) ", line)):
            yield block
            block = []
        if line.strip():
            block.append(line)
    if block:
        yield block


def after_headword(block: list[str]) -> list[str]:
    """The lines of an entry's first block after pronunciation, part of speech and etymology."""
    head = ""
    for number, line in enumerate(block):
        closed = head.count("\\") % 2 == 0 and all(head.count(a) <= head.count(b) for a, b in ("[]", "()"))
        if number and closed and not _HEAD_GOES_ON.match(line):
            return block[number:]
        head += line
    return []


def plain_gcide(text: str) -> str:
    """Letters for their codes; sources, labels, cross-references to senses and braces taken out."""

    def letter(code: re.Match[str]) -> str:
        name = code[1]
        if name in _LETTERS:
            return _LETTERS[name]
        for mark, base in ((name[0], name[1:]), (name[-1], name[:-1])):
            if mark in _MARKS and (base in ("ae", "oe") or (len(base) == 1 and base.isalpha())):
                return unicodedata.normalize("NFC", _LETTERS.get(base, base) + _MARKS[mark])
        return ""

    for _ in range(2):  # a label or an etymology may hold codes of letters
        text = re.sub(r"\[([^\[\]]+)\]", letter, text)
    text = re.sub(r"\s*--\s?[A-Z]\w*[\"`*]\w[^.]*(?:\.|$)", "", text.translate(_NO_BRACES))  # derived words
    number, pronunciation = r"(?:\d+\. |\([a-z]\) )?", r"(?:\([^()]*\"[^()]*\)[,.]? )?"
    text = re.sub(f"^{number}{pronunciation}", "", text.strip())
    text = re.sub(r"--(?=[A-Z])", "-- ", text)
    return re.sub(r" +(?=[,.;:])", "", re.sub(r" {2,}", " ", text)).strip()


# ---- documentation in reStructuredText

_DIRECTIVE = re.compile(r"\.\. ([\w:+-]+)::(?: +(.*))?")
_FIELD = re.compile(r":[^:`]+:(?: .*)?")
_BULLET = re.compile(r"(?:[*+•-]|\d+[.)]|#\.|\(\w\)|[a-z]\)) +")
_TABLE = re.compile(r"[+|].*|=+( +=+)+|.*\S {3,}\S.*")
_WITH_TITLE = {  # directives whose argument is prose, too
    *("note", "warning", "seealso", "important", "tip", "hint", "caution", "attention", "danger", "admonition"),
    *("topic", "sidebar", "rubric"),
}
_WITH_TEXT = _WITH_TITLE | {  # directives whose indented lines are prose
    *("versionadded", "versionchanged", "deprecated", "impl-detail", "glossary", "module", "opcode", "pdbcommand"),
    *("function", "class", "method", "attribute", "data", "exception", "decorator", "staticmethod", "classmethod"),
    *("c:function", "c:type", "c:macro", "c:member", "c:var", "c:struct", "option", "cmdoption", "envvar", "describe"),
    *("abstractmethod", "decoratormethod", "coroutinefunction", "2to3fixer"),
}


def rst_paragraphs(source: str) -> Iterator[str]:
    """The prose of reStructuredText: no tables, no code, no comments, no markup; headings are paragraphs."""
    current: list[tuple[int, str]] = []  # indentation and text of the lines of a paragraph
    inside = False  # lines further to the right than `left` belong to what is left out
    left, edge = 0, None  # edge: the indentation of its first line

    for line in [*source.expandtabs(8).split("\n"), ""]:
        text, depth = line.strip(), len(line) - len(line.lstrip())
        if inside and text:
            edge = depth if edge is None else edge
            if depth > left and depth >= edge:
                continue
            inside = False
        rule = len(text) > 2 and len(set(text)) == 1 and not text[0].isalnum()
        explicit = text == ".." or text.startswith(".. ")
        field = bool(_FIELD.fullmatch(text))
        if text and not (rule or explicit or field):
            current.append((depth, text))
            continue
        if current:
            yield from prose_of(current)
            if current[-1][1].endswith("::"):
                inside, left, edge = not (rule or explicit), current[0][0], None
            current = []
        if explicit:
            directive = _DIRECTIVE.fullmatch(text)
            if directive and directive[1] in _WITH_TEXT:
                if directive[2] and directive[1] in _WITH_TITLE:
                    yield from prose_of([(depth, directive[2])])
            elif re.match(r"\.\. \[[\w#]+\] ", text):
                current = [(depth + len(".. [1] "), text.split("] ", 1)[1])]
            else:
                inside, left, edge = True, depth, None
        elif field:
            inside, left, edge = True, depth, None


def prose_of(lines: list[tuple[int, str]]) -> Iterator[str]:
    """The paragraph of these lines without markup, unless it is a table, code or figures."""
    if any(_TABLE.fullmatch(text) for _, text in lines) or lines[0][1].startswith((">>>", "$ ", "# ", "#include")):
        return
    items: list[list[str]] = []
    for number, (depth, text) in enumerate(lines):
        first = lines[0][1]
        term = number == 1 and depth > lines[0][0] and not _BULLET.match(first) and first.count("`") % 2 == 0
        if not items or term or _BULLET.match(text):
            items.append([])
        items[-1].append(text)
    paragraph = "\n".join(without_markup(unwrap(item)) for item in items)
    if is_prose(paragraph):
        yield paragraph


def without_markup(text: str) -> str:
    """Inline markup of reStructuredText as plain text."""

    def role(found: re.Match[str]) -> str:
        content = re.sub(r"\s*<[^<>]*>$", "", found[2])
        series = f"{found[1].upper()} " if found[1] in ("pep", "rfc") else ""
        return series + (content[1:].rpartition(".")[2] if content.startswith("~") else content.lstrip("!"))

    text = re.sub(r":([\w:+-]+):`([^`]*)`", role, text)
    text = re.sub(r"``(.+?)``", r"\1", text)
    text = re.sub(r"`([^`<]+?)\s*(?:<[^>]*>)?`_{0,2}", r"\1", text)
    text = re.sub(r"(?<!\w)(\*\*?)(?=\S)([^*]+)(?<=\S)\1(?!\w)", r"\2", text)
    text = re.sub(r"\|(\w+)\|", r"\1", text)
    text = re.sub(r"\b([A-Za-z]\w*?)(?<!_)__?(?!\w)", r"\1", re.sub(r" ?\[[\w#]+\]_", "", text))
    text = re.sub(r" *<?\S+@\S+\.\w+>?", "", text)  # addresses of people
    text = re.sub(r"^[*+•] +", "- ", re.sub(r"\\(.)", r"\1", text))
    return re.sub(r" {2,}", " ", re.sub(r"(\s*)::$", lambda end: "" if end[1] else ":", text)).strip()


def is_prose(paragraph: str) -> bool:
    """Whether it is made of letters, for the most part, with a word of two small letters among them, and no code."""
    letters = sum(letter.isalpha() or letter in " ,.'\"-\n" for letter in paragraph)
    code = re.search(r"[{}\\]|;$|\*\w+[,)]", paragraph)
    return letters >= 0.88 * len(paragraph) and not code and re.search(r"[a-z]{2}", paragraph) is not None


def read_documents(files: Files, below: str, without: str) -> Iterator[str]:
    """The prose of the files whose path holds `below` and does not match `without`, in order of their paths."""
    by_path = {
        path: gzip.decompress(content) if path.endswith(".gz") else content
        for path, content in files
        if below in path and re.search(r"\.(rst|txt)(\.gz)?$", path) and not re.search(without, path)
    }
    for _, content in sorted(by_path.items()):
        paragraphs = list(rst_paragraphs(content.decode(errors="ignore")))
        if sum(len(paragraph) for paragraph in paragraphs) >= LEAST_PROSE * len(content):
            yield from paragraphs


def read_kernel(files: Files) -> Iterator[str]:
    return read_documents(files, "/Documentation/", "/translations/|/devicetree/bindings/|/features/|/html/")


def read_python(files: Files) -> Iterator[str]:
    return read_documents(files, "/_sources/", r"/changelog\.|/license\.|/contents\.")


TEXTS = (
    Text("web", "sword-text-web", "public domain", read_sword),
    Text("tdavid", "sword-comm-tdavid", "public domain", read_sword),
    Text("mhcc", "sword-comm-mhcc", "public domain", read_sword),
    Text("wordnet", "dict-wn", "WordNet 3.0", read_wordnet),
    Text("python", "python3.11-doc", "PSF-2.0", read_python),
    Text("gcide", "dict-gcide", "GPL-2.0-or-later", read_gcide),
    Text("kernel", "linux-doc-6.1", "GPL-2.0-only", read_kernel),
)


# ---- packages and the file


def fetch_package(name: str, folder: Path) -> Path:
    """The Debian package in the folder, downloaded if no version of it is there."""
    if kept := sorted(folder.glob(f"{name}_*.deb")):
        return kept[-1]
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=OWN_PREFIX, dir=folder) as staging:
        done = subprocess.run(["apt-get", "download", name], cwd=staging, capture_output=True, text=True, check=False)
        fetched = list(Path(staging).glob("*.deb"))
        if done.returncode or not fetched:
            reason = done.stderr.strip().splitlines()[-1:] or ["apt-get said nothing"]
            remedy = f"run `apt-get update`, or put the package into {folder}"
            raise SystemExit(f"{name} could not be fetched ({reason[0]}); {remedy}.")
        return fetched[0].replace(folder / fetched[0].name)


def package_files(package: Path) -> dict[str, bytes]:
    """The content of its regular files by their paths."""
    archive = subprocess.run(["dpkg-deb", "--fsys-tarfile", package], capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as opened:
        return {
            member.name: file.read() for member in opened if member.isfile() and (file := opened.extractfile(member))
        }


def field_of(package: Path, field: str) -> str:
    return subprocess.run(
        ["dpkg-deb", "--field", package, field], capture_output=True, text=True, check=True
    ).stdout.strip()


def corpus_text(name: str, split: str) -> str:
    """A split of a built-in corpus: its documents as they are but for newlines at their ends, an empty line between."""
    documents: list[bytearray] = []
    for passage in open_corpus(name).splits[split]():
        if passage.starts or not documents:
            documents.append(bytearray())
        documents[-1] += passage.content
    return "\n\n".join(document.decode().rstrip("\n") for document in documents) + "\n"


def pack(contents: dict[str, bytes], output: Path) -> int:
    """Write them as a tar file compressed by xz, the same bytes for the same contents; its size."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:xz", preset=9 | lzma.PRESET_EXTREME) as archive:
        for name, content in sorted(contents.items()):
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(content), 0o644
            archive.addfile(member, io.BytesIO(content))
    write_atomically(output, packed.getvalue())
    return len(packed.getvalue())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the file to write, .tar.xz")
    parser.add_argument("--cache", type=Path, default=cache_folder() / "debian", help="where packages are kept")
    names = [text.name for text in TEXTS]
    parser.add_argument("--without", nargs="*", choices=names, default=[], help="texts to leave out")
    options = parser.parse_args()
    require_new(options.output, "the shard")
    require_writable(options.output, "the shard")

    contents: dict[str, bytes] = {}
    licences: list[dict[str, object]] = []
    seen: set[bytes] = set()
    held_out: set[int] = set()

    def add(name: str, parts: dict[str, str], **about: str) -> None:
        described = {}
        for split, part in parts.items():
            content = part.encode()
            contents[f"{name}.{split}.txt"] = content
            described[split] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            print(f"{name}: {len(content):,} bytes of {split}", flush=True)
        licences.append({"name": name, **about, "parts": described})

    for name in CORPORA:
        corpus = find_corpus(name)
        add(
            name,
            {split: corpus_text(name, split) for split in (TRAIN, VALIDATION)},
            package=corpus.package,
            version=corpus.version,
            licence=corpus.licence,
        )
        for split in (VALIDATION, TEST):
            held_out |= runs(corpus_text(name, split))
    for text in TEXTS:
        if text.name in options.without:
            continue
        package = fetch_package(text.package, options.cache)
        files = package_files(package)
        read = list(text.read(files.items()))
        kept = list(new_paragraphs(read, seen, held_out))
        print(f"{text.name}: {len(read):,} paragraphs, {len(kept):,} kept", flush=True)
        add(
            text.name,
            divide(kept),
            package=text.package,
            version=field_of(package, "Version"),
            licence=text.licence,
        )
        contents[f"licences/{text.package}.txt"] = files[f"./usr/share/doc/{text.package}/copyright"]
    contents["LICENCES.json"] = json.dumps(licences, indent=2).encode() + b"\n"
    print("compressing ...", flush=True)
    size = pack(contents, options.output)
    print(f"{options.output}: {size:,} bytes for {sum(map(len, contents.values())):,}")
    if size > MOST_MEGABYTES * 10**6:
        print(f"That is more than {MOST_MEGABYTES} MB; leave out a text, for example --without gcide kernel.")


if __name__ == "__main__":
    main()
