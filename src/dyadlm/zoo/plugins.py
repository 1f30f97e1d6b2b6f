"""Families from code of the user's own: a Python file or a module that calls `register_family`."""

import hashlib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from types import ModuleType

from dyadlm.errors import RunFailed, UserError, first_line, memory_missing
from dyadlm.files import FULL
from dyadlm.zoo.families import BUILT_IN

_CODE: dict[str, list[Path]] = {}  # the files of each plugin that was run


def load_plugins(names: Iterable[str]) -> str:
    """Run each plugin once in this process, which registers its families.

    names: of Python files (`families.py`), or of modules or packages that can be imported.

    Returns:
        A hexadecimal sha256 of the code of all, empty without any.

    Raises:
        UserError: there is no such file or module, or it fails.
    """
    digest, found = hashlib.sha256(), False
    for name in names:
        found = True
        with redirect_stdout(sys.stderr):  # standard output is for what a command says
            _CODE[name] = _files(_load(name))
        for file in _CODE[name]:
            digest.update(file.read_bytes())
        if not _CODE[name]:
            digest.update(name.encode())
    return digest.hexdigest() if found else ""


def _files(module: ModuleType) -> list[Path]:
    """The code of a module; of a package, that of all its modules."""
    folders = [Path(folder) for folder in getattr(module, "__path__", [])]
    origin = getattr(module.__spec__, "origin", None)
    alone = [Path(origin)] if origin and Path(origin).is_file() else []
    return [file for folder in folders for file in sorted(folder.rglob("*.py"))] or alone


@contextmanager
def blaming(family: str) -> Iterator[None]:
    """Turn what the code of a user's own family raises into a `UserError` that names it. Other errors stay, and so do
    those of a full disk and of memory."""
    try:
        yield
    except (UserError, RunFailed):
        raise
    except (Exception, SystemExit) as error:
        full = isinstance(error, OSError) and error.errno in FULL
        if family in BUILT_IN or full or memory_missing(error) is not None:
            raise
        own = {str(file) for files in _CODE.values() for file in files}
        places = [place for place in traceback.extract_tb(error.__traceback__) if place.filename in own]
        where = f", {Path(places[-1].filename).name}, line {places[-1].lineno}" if places else ""
        told = f"{type(error).__name__}: {first_line(error)}{where}"
        raise UserError(f"The family {family} failed ({told}); mend it, or leave it out.") from error


def _load(name: str) -> ModuleType:
    is_file = name.endswith(".py")
    path = Path(name).resolve()
    known = f"dyadlm_plugin_{hashlib.sha256(str(path).encode()).hexdigest()[:16]}" if is_file else name
    if is_file and known in sys.modules:
        return sys.modules[known]
    if is_file and not path.is_file():
        raise UserError(f"There is no file {name}; --plugin takes a Python file or the name of a module.")
    try:
        if not is_file:
            return importlib.import_module(name)
        spec = importlib.util.spec_from_file_location(known, path)
        assert spec is not None, "a file that ends with .py has a loader"
        assert spec.loader is not None
        module = sys.modules[known] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except UserError:
        sys.modules.pop(known, None)
        raise
    except (Exception, SystemExit) as error:  # whatever the user's code raises
        sys.modules.pop(known, None)
        raise UserError(
            f"The plugin {name} failed ({type(error).__name__}: {first_line(error)}); mend it, or leave it out."
        ) from error
    return module
