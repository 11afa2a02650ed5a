"""The files of `anymask bench`: written, read again, joined, gone on with."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("torch")

from anymask import bench, cli
from test_bench import a_run


def test_files(tmp_path, capsys):
    about, rows = a_run()
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    bench.write(one, about, rows[:1])
    bench.write(two, about, rows[1:])
    again, both = bench.read(one, two)
    assert both == rows and again.pop("parts") and again == about
    written = json.loads(one.read_text())["rows"][0]
    assert written["tflops"]["anymask"]["forward"] == pytest.approx(512)
    arguments = ["bench", "--from", str(one), str(two)]
    if pytest.importorskip("matplotlib"):
        arguments += ["--plot", str(tmp_path / "bench.png")]
    assert cli.main(arguments) == 0
    assert "NVIDIA H200, driver 1" in capsys.readouterr().out
    assert (tmp_path / "bench.png").read_bytes()[:4] == b"\x89PNG"
    one.write_text('{"rows": [{}]}')
    assert cli.main(["bench", "--from", str(one)]) == 1
    assert "not written by anymask bench" in capsys.readouterr().err


def test_what_several_files_have_of_a_case_is_joined(tmp_path):
    about, rows = a_run()
    row = bench.Row(rows[0].case, rows[0].pairs, wall=2.0)
    row.seconds = {"anymask": {"forward": 3.0}, "sdpa": {"forward": 4.0}}
    rows[0].problems = {"sdpa forward": "no memory", "flex backward": "no way"}
    rows[0].checked, rows[0].wall = False, 1.0
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    bench.write(one, about, rows)
    bench.write(two, {**about, "date": "later"}, [row])
    again, both = bench.read(one, two)
    assert [part["date"] for part in again["parts"]] == ["2026-01-02", "later"]
    assert [r.case for r in both] == [r.case for r in rows]
    assert both[0].seconds["anymask"] == {"forward": 3.0} and "flex" in both[0].seconds
    assert both[0].problems == {"flex backward": "no way"}
    assert both[0].checked and both[0].wall == 3
    bench.write(two, {**about, "gpu": {**about["gpu"], "name": "another"}}, [row])
    with pytest.raises(ValueError, match=r"two.json: measured on another, .*one.json on NVIDIA"):
        bench.read(one, two)

    written = json.loads(one.read_text())
    del written["rows"][0]["checked"]  # as files were before it was recorded
    one.write_text(json.dumps(written))
    assert bench.read(one)[1][0].checked
    joined = tmp_path / "joined.json"
    assert cli.main(["bench", "--from", str(one), "--json", str(joined)]) == 0
    assert bench.read(joined)[1] == bench.read(one)[1]


def test_command_goes_on_where_it_stopped(tmp_path, capsys, monkeypatch):
    path = tmp_path / "bench.json"
    arguments = ["bench", "--length", "64", "--heads", "1", "--head-dim", "16", "--no-peers"]
    arguments += ["--rounds", "1", "--json", str(path), "--resume", "--masks"]
    assert cli.main([*arguments, "full"]) == 0
    before = json.loads(path.read_text())
    assert cli.main([*arguments, "full,causal"]) == 0
    after = json.loads(path.read_text())
    assert [row["mask"] for row in after["rows"]] == ["full", "causal"]
    assert after["rows"][0] == before["rows"][0] and after["date"] == before["date"]
    assert capsys.readouterr().err.count("of the allowed error") == 2
    assert cli.main(["bench", "--resume"]) == 1
    assert "--resume: the file to go on with" in capsys.readouterr().err
