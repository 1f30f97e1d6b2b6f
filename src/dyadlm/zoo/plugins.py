"""Families from code of the user's own: a Python file or a module that calls `register_family`."""

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

from dyadlm.errors import UserError, first_line


def load_plugins(names: Iterable[str]) -> str:
    """Run each plugin once in this process, which registers its families.

    names: of Python files (`families.py`) or of modules that can be imported.

    Returns:
        A hexadecimal sha256 of the code of all, empty without any.

    Raises:
        UserError: there is no such file or module, or it fails.
    """
    digest, found = hashlib.sha256(), False
    for name in names:
        found = True
        module = _load(name)
        origin = getattr(module.__spec__, "origin", None)
        digest.update(Path(origin).read_bytes() if origin and Path(origin).is_file() else name.encode())
    return digest.hexdigest() if found else ""


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
    except Exception as error:  # whatever the user's code raises
        sys.modules.pop(known, None)
        raise UserError(
            f"The plugin {name} failed ({type(error).__name__}: {first_line(error)}); mend it, or leave it out."
        ) from error
    return module
