"""Pages of one file, without network and scripts, light and dark: what diagnosis and arena share (`page.html`)."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from dyadlm.report.comparison import DARK, LIGHT
from dyadlm.version import __version__

FOLDER = Path(__file__).parent


def render(template: str, **values: Any) -> str:
    """A page. template: a file of this folder that extends `page.html`, which needs `title` and `facts`."""
    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style = Markup((FOLDER / "page.css").read_text(encoding="utf-8"))
    return environment.get_template(template).render(style=style, light=LIGHT, dark=DARK, version=__version__, **values)
