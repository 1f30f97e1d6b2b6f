"""The examples of docs/serve.md and docs/watch.md run as they stand, against a real server."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")
pytest.importorskip("openai")

DOCS = Path(__file__).parents[2] / "docs"
ADDRESS = "http://127.0.0.1:8000"


@pytest.mark.parametrize(("page", "count"), [("serve.md", 6), ("watch.md", 1)])
def test_all_examples_run(page, count, serve, weights, tmp_path, capsys):
    if shutil.which("curl") is None:
        pytest.skip("there is no curl here")
    weights["first"] = weights["small"]
    live = serve(("first",))
    del weights["first"]
    blocks = re.findall(r"```(sh|python)\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)
    assert len(blocks) == count
    names: dict = {}
    for language, code in blocks:
        code = code.replace(ADDRESS, live.url)
        if language == "python":
            exec(compile(code, page, "exec"), names)
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
    if page == "watch.md":
        return
    assert live.http.get("/v1/sessions/again").json()["tail"] == live.http.get("/v1/sessions/hamlet").json()["tail"]
    names["client"].close()
