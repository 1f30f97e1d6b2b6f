"""Runs notebooks/tour.ipynb from a fresh kernel in an empty folder, and stores the outputs in it: `make notebook`."""

import os
import re
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).with_name("tour.ipynb")


def as_shown(text: str) -> str:
    """What a terminal shows after `text`: bars that were drawn over are gone, and so are colours."""
    lines, line, over = [], "", False
    for part in re.findall(r"\x1b\[\??[\d;]*[A-Za-z]|\n|\r|[^\x1b\n\r]+", text):
        if part == "\n":
            lines.append(line)
            line, over = "", False
        elif part == "\r":
            over = True
        elif part == "\x1b[2K":
            line, over = "", False
        elif part == "\x1b[1A":
            line = lines.pop() if lines else ""
        elif not part.startswith("\x1b"):
            line, over = (part if over else line + part), False
    return "\n".join([*lines, line])


def tidy(notebook: nbformat.NotebookNode) -> None:
    """One text for each output stream of a cell, as shown; without what the machine adds."""
    for cell in notebook.cells:
        cell.metadata.clear()
        texts: dict[str, str] = {}
        for output in cell.get("outputs", []):
            if output.output_type == "stream" and "TqdmWarning" not in output.text:  # about widgets of the browser
                texts[output.name] = texts.get(output.name, "") + output.text
        others = [output for output in cell.get("outputs", []) if output.output_type != "stream"]
        if cell.cell_type == "code":
            streams = [
                nbformat.v4.new_output("stream", name=name, text=shown)
                for name, text in texts.items()
                if (shown := as_shown(text)).strip()
            ]
            cell.outputs = streams + others
    notebook.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}


def main() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    # The command dyadlm of the environment that this runs in.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    with tempfile.TemporaryDirectory() as folder:
        resources = {"metadata": {"path": folder}}
        NotebookClient(notebook, timeout=3600, record_timing=False, resources=resources).execute()
    tidy(notebook)
    nbformat.write(notebook, NOTEBOOK)


if __name__ == "__main__":
    main()
