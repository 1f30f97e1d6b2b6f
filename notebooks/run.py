"""Runs notebooks/tour.ipynb from a fresh kernel in an empty folder, and stores the outputs in it: `make notebook`."""

import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).with_name("tour.ipynb")


def main() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    # The command dyadlm of the environment that this runs in.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(notebook, timeout=3600, record_timing=False, resources={"metadata": {"path": folder}}).execute()
    for cell in notebook.cells:
        cell.metadata.clear()
    notebook.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(notebook, NOTEBOOK)


if __name__ == "__main__":
    main()
