"""`anymask bench`: its masks' functions, its checks, its rows, tables and command."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import reference

torch = pytest.importorskip("torch")

from anymask import bench, benchmark_masks, cli  # noqa: E402
from anymask.bench import check, mask_mods, measure, report, subjects  # noqa: E402

SMALL = bench.Geometry(64, 2, 4, 2, 16, "float32")
QUICK = bench.Settings(rounds=3, budget=0.1)


def layouts(count, length):
    rng = np.random.default_rng(0)
    documents = [benchmark_masks.random_documents(length, rng) for _ in range(count)]
    return documents if count > 1 else documents[0]


# ---- masks and suites ---------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("length", [97, 200])
@pytest.mark.parametrize("name", benchmark_masks.NAMES)
def test_mask_functions_say_what_the_masks_say(name, length, batch):
    mask = benchmark_masks.benchmark_mask(
        name, length, documents=layouts(batch, length), window=None if length == 97 else 31
    )
    dense = mask.mask.to_dense(q_len=length)
    function = mask_mods.mask_mod(mask, "cpu")
    i, j = torch.arange(length)[:, None], torch.arange(length)[None, :]
    for entry in range(batch):
        expected = torch.from_numpy(dense[entry if len(dense) > 1 else 0, 0].copy())
        if function is None:
            assert expected.all()
        else:
            found = function(torch.tensor(entry), torch.tensor(0), i, j)
            assert torch.equal(found.expand(length, length), expected)
        rows = check.visible(mask, entry, 5, length, "cpu")
        assert torch.equal(rows.expand(length - 5, length), expected[5:])
    assert mask.pairs == dense.sum()


def test_flex_attention_takes_the_functions():
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask = benchmark_masks.benchmark_mask("prefix_lm_document", 200, documents=layouts(2, 200))
    block_mask = create_block_mask(mask_mods.mask_mod(mask, "cpu"), 2, None, 200, 200, "cpu")
    q, k, v = (torch.randn(2, 3, 200, 16) for _ in range(3))
    out = flex_attention(q, k, v, block_mask=block_mask)
    arrays = [x.transpose(1, 2).numpy() for x in (q, k, v)]
    expected, _ = reference.attention(*arrays, mask.mask.to_dense(q_len=200))
    np.testing.assert_allclose(out.transpose(1, 2), expected, atol=1e-5)


def test_suites():
    protocol = bench.suite("protocol")
    assert len(protocol) == 36
    sizes = {name: len(bench.suite(name)) for name in ("short", "small", "dims")}
    assert sizes == {"short": 20, "small": 40, "dims": 24}
    assert {c.geometry.length * c.geometry.batch for c in protocol} == {131072}
    assert len(bench.suite("paper")) == 2 * 3 * (6 + 6 * 5)
    assert {c.geometry.heads * c.geometry.head_dim for c in bench.suite("paper")} == {4096}
    some = bench.suite("paper", masks=["document"], lengths=[8192], head_dims=[64], dtype="float16")
    assert [c.sample for c in some] == [1, 2, 3, 4, 5] and some[0].geometry.dtype == "float16"
    with pytest.raises(ValueError, match="suite: got 'long', one of protocol, short"):
        bench.suite("long")
    with pytest.raises(ValueError, match="masks: triangle unknown"):
        bench.suite("short", masks=["triangle"])


def test_every_recorded_figure_belongs_to_a_row_that_allows_as_much():
    cases = [c for name in ("protocol", "dims", "short") for c in bench.suite(name)]
    known = {(c.geometry, c.mask): c for c in cases}
    for key, row in report._recorded().items():
        case = known[key]
        if "allowed" in row:
            mask = case.build()
            share = mask.pairs / len(mask.indices) / case.geometry.length**2
            assert share == pytest.approx(row["allowed"], abs=0.007), case


# ---- checks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", benchmark_masks.NAMES)
def test_the_reference_is_attention(name):
    mask = benchmark_masks.benchmark_mask(name, 150)
    q, dout = (torch.randn(2, 150, 16) for _ in range(2))
    k, v = (torch.randn(150, 16) for _ in range(2))
    found = check.attention(check.Slice(q, k, v, dout), mask, 0, torch.float64)
    arrays = [x.numpy() for x in (q.transpose(0, 1)[None], k[None, :, None], v[None, :, None])]
    allowed = reference.intervals(mask.indices, mask.causal, 150)
    out, lse = reference.attention(*arrays, allowed)
    gradients = reference.attention_backward(*arrays, allowed, dout.transpose(0, 1)[None].numpy())
    np.testing.assert_allclose(found["out"].transpose(0, 1), out[0], atol=1e-12)
    np.testing.assert_allclose(found["lse"], lse[0], atol=1e-12)
    np.testing.assert_allclose(found["dq"].transpose(0, 1), gradients[0][0], atol=1e-12)
    np.testing.assert_allclose(found["dk"], gradients[1][0, :, 0], atol=1e-12)
    np.testing.assert_allclose(found["dv"], gradients[2][0, :, 0], atol=1e-12)


def test_the_reference_in_blocks(monkeypatch):
    mask = benchmark_masks.benchmark_mask("document", 150)
    slices = check.Slice(*(torch.randn(1, 150, 16) for _ in range(4)))
    slices = slices._replace(k=slices.k[0], v=slices.v[0])
    for dtype in (torch.float64, torch.bfloat16):
        whole = check.attention(slices, mask, 0, dtype)
        with monkeypatch.context() as patch:
            patch.setattr(check, "_BLOCK", 150 * 40)
            parts = check.attention(slices, mask, 0, dtype)
        for name, value in whole.items():
            torch.testing.assert_close(parts[name], value)


def results(case, dtype=None):
    """What anymask gives for a case, with what is expected of it."""
    *inputs, dout = measure.draw(case, "cpu", backward=True)
    expected = check.Expected(case.build(), *inputs, dout)
    subject = subjects.Anymask(case, case.build(), tuple(inputs))
    found = subject.forward()
    gradients = torch.autograd.grad(found["out"], subject.leaves, dout)
    found = {name: value.detach() for name, value in found.items()}
    return expected, found | dict(zip(check.GRADIENTS, gradients))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_right_results_pass_and_wrong_ones_do_not(dtype):
    case = bench.Case("causal_document", SMALL._replace(dtype=dtype), 0, "random")
    expected, found = results(case)
    assert expected.places == [(0, 0), (1, 1)]
    assert 0 < expected.check(found) <= 1
    for name, value in found.items():
        broken = value.clone()
        broken.flatten()[-1] += 0.1  # the last row and head of the last place
        for wrong in (value * 1.1, value * 0, broken, value + math.nan):
            with pytest.raises(check.WrongResult, match=f"^{name}"):
                expected.check({name: wrong})
    with pytest.raises(check.WrongResult, match="dk: not finite"):
        beside = found["dk"].clone()
        beside[0, 0, 1] = math.inf
        expected.check({"dk": beside})


def test_small_values_are_not_let_through():
    ref = torch.randn(1000, dtype=torch.float64) * 1e-4  # as the gradients of long rows
    low = ref.bfloat16()
    assert check.compare("dq", low, ref, low) <= 1
    with pytest.raises(check.WrongResult, match="dq: norm of the error"):
        check.compare("dq", torch.zeros_like(low), ref, low)


# ---- rows ---------------------------------------------------------------------------------------


def test_a_row():
    case = bench.Case("causal", SMALL)
    settings = QUICK._replace(peers=("sdpa",), deterministic=True)
    heard, finished = [], []
    (row,) = bench.run([case], settings, heard.append, finished.append)
    assert finished == [row] and "causal: timing backward" in heard and not row.problems
    assert row.pairs == 2 * 4 * 64 * 65 // 2 and row.allowed == pytest.approx(65 / 128)
    assert set(row.seconds["anymask"]) == {"plan", "forward", "backward"}
    assert set(row.seconds["sdpa"]) == {"forward", "backward"}
    assert set(row.seconds["anymask_deterministic"]) == {"backward"}
    forward = row.seconds["anymask"]["forward"]
    assert row.tflops("anymask", "forward") == pytest.approx(4 * 16 * row.pairs / forward / 1e12)
    backward = row.seconds["sdpa"]["backward"]
    assert row.tflops("sdpa", "backward") == pytest.approx(10 * 16 * row.pairs / backward / 1e12)
    assert row.tflops("flex", "forward") is None
    assert 0 < row.errors["anymask"] <= 1 and row.first_calls["sdpa"] > 0


def test_passes():
    case = bench.Case("document", SMALL)
    (row,) = bench.run([case], QUICK._replace(passes=("backward",), peers=("sdpa",)))
    assert set(row.seconds["anymask"]) == set(row.seconds["sdpa"]) == {"backward"}
    (row,) = bench.run([case], QUICK._replace(passes=("plan", "forward")))
    assert set(row.seconds["anymask"]) == {"plan", "forward"}


def test_what_fails_is_recorded_and_the_rest_goes_on(monkeypatch):
    cases = [bench.Case(name, SMALL) for name in ("full", "causal")]
    settings = QUICK._replace(peers=("sdpa", "cudnn"))

    def no_memory(self):
        raise torch.cuda.OutOfMemoryError("out of memory\n  tried to allocate")

    with monkeypatch.context() as patch:
        patch.setattr(subjects.Sdpa, "forward", no_memory)
        rows = bench.run(cases, settings)
    for row in rows:
        text = "OutOfMemoryError: out of memory tried to allocate"
        assert row.problems == {"sdpa forward": text, "cudnn forward": text} and not row.wrong
        assert set(row.seconds) == {"anymask"} and len(row.seconds["anymask"]) == 3

    def failing(*arguments):
        raise RuntimeError("the backward kernel was not launched")

    with monkeypatch.context() as patch:
        patch.setattr("anymask._torch_calls.backward", failing)
        (row,) = bench.run(cases[:1], settings._replace(peers=("sdpa",)))
    assert row.problems == {
        "anymask backward": "RuntimeError: the backward kernel was not launched"
    }
    assert set(row.seconds["anymask"]) == {"plan", "forward"}
    assert set(row.seconds["sdpa"]) == {"forward", "backward"}

    with monkeypatch.context() as patch:
        patch.setattr(measure, "draw", no_memory)
        patch.setattr(measure, "draw", lambda *a: no_memory(a))
        rows = bench.run(cases, settings)
    assert [list(row.problems) for row in rows] == [["case"], ["case"]]


def test_unsupported_peers_are_left_out(monkeypatch):
    (row,) = bench.run([bench.Case("document", SMALL)], QUICK._replace(peers=("cudnn",)))
    assert set(row.seconds) == {"anymask"} and not row.problems


def test_stop_after(monkeypatch):
    cases = [bench.Case("full", SMALL)] * 3
    assert bench.run(cases, QUICK._replace(stop_after=1e-9)) == []


def test_of_long_samples_the_first_is_checked(monkeypatch):
    monkeypatch.setattr(bench, "LONG", 64)
    cases = [bench.Case("document", SMALL, sample) for sample in (2, 4)]
    cases += [bench.Case("full", SMALL), bench.Case("document", SMALL._replace(length=48), 1)]
    rows = bench.run(cases, QUICK)
    assert [row.checked for row in rows] == [True, False, True, True]
    assert [bool(row.errors) for row in rows] == [True, False, True, True]
    assert set(rows[1].seconds["anymask"]) == {"plan", "forward", "backward"}
    assert "sample 4, finite" in report.one_line(rows[1])
    rows = bench.run(cases, QUICK._replace(every_sample=True))
    assert all(row.checked for row in rows)

    whole = subjects.attention

    def not_finite(q, k, v, **options):
        out, lse = whole(q, k, v, **options)
        return out * math.inf, lse

    monkeypatch.setattr(subjects, "attention", not_finite)
    rows = bench.run(cases, QUICK)
    assert all(row.wrong and not row.seconds["anymask"].get("forward") for row in rows)


def test_compilation_ahead_is_recorded(monkeypatch):
    from anymask.bench import precompile

    cases = [bench.Case("document", SMALL, sample) for sample in (1, 2)]
    asked = []

    def fake(cases, device, backward, jobs, say):
        asked.append((len(cases), device, backward, jobs))
        return {cases[0]._replace(sample=0): 7.5}

    monkeypatch.setattr(precompile, "precompile", fake)
    monkeypatch.setitem(subjects.PEERS, "flex", subjects.Sdpa)
    rows = bench.run(cases, QUICK._replace(peers=("flex",), compile_jobs=3))
    assert asked == [(2, "cpu", True, 3)]
    assert [row.compilation for row in rows] == [{"flex": 7.5}] * 2


def test_without_torch(monkeypatch):
    monkeypatch.setattr(bench, "has_torch", lambda: False)
    geometry = SMALL._replace(batch=1)
    (row,) = bench.run([bench.Case("causal_document", geometry)], QUICK)
    assert set(row.seconds["anymask"]) == {"plan", "forward"} and not row.problems
    with pytest.raises(ValueError, match="dtype: bfloat16 needs torch"):
        bench.run([bench.Case("causal", geometry._replace(dtype="bfloat16"))], QUICK)
    monkeypatch.setattr("anymask.bench.numpy_arrays.attention", lambda q, k, v, plan: q * 0)
    (row,) = bench.run([bench.Case("causal", geometry)], QUICK)
    assert row.wrong and not row.seconds


# ---- tables, pictures, files --------------------------------------------------------------------


def a_run(gpu="NVIDIA H200"):
    """A run in which anymask took 1 s and 2 s for everything, and the others some factor of it."""
    rows = []
    factors = {"full": (2.0, 0.5), "causal": (8.0, 2.0)}
    for case in bench.suite("protocol", masks=list(factors), lengths=[8192]):
        row = bench.Row(case, 10**12)
        flex, cudnn = factors[case.mask]
        row.seconds = {
            "anymask": {"plan": 1e-4, "forward": 1.0, "backward": 2.0},
            "flex": {"plan": 1e-3, "forward": flex, "backward": 2 * flex},
            "cudnn": {"forward": cudnn},
        }
        row.first_calls, row.compilation = {"flex": 1.0}, {"flex": 9.0}
        rows.append(row)
    about = {
        "date": "2026-01-02", "commit": "0123456789abcdef", "settings": {},
        "machine": {"cpu": "a CPU", "torch": "2.0"},
        "gpu": {"name": gpu, "driver": "1", "cuda": "13.0", "cudnn": 1, "triton": "3"},
    }  # fmt: skip
    return about, rows


def text_of(about, rows):
    from rich.console import Console

    console = Console(width=180, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for part in report.tables(about, rows):
        console.print(part)
    return console.export_text()


def test_ratios_and_their_means():
    about, rows = a_run()
    full, causal = report.lines(rows)
    assert full.ratio("forward", ["flex"]) == pytest.approx(2)
    assert full.ratio("forward", ["flex", "cudnn"]) == pytest.approx(0.5)
    assert causal.ratio("backward", ["cudnn"]) is None
    assert full.tflops("flashmask_v3", "backward") == 585
    assert full.ratio("forward", ["flashmask_v3"]) == pytest.approx(512 / 598)
    assert full.compilation("flex") == 9
    text = text_of(about, rows)
    assert "FlexAttention 4.00 / 4.00, cuDNN 1.00 / -, best peer 1.00 / 4.00" in text
    assert "FlashMask V3 as recorded" in text and "x V3" in text
    assert "V3" not in text_of(*a_run("NVIDIA H100"))


def test_samples_are_averaged():
    _, (row, _) = a_run()
    other = bench.Row(row.case._replace(sample=1), row.pairs)
    other.seconds = {"anymask": {"forward": 3.0}}
    (line,) = report.lines([row, other])
    assert line.seconds("anymask", "forward") == 2
    assert line.tflops("anymask", "forward") == pytest.approx(512 * (1 + 1 / 3) / 2)


def test_problems_are_printed():
    about, rows = a_run()
    rows[1].problems["flex [forward]"] = "RuntimeError: [no] way"
    del rows[1].seconds["flex"]
    text = text_of(about, rows)
    assert "causal S=8192 B=16 H=32 D=128 bfloat16: flex [forward]: RuntimeError: [no] way" in text
    assert "RuntimeError" in report.one_line(rows[1])


# ---- the command --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_command(tmp_path, capsys, dtype):
    path = tmp_path / "bench.json"
    arguments = ["bench", "--masks", "causal,document", "--length", "128", "--heads", "2"]
    arguments += ["--kv-heads", "1", "--head-dim", "32", "--rounds", "2", "--dtype", dtype]
    assert cli.main([*arguments, "--json", str(path), "--commit", "some"]) == 0
    written = json.loads(path.read_text())
    assert [row["mask"] for row in written["rows"]] == ["causal", "document"]
    assert all(row["seconds"]["anymask"]["backward"] > 0 for row in written["rows"])
    assert written["rows"][0]["length"] == 128 and written["machine"]["threads"] >= 1
    assert written["commit"] == "some" and written["gpu"] is None
    printed = capsys.readouterr()
    assert "S=128 B=1 H=2/1 D=32" in printed.out
    assert "x best" in printed.out and printed.err.count("of the allowed error") == 2


def test_command_stops_short_of_figures_for_a_wrong_result(monkeypatch, capsys):
    def wrong(q, k, v, plan=None, return_lse=False, deterministic=False):
        return q * 0, q.sum(-1).transpose(1, 2)

    monkeypatch.setattr(subjects, "attention", wrong)
    assert cli.main(["bench", "--masks", "causal", "--length", "64", "--no-peers"]) == 1
    printed = capsys.readouterr().out
    assert "anymask forward: WrongResult: out: largest error" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--masks", "nothing"], "masks: nothing unknown"),
        (["--suite", "short", "--batch", "3"], "batch: a suite has its own"),
        (["--suite", "short", "--lengths", "77"], "suite short has none of these"),
        (["--peers", "flex,other"], "peers: other unknown; there are flex, cudnn, sdpa"),
        (["--passes", "sideways"], "passes: sideways unknown"),
        (["--sample", "9", "--lengths", "64"], "sample: got 9, 1 to 5"),
    ],
)
def test_command_errors(capsys, arguments, message):
    assert cli.main(["bench", *arguments]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_command_without_a_gpu(capsys):
    assert cli.main(["bench", "--device", "cuda"]) == 1
    assert "torch finds no CUDA GPU here" in capsys.readouterr().err
