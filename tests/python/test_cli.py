"""The command line and the drawings."""

from __future__ import annotations

import os
import subprocess
import sys

import anymask as am
import numpy as np
import pytest
from anymask import cli, drawing


def test_show_in_the_terminal(capsys):
    assert cli.main(["show", "causal", "--length", "64", "--tile", "16"]) == 0
    text = capsys.readouterr().out
    assert "causal, 64 tokens" in text and "6 all, 4 some, 6 skipped" in text.replace("\n", " ")


def test_show_a_file(tmp_path, capsys):
    path = tmp_path / "mask.npy"
    np.save(path, np.tril(np.ones((2, 1, 40, 40), bool)))
    assert cli.main(["show", str(path), "--tile", "16", "--batch", "1"]) == 0
    assert "mask.npy [2, 1, 40, 40]" in capsys.readouterr().out
    assert cli.main(["show", str(path), "--batch", "2"]) == 1
    assert "place: got (2, 0)" in capsys.readouterr().err


def test_show_as_pictures(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "one.png"
    assert cli.main(["show", "share_question", "--length", "300", "-o", str(path)]) == 0
    assert path.read_bytes()[:4] == b"\x89PNG"
    assert cli.main(["show", "all", "--length", "64", "-o", str(tmp_path / "all")]) == 0
    assert len(list((tmp_path / "all").glob("*.png"))) == 12
    drawing.draw(am.causal(), tmp_path / "long.svg", 9000, tile=512)


@pytest.mark.parametrize("colour", [True, False])
def test_render_fits_its_width(colour):
    from rich.console import Console

    console = Console(width=80, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(drawing.render(am.causal(), 1000, tile=16, width=20, colour=colour))
    lines = console.export_text().splitlines()
    assert max(map(len, lines[:-1])) <= 20
    if not colour:
        assert lines[0] == "▒▒" + "·" * 14


def test_show_refuses_what_it_does_not_know(capsys):
    assert cli.main(["show", "nonsense"]) == 1
    assert "neither a .npy file nor one of full, causal" in capsys.readouterr().err


def test_doctor(capsys):
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    words = ("library", "CPU", "instruction sets", "threads", "torch", "GPU driver", "agrees")
    for word in words:
        assert word in text


def test_doctor_without_a_library(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    environment["ANYMASK_LIBRARY"] = str(tmp_path / "nothing.so")
    command = [sys.executable, "-m", "anymask", "doctor"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "was not found" in done.stdout


def test_version_and_help(capsys):
    for argument in ("--version", "--help"):
        with pytest.raises(SystemExit) as stopped:
            cli.main([argument])
        assert stopped.value.code == 0
    assert "anymask 0." in capsys.readouterr().out
