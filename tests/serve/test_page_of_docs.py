"""The examples of docs/serve.md run as they stand, against a real server."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")
pytest.importorskip("openai")

PAGE = Path(__file__).parents[2] / "docs" / "serve.md"
ADDRESS = "http://127.0.0.1:8000"


def test_all_examples_run(serve, weights, tmp_path, capsys):
    if shutil.which("curl") is None:
        pytest.skip("there is no curl here")
    weights["first"] = weights["small"]
    live = serve(("first",))
    del weights["first"]
    blocks = re.findall(r"```(sh|python)\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 6
    names: dict = {}
    for language, code in blocks:
        code = code.replace(ADDRESS, live.url)
        if language == "python":
            exec(compile(code, str(PAGE), "exec"), names)
            assert capsys.readouterr().out
            continue
        for line in code.splitlines():
            options = ["--silent", "--show-error", "--fail-with-body"]
            told = subprocess.run(
                ["bash", "-c", line.replace("curl", f"curl {' '.join(options)}", 1)],
                cwd=tmp_path, capture_output=True, text=True, check=False,
            )  # fmt: skip
            assert told.returncode == 0, (line, told.stdout, told.stderr)
            assert told.stdout or "-o " in line
    assert live.http.get("/v1/sessions/again").json()["tail"] == live.http.get("/v1/sessions/hamlet").json()["tail"]
    names["client"].close()
