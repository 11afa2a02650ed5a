"""The demo: its corpus, its pictures, its errors, and a run of seconds from start to report."""

from __future__ import annotations

import json
import math
import os
import zlib
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from anymask import demo
from anymask.demo import corpus, pictures

torch = pytest.importorskip("torch")


@pytest.fixture
def child_finds_package(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(demo.__file__).parents[2]))


# ---- corpus -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
def test_sequences_hold_whole_documents(seed):
    documents = corpus.read_documents(2000)
    text_of = dict(documents)
    sequences = corpus.pack(documents, 4096, seed)
    assert len(sequences) > 10
    for sequence in sequences:
        assert sequence.text.shape == (4096,)
        assert sequence.cu_seqlens[0] == 0 and sequence.cu_seqlens[-1] == 4096
        assert np.all(np.diff(sequence.cu_seqlens) > 0)
        for name, begin, end in zip(sequence.names, sequence.cu_seqlens, sequence.cu_seqlens[1:]):
            assert bytes(sequence.text[begin : end - 1]) == text_of[name]
            assert sequence.text[end - 1] == corpus.SEPARATOR
        np.testing.assert_array_equal(
            sequence.ids, np.searchsorted(sequence.cu_seqlens[1:], np.arange(4096), side="right")
        )


def test_packing_follows_the_seed():
    documents = corpus.read_documents(2000)
    names = [[s.names for s in corpus.pack(documents, 4096, seed)] for seed in (0, 0, 1)]
    assert names[0] == names[1] != names[2]


def test_no_source_is_a_clear_error(tmp_path):
    with pytest.raises(RuntimeError, match="found no Python source file"):
        corpus.read_documents(1000, tmp_path)
    with pytest.raises(ValueError, match=r"long\.py has 300 bytes, a sequence of 256 holds"):
        corpus.pack([("long.py", b"x" * 300)], 256, 0)


# ---- both attentions ----------------------------------------------------------------------------


def test_both_attentions_see_the_same_pairs():
    from anymask.demo import train
    from anymask.demo.config import TINY

    _, ids = next(train.batches(TINY.but(batch=2)))
    q, k, v = torch.randn(3, 2, TINY.length, TINY.heads, TINY.head_dim).unbind(0)
    outs = [make(ids, TINY)(q, k, v) for make in (train.torch_attention, train.anymask_attention)]
    torch.testing.assert_close(*outs, atol=1e-5, rtol=1e-5)


# ---- the whole ----------------------------------------------------------------------------------


