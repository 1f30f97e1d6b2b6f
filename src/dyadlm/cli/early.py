"""What can be refused before a model is loaded or text is read."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from dyadlm.errors import UserError
from dyadlm.values import nearest

SPLITS = ("train", "validation", "test")


def require_split(split: str | None) -> None:
    """Raise `UserError` unless there is a part of data of that name."""
    if split is not None and split not in SPLITS:
        raise UserError(f"There is no split {split!r}{nearest(split, SPLITS)}.")


def require_models(models: Sequence[str]) -> None:
    """Raise `UserError` for the first of several models that cannot be there, before any is loaded."""
    from dyadlm.model.loading import require_found

    for model in models:
        path = Path(model)
        if path.suffix.lower() != ".gguf":
            require_found(model)
        elif not path.is_file():
            raise UserError(f"There is no file {path}; give the path of a GGUF file.")
        elif find_spec("gguf") is None:
            raise UserError(
                f"{path} needs the package gguf, which is not installed; install it with `pip install 'dyadlm[gguf]'`."
            )


def require_sources(sources: Sequence[str], text_field: str = "text") -> None:
    """Raise `UserError` for the first source that is not there or cannot be read. Standard input is not touched, and
    the hub is not asked."""
    from dyadlm.data.corpora import CORPORA
    from dyadlm.data.dataset import open_dataset
    from dyadlm.data.preparation import find_source
    from dyadlm.data.resolve import parse_weight
    from dyadlm.data.sources import MANIFEST_NAME

    for source in sources:
        name, _ = parse_weight(source)
        path = Path(name)
        if (path / MANIFEST_NAME).exists():
            open_dataset(path)
        elif name != "-" and name not in CORPORA and (path.exists() or path.parent.exists()):
            find_source(name, text_field)


def require_report_folder(folder: Path, own: set[str]) -> None:
    """Raise `UserError` unless a page can be written there: a new folder, or one that holds an older page alone."""
    from dyadlm.files import require_new, require_writable

    if folder.parent.exists() and not folder.parent.is_dir():
        raise UserError(f"{folder.parent} is a file; choose a folder for --output.")
    require_writable(folder.parent / "page", "the report")
    if not (folder.is_dir() and {file.name for file in folder.iterdir()} == own):
        require_new(folder, "the report")
