"""The site builds without a warning, loads nothing from another host, and has every public name of the package."""

import os
import re
import subprocess
import sys
import zlib
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path

import pytest

pytest.importorskip("mkdocstrings_handlers.python", reason="needs the extra `docs`")
pytest.importorskip("material", reason="needs the extra `docs`")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
# What a browser follows only when someone clicks, or what the address is only the name of.
LINKS = {("a", "href"), ("svg", "xmlns")}


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("site")
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(place)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return place


class Addresses(HTMLParser):
    """(tag, attribute, value) of all that names another host, and the text of styles and scripts in the page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, str, str]] = []
        self.inside = ""

    def handle_starttag(self, tag, attributes):
        self.inside = tag
        for name, value in attributes:
            if (tag, name) not in LINKS and re.match(r"(?:https?:)?//", value or ""):
                self.found.append((tag, name, value))

    def handle_data(self, data):
        if self.inside in ("script", "style") and re.search(r"(?:https?:)?//\w+\.\w+", data):
            self.found.append((self.inside, "", data))


def addresses(text: str) -> list[tuple[str, str, str]]:
    reader = Addresses()
    reader.feed(text)
    return reader.found


def test_no_page_loads_from_another_host(site):
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 25
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert not addresses(text), page
        assert 'class="mermaid"' not in text  # its script would come from elsewhere
    for style in site.rglob("*.css"):
        assert not re.search(r"url\([\"']?(?:https?:)?//|@import", style.read_text(encoding="utf-8")), style


@pytest.mark.parametrize(
    "text",
    [
        '<script src="https://a.org/x.js"></script>',
        '<link rel="stylesheet" href="//a.org/x.css">',
        "<style>@import url(https://a.org/x.css)</style>",
        '<img src="http://a.org/x.png">',
    ],
)
def test_what_would_load_from_another_host_is_found(text):
    assert addresses(text)
    assert not addresses('<a href="https://a.org">a</a> <img src="x.png">')


def test_every_public_name_is_in_the_reference(site):
    content = (site / "objects.inv").read_bytes()
    known = set(re.findall(r"^(\S+) py:", zlib.decompress(content.split(b"\n", 4)[4]).decode(), re.MULTILINE))
    packages = sorted(
        path.stem for path in (ROOT / "docs" / "api").glob("*.md") if path.stem not in ("index", "dyadlm")
    )
    assert {"engine", "data", "train", "generate", "evaluate", "diagnose", "score", "memory", "ops"} <= set(packages)
    public = {
        f"{module}.{name}"
        for module in ("dyadlm", *(f"dyadlm.{package}" for package in packages))
        for name in set(import_module(module).__all__) - {"__version__"}
    }
    assert len(public) > 80
    assert not public - known


def test_the_pictures_and_the_search_are_there(site):
    assert (site / "search" / "search_index.json").stat().st_size > 100_000
    assert (site / "findings" / "decoding.png").is_file()