class Page(HTMLParser):
    """Checks that tags nest and collects what the page refers to."""

    VOID = frozenset({"meta", "br", "img", "circle", "rect", "line", "polyline", "image"})

    def __init__(self, text):
        super().__init__()
        self.open, self.references, self.svgs = [], [], 0
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.svgs += tag == "svg"
        self.references += [value for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_from_start_to_report(tmp_path, capsys, child_finds_package):
    folder = tmp_path / "a" / "report"
    status = demo.main(
        ["--tiny", "--steps", "3", "--device", "cpu", "--seed", "5", "--output", str(folder)]
    )
    printed = capsys.readouterr().out
    assert status == 0, printed
    assert printed.splitlines()[-1] == f"Report: {folder / 'report.html'}"

    figures = json.loads((folder / "results.json").read_text())
    for name in ("torch", "anymask"):
        run = figures[name]
        assert len(run["losses"]) == len(run["seconds"]) == 3
        assert run["losses"][0] == pytest.approx(math.log(256), abs=0.5)
        assert run["losses"][-1] < run["losses"][0]
        assert run["tokens_per_second"] > 0
        assert run["peak_bytes"] > 0
    assert figures["largest_loss_difference"] < 1e-4
    assert figures["config"]["seed"] == 5
    assert figures["facts"]["trained on"].startswith("the CPU: ")
    assert "on the CPU in float32" in " ".join(printed.split())

    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    assert page.open == []
    assert page.svgs == 7
    assert all(reference.startswith("data:") for reference in page.references)


def test_lower_precision(child_finds_package):
    """What a GPU trains in: bfloat16 under autocast, on this CPU."""
    from anymask.demo import train
    from anymask.demo.config import TINY

    losses = {}
    for name in ("torch", "anymask"):
        config = TINY.but(implementation=name, dtype="bfloat16", steps=3, batch=2, sample=8)
        *steps, last = train.train(config)
        losses[name] = [step["loss"] for step in steps]
        assert len(last["result"]["sample"]) == 4 + 8
    assert losses["torch"] == pytest.approx(losses["anymask"], abs=0.02)
    assert losses["torch"] != losses["anymask"]


# ---- the device ---------------------------------------------------------------------------------


def chosen(monkeypatch, problem, *arguments):
    """(config, what was printed) on a machine with that problem; "" for a GPU that works."""
    import io

    from anymask.demo import command
    from rich.console import Console

    monkeypatch.setattr(command, "_cuda_problem", lambda: problem)
    console = Console(file=io.StringIO(), width=200)
    config = command._choose(command._parser().parse_args(arguments), console)
    return config, console.file.getvalue()


def test_a_gpu_is_used_where_there_is_one(monkeypatch):
    config, printed = chosen(monkeypatch, "")
    assert (config.device, config.dtype, printed) == ("cuda", "bfloat16", "")
    assert config.batch * config.length == 32768 and config.seconds == 60
    config, _ = chosen(monkeypatch, "", "--tiny")
    assert (config.device, config.dtype, config.length) == ("cuda", "bfloat16", 256)
    config, _ = chosen(monkeypatch, "", "--device", "cpu")
    assert (config.device, config.dtype) == ("cpu", "float32")


def test_the_cpu_is_used_where_a_gpu_cannot_be(monkeypatch):
    config, printed = chosen(monkeypatch, "torch finds no CUDA GPU")
    assert config.device == "cpu" and printed == ""
    problem = "anymask does not run on the GPU: no NVRTC"
    config, printed = chosen(monkeypatch, problem)
    assert config.device == "cpu" and printed == f"Using the CPU: {problem}\n"
    with pytest.raises(Exception, match="--device cuda: anymask does not run on the GPU"):
        chosen(monkeypatch, problem, "--device", "cuda")


def test_why_a_gpu_cannot_be_used(monkeypatch):
    from anymask.demo import command

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command._cuda_problem() == "torch finds no CUDA GPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    whole = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *shape, device, **rest: whole(*shape, **rest))
    assert command._cuda_problem() == ""  # the call itself, on the CPU
    monkeypatch.setattr("anymask.attention", lambda *arguments: 1 / 0)
    assert command._cuda_problem() == "anymask does not run on the GPU: division by zero"


def test_the_report_names_the_gpu(monkeypatch):
    from types import SimpleNamespace

    from anymask.demo import command
    from anymask.demo.config import CUDA

    properties = SimpleNamespace(total_memory=80 * 1024**3)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    facts = dict(command._facts(CUDA, 10, 1.0))
    assert facts["trained on"] == "Some GPU, 80 GiB" and "cores" in facts["processor"]
    assert command._where(CUDA) == "the GPU (Some GPU) in bfloat16"


def test_errors_are_sentences(tmp_path, capsys, child_finds_package, monkeypatch):
    def fails(*arguments):
        assert demo.main([*arguments, "--tiny", "--output", str(tmp_path / "out")]) == 1
        return capsys.readouterr().err

    assert "--steps: got 0, at least 1 is needed" in fails("--steps", "0", "--device", "cpu")
    if not torch.cuda.is_available():
        assert "torch finds no CUDA GPU" in fails("--device", "cuda")
    (tmp_path / "out").rmdir()
    (tmp_path / "out").write_text("in the way")
    assert "--output: cannot make the folder" in fails("--device", "cpu")
    (tmp_path / "out").unlink()
    # A training process that dies says why.
    package = Path(demo.__file__).parents[2]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(package)]))
    (tmp_path / "torch.py").write_text("raise OSError('a broken torch')")
    assert "a broken torch" in fails("--device", "cpu")


# ---- pictures -----------------------------------------------------------------------------------


def test_png_holds_the_pixels():
    indices = np.arange(12, dtype=np.uint8).reshape(3, 4) % 4
    data = pictures.png(indices, {i: (i, 2 * i, 3 * i, 255) for i in range(4)})
    begin = data.index(b"IDAT") + 4
    lines = zlib.decompress(data[begin : data.index(b"IEND") - 8])
    assert [lines[5 * row + 1 : 5 * row + 5] for row in range(3)] == [bytes(r) for r in indices]


@pytest.mark.parametrize("losses", [[5.5], [5.5, 5.5], [5.5, 4.0, 3.0], [1e-9, 0.0]])
def test_curves_of_any_shape(losses):
    points = list(enumerate(losses))
    for picture in (
        pictures.losses(losses, losses),
        pictures.losses_over_time(points, points),
        pictures.differences([0.0] * len(losses)),
    ):
        assert "nan" not in picture and "inf" not in picture
    assert "circle" in pictures.differences([1e-9, 2e-3])
