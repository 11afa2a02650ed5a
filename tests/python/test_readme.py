"""What the README and the documents show runs as printed and points at things that exist."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zlib
from pathlib import Path

import anymask as am
import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language: str) -> list[str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("code", blocks("python"), ids=lambda code: f"{len(code)} characters")
def test_python_runs_as_printed(code, capsys):
    if "import torch" in code:
        pytest.importorskip("torch")
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    printed = capsys.readouterr().out.splitlines()
    promised = re.findall(r"^print\(.*#\s*(.+)$", code, re.MULTILINE)
    assert printed == promised


def test_there_are_examples():
    assert len(blocks("python")) >= 3
    assert len(blocks("cpp")) >= 1


@pytest.mark.parametrize("code", blocks("cpp"), ids=lambda code: f"{len(code)} characters")
def test_cpp_is_from_an_example_that_the_tests_build(code):
    programs = [path.read_text(encoding="utf-8") for path in (ROOT / "examples").glob("*.cpp")]
    assert any(code in program for program in programs)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    text = re.sub(r"^```.*?^```$", "", document.read_text(encoding="utf-8"), flags=re.M | re.S)
    links = re.findall(r"\]\(([^)#\s]+)", text) + re.findall(r'<img src="([^"]+)"', text)
    local = [link for link in links if not re.match(r"[a-z]+:", link)]
    missing = [link for link in local if not (document.parent / link).exists()]
    assert not missing


def test_every_mask_kind_is_documented():
    kinds = {name for name in am.masks.__dict__ if callable(getattr(am.masks, name))}
    kinds &= set(am.__all__)
    text = (ROOT / "docs" / "masks.md").read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for kind in kinds - {"Mask"}:
        assert f"`am.{kind}(" in text, f"docs/masks.md does not explain {kind}"
        assert f"`{kind}(" in readme, f"README.md does not list {kind}"


def pixels(path: Path) -> bytes:
    """A picture's size and colour indices: how well they are compressed is zlib's own matter."""
    data = path.read_bytes()
    begin = data.index(b"IDAT")
    length = int.from_bytes(data[begin - 4 : begin], "big")
    return data[:33] + zlib.decompress(data[begin + 4 : begin + 4 + length])


def test_pictures_are_those_that_the_script_draws(tmp_path):
    folder = ROOT / "docs" / "pictures"
    package = Path(am.__file__).parents[1]
    subprocess.run(
        [sys.executable, str(folder / "draw.py"), str(tmp_path)],
        check=True,
        env={**os.environ, "PYTHONPATH": str(package)},
    )
    drawn = {path.name: pixels(path) for path in tmp_path.glob("*.png")}
    assert drawn == {path.name: pixels(path) for path in folder.glob("*.png")}
