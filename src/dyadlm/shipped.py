"""Models that come with the package, called by a name."""

from pathlib import Path

FOLDER = Path(__file__).parent / "pretrained"
# tiny-en: English bytes, 2.6M parameters; pretrained/tiny-en/README.md is its card.
SHIPPED = ("tiny-en",)


def place_of_model(path_or_name: str | Path) -> str | Path:
    """The folder of a model that comes with the package; what is no name of one, as it is.

    A file or a folder of that name in the working directory comes first. The hub is never asked for these names.
    """
    if str(path_or_name) not in SHIPPED or Path(path_or_name).exists():
        return path_or_name
    return FOLDER / path_or_name
