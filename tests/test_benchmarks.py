"""The pure parts of benchmarks/: what they count and how they write it down."""

import subprocess
import sys
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

import mesp_ref as mr
from mesp_ref.engine.config import FAMILIES, Qwen2Config

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import cells
import common
import families
import frameworks
import frameworks_report
import index
import job
import length
import papers
import pictures
import prose
import scaling
import waterfall
import where

CONFIG = Qwen2Config(137, 24, 1100, 3, 6, 2, 4)


def plain(x: Any) -> Any:
    return x.view(np.ndarray) if isinstance(x, np.ndarray) else x


class Counting(np.ndarray):
    """An array that counts the matrix products it takes part in, and hands this on."""

    products: ClassVar[Counter[tuple[int, int, int]]] = Counter()

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        if ufunc is np.matmul:
            (*batch, m, k), n = inputs[0].shape, inputs[1].shape[-1]
            self.products[m, k, n] += int(np.prod(batch))
        given = [plain(x) for x in inputs]
        if outs := kwargs.get("out"):
            getattr(ufunc, method)(*given, **kwargs | {"out": tuple(map(plain, outs))})
            return outs[0]
        found = getattr(ufunc, method)(*given, **kwargs)
        return found.view(Counting) if isinstance(found, np.ndarray) else found


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[int, int, int]]:
    """Count every product of arrays that are made from now on."""
    for name in ("empty", "zeros", "zeros_like", "take"):
        make = getattr(np, name)
        monkeypatch.setattr(np, name, lambda *a, _make=make, **k: _make(*a, **k).view(Counting))
    Counting.products.clear()
    return Counting.products


@pytest.mark.parametrize(
    ("method", "checkpoints"),
    [*((m, kind) for m in mr.METHODS for kind in ("ram", "disk")), ("mesp_tiled", "offload")],
)
@pytest.mark.parametrize("seq", [5, 70])
def test_gemms_are_those_that_the_engine_does(
    method: str, checkpoints: str, seq: int, counting: Counter[tuple[int, int, int]]
) -> None:
    model, adapter, ids, labels = common.model_and_batch(CONFIG, seq, rank=3, batch=2)
    arrays = {name: w.view(Counting) for name, w in model.weights.items()}  # type: ignore[attr-defined]
    model = mr.Model(model.config, type(model.weights)(arrays))  # type: ignore[call-arg]
    for name, w in adapter.weights.items():
        adapter.weights[name] = w.view(Counting)
    mr.loss_and_grads(model, adapter, ids, labels, method=method, checkpoints=checkpoints)
    expected = common.gemms(CONFIG, method, seq, rank=3, batch=2, checkpoints=checkpoints)
    assert counting == expected


@pytest.mark.parametrize("seq", [150, 300])
def test_gemms_of_several_chunks(seq: int, counting: Counter[tuple[int, int, int]]) -> None:
    """Whole sequences, and parts of one that see earlier keys."""
    test_gemms_are_those_that_the_engine_does("mesp_streamed", "ram", seq, counting)


@pytest.fixture
def small_cell(monkeypatch: pytest.MonkeyPatch) -> cells.Cell:
    """The base cell with CONFIG in the place of a published shape."""
    monkeypatch.setitem(cells.SHAPES, "qwen2.5-0.5b", CONFIG)
    return cells.Cell(tokens=21, rank=3)


@pytest.mark.parametrize("variant", [cells.STORE_H, cells.DISK])
def test_gemms_of_the_variants(
    variant: str, small_cell: cells.Cell, counting: Counter[tuple[int, int, int]]
) -> None:
    model, adapter, ids, _ = common.model_and_batch(CONFIG, 21, rank=3)
    arrays = {name: w.view(Counting) for name, w in model.weights.items()}  # type: ignore[attr-defined]
    model = mr.Model(model.config, type(model.weights)(arrays))  # type: ignore[call-arg]
    for name, w in adapter.weights.items():
        adapter.weights[name] = w.view(Counting)
    cells.run(model, adapter, ids, variant, lambda *_: None)
    assert counting == cells.products(CONFIG, 21, 3, variant)


def test_mesp_with_h_stored_is_mesp_with_h_stored() -> None:
    """The same bits; of h, 6 LoRA layers' arrays are alive where the peak is, in swiglu_bwd."""
    model, adapter, ids, _ = common.model_and_batch(CONFIG, 21, rank=3)
    found: dict[str, dict[str, Any]] = {"mesp": {}, cells.STORE_H: {}}
    for variant, grads in found.items():
        cells.run(model, adapter, ids, variant, lambda _, more, kept=grads: kept.update(more))
    assert len(found["mesp"]) == 7 * 2 * CONFIG.num_hidden_layers
    for name, grad in found["mesp"].items():
        assert np.array_equal(grad, found[cells.STORE_H][name])
    peaks = {name: cells.measure_peak(CONFIG, 21, 3, name) for name in found}
    assert {peak.op for peak in peaks.values()} == {"swiglu_bwd"}
    assert waterfall.contents(peaks["mesp"])[waterfall.H] == 0
    assert waterfall.contents(peaks[cells.STORE_H])[waterfall.H] == 6 * 21 * 3 * 4


@pytest.mark.parametrize("variant", cells.VARIANTS)
def test_measured_peak_is_the_predicted_one(variant: str) -> None:
    peak = cells.measure_peak(CONFIG, 64, 3, variant)
    assert peak.total == sum(peak.held.values()) + peak.added
    assert peak.predicted is None or 0 <= peak.total - peak.predicted <= cells.PYTHON
    assert 0 <= peak.traced - peak.total <= cells.PYTHON


def test_waterfall_adds_up_to_the_byte() -> None:
    """From MeBP to MeSP at small sizes: the sum of the steps, and the members of the drop set."""
    mebp, mesp = (cells.measure_peak(CONFIG, 21, 3, name) for name in ("mebp", "mesp"))
    steps = waterfall.waterfall(mebp, mesp)
    assert sum(step.size for step in steps) == mebp.total - mesp.total
    sizes = dict(steps)
    assert sizes["silu(gate)"] == sizes["z, the input of down_proj"] == 21 * 1100 * 4
    assert sizes["q and k after RoPE"] == 21 * (6 + 2) * 4 * 4
    assert sizes[waterfall.H] == 7 * 21 * 3 * 4
    back = waterfall.waterfall(mesp, mebp)
    assert {(name, -size) for name, size in back} == set(steps)


def test_measured_once(small_cell: cells.Cell, tmp_path: Path, capfd: Any) -> None:
    """A second run, in another process as it were, finds what the first one measured."""
    measured = []
    for _ in range(2):
        bench = cells.Bench(1, cells.Cache(tmp_path / "new" / "cells.json"))
        measured.append((bench.peak(small_cell, "mesp"), bench.times(small_cell)))
    assert measured[0] == measured[1]
    assert capfd.readouterr().out.count("memory:") == 1
    times = measured[0][1]
    assert times.keys() == mr.METHODS.keys()
    assert times["mebp"].flops == common.flops(CONFIG, "mebp", 21, 3)
    assert all(0 < t.least <= t.seconds <= t.most for t in times.values())


def _invented(cell: cells.Cell, variant: str) -> cells.Peak:
    """A peak that nobody measured, for tables."""
    predicted = cells.predict(cell.config, cell.tokens, cell.rank, variant)
    total = predicted or 10**8
    held = {"lora_linear mlp.gate_proj.h": 57344, "swiglu": total // 3}
    added = total - sum(held.values())
    return cells.Peak(total, "swiglu_bwd", held, added, total + 5, total // 2, predicted)


@pytest.fixture(scope="module")
def papers_results() -> papers.Results:
    every = dict.fromkeys((*papers.TABLE_1, *papers.TABLE_2, *papers.TABLE_3))
    peaks = {cell: {v: _invented(cell, v) for v in cells.VARIANTS} for cell in every}
    time = {v: cells.Time(2.0 + i, 1, 9, 3e11, 10**12) for i, v in enumerate(cells.VARIANTS)}
    return papers.Results(peaks, {cell: time for cell in every if cell.shape != "3B"})


def _tables(text: str) -> list[list[list[str]]]:
    """The cells of every Markdown table."""
    blocks = [block for block in text.split("\n\n") if block.startswith("|")]
    return [[line.strip("| ").split(" | ") for line in b.splitlines()] for b in blocks]


def test_paper_tables_render(papers_results: papers.Results) -> None:
    text = papers.report(papers_results, 3, common.machine())
    tables = _tables(text)
    assert len(tables) == 3 * 3 + 4
    for table in tables:
        assert len({len(line) for line in table}) == 1, table
    assert "136.2 (0.38)" in text
    assert "nan" not in text
    assert "None" not in text
    mesp = papers_results.peaks[papers.BASE]["mesp"].total / 1e6
    mebp = papers_results.peaks[papers.BASE]["mebp"].total / 1e6
    assert ["`mesp`", f"{mesp:.2f} ({mesp / mebp:.2f})"] in [row[:2] for row in tables[0]]
    assert ["`mesp`", "4.00 (1.33)"] in [row[:2] for row in tables[1]]
    assert ["`mesp`", "1.20 (1,000)"] in [row[:2] for row in tables[2]]  # 4 s · 3e11 / 1e12


def test_gemma_beside_the_papers_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two blocks, the second without a window; and the section of a page that has it already."""
    kinds = ("sliding_attention",) * 5 + ("full_attention", "sliding_attention")
    gemma = Qwen2Config(
        130,
        64,
        96,
        7,
        4,
        2,
        16,
        traits=FAMILIES["gemma3_text"],
        layer_types=kinds,
        sliding_window=9,
    )
    monkeypatch.setitem(cells.SHAPES, "gemma", gemma)
    monkeypatch.setattr(families, "QWEN", ())
    cell = cells.Cell("gemma", 21, 3, layers=2)
    assert cell.config.layer_types == kinds[4:6]
    peaks = {v: cells.measure_peak(cell.config, 21, 3, v) for v in families.VARIANTS}
    text = families.section([cell], {cell: peaks})
    for table in _tables(text):
        assert len({len(line) for line in table}) == 1, table
    assert f"{peaks['mebp'].total / 1e6:.2f} (" in text
    assert families.without_section(f"# A page\n\nof words\n\n{text}") == (
        "# A page\n\nof words\n\n",
        text,
    )
    assert families.without_section("# A page\n") == ("# A page\n", "")


def test_waterfall_table_adds_up(papers_results: papers.Results) -> None:
    first, *steps, last, _, _ = _tables(papers.waterfall_table(papers_results))[0][2:]
    for column in range(1, len(papers.FALLS) + 1):
        numbers = [int(row[column].replace(",", "")) for row in (first, *steps)]
        assert sum(numbers) == int(last[column].replace(",", ""))


def test_inventory_is_that_of_the_papers_shapes() -> None:
    """At 0.5B, 256 tokens, 16 bits, in bytes, each from its shape."""
    kept = {name: row[0] * 1e6 for name, row in papers.inventory()}
    found = [round(value) for value in kept.values()]
    t, c, f, v, q, k = 256, 896, 4864, 151936, 14 * 64, 2 * 64
    h = 7 * t * 8 * 2
    assert found == [
        t * v * 2, 25 * t * c * 2, 4_399_104 * 2, (4 * c + 14 * t + q + 2 * f) * t * 2,
        (q + 2 * k + 2 * f) * t * 2 + h, h, 24 * h, 224_600_000,
    ]  # fmt: skip


def test_scaling_renders(tmp_path: Path) -> None:
    every = [cell for sweep in scaling.SWEEPS for cell in sweep.cells]
    time = {v: cells.Time(2.0, 1, 9, 3e11, 10**12) for v in cells.VARIANTS}
    peaks = {cell: {v: _invented(cell, v) for v in scaling.VARIANTS} for cell in every}
    results = scaling.Results(peaks, dict.fromkeys(every, time))
    assert sum(cell == cells.Cell() for cell in every) == 4  # in every sweep, measured once
    tables = _tables(scaling.report(results, 3, common.machine()))
    assert len(tables) == 1 + 2 * 4
    for table in tables:
        assert len({len(line) for line in table}) == 1, table
    memory, _ = scaling.curves(results)
    pictures.draw_curves(tmp_path / "memory.png", memory[:1] * 4, ["tokens"] * 4, "MB")
    assert (tmp_path / "memory.png").stat().st_size > 20_000


def test_prose_is_filled_and_tables_are_not_touched() -> None:
    table = "| a | b |\n| --- | ---: |\n| " + "x" * 200 + " | 1 |"
    text = f"# Title\n\none\ntwo\n\n- {'word ' * 40}\n- last\n\n{table}\n"
    title, words, items, same = prose.tidy(text).split("\n\n")
    assert (title, words, same) == ("# Title", "one two", table)
    assert [line[:2] for line in items.splitlines()] == ["- ", "  ", "  ", "- "]
    assert all(len(line) <= prose.WIDTH for line in items.splitlines())


@pytest.fixture
def side_by_side() -> list[frameworks_report.Measured]:
    """Every system of frameworks.py at invented figures: torch 2 s, ours 1 s, GEMM 1 TFLOP/s."""
    found = []
    for seq, systems in frameworks.SYSTEMS.items():
        facts = {s: frameworks_report.Facts(s, {"Python": 6, "model": 30}, []) for s in systems}
        for s in systems:
            facts[s].peak, facts[s].loss, facts[s].rate = 50.0, 12.5, 3e11
        seconds = {s: [1.0 + s.startswith("torch") - 0.2 * (s == "jax")] * 3 for s in systems}
        timed = common.Timed(seconds, {s: [1e12] * 3 for s in systems})
        products = {s: frameworks.products(s, seq) for s in systems if frameworks.is_ours(s)}
        talks = (
            [frameworks_report.Talk(s, 1, 8.0) for s in ("torch", "torch")] if seq == 256 else []
        )
        talks += [
            frameworks_report.Talk("store_all", 1, rate) for rate in (15.0, 17.0)[: len(talks)]
        ]
        talks += [
            frameworks_report.Talk(s, 8, r) for s, r in (("torch", 20.0), ("store_all", 24.0))
        ]
        found.append(
            frameworks_report.Measured(seq, facts, timed, products, talks if seq == 256 else [])
        )
    return found


def test_frameworks_renders(side_by_side: list[frameworks_report.Measured], tmp_path: Path) -> None:
    goals = frameworks_report.write(tmp_path, side_by_side, 2, (["mlx 1"], 1e9))
    text = (tmp_path / "frameworks.md").read_text(encoding="utf-8")
    assert goals in text
    assert "{" not in text
    for table in _tables(text):
        assert len({len(line) for line in table}) == 1, table
    assert "| mesp_ref | 16.0 | 24.0 |" in text
    for picture in ("256", "1024", "process"):
        assert f"frameworks-{picture}.png" in text
        assert (tmp_path / f"frameworks-{picture}.png").stat().st_size > 10_000


def test_goals_are_judged_by_what_was_measured(
    side_by_side: list[frameworks_report.Measured],
) -> None:
    """Ours take half of torch's time, and the process 50 MiB: known before the code runs."""
    rows = {goal.what: goal.row()[2:] for goal in frameworks_report.goals(side_by_side)}
    assert len(rows) == (3 + 1 + 4 + 1) + 8 + 1 + 4 + 2  # ratios, products, process, products, talk
    assert rows["time of `store_all` / torch + peft, 256 tokens"] == ("0.5", "met")
    both = "`mesp_tiled`, checkpoints on disk / torch + peft, gradient checkpointing"
    assert rows[f"time of {both}, 1024 tokens"] == ("0.5", "met")
    work = common.flops(common.SHAPES["qwen2.5-0.5b"], "mesp_streamed", 256, 8) / 1e12
    fastest = "`mesp_streamed` / JAX, jit (the fastest peer), 256 tokens"
    alone = f"its products alone: {work / 0.8:.2f}"
    assert rows[f"time of {fastest}; {alone}"] == ("1.25", "47% above")
    assert rows["tokens a second, generated, batch 8: ours / transformers"] == ("1.2", "8% below")
    assert rows["tokens a second, generated, batch 1: ours / transformers"] == ("2", "met")
    process = "whole process, `mesp_tiled`, on disk, 4-bit base, 256 tokens: MiB"
    assert rows[process] == ("50", "met")
    work = common.flops(common.SHAPES["qwen2.5-0.5b"], "store_all", 256, 8) / 1e12
    of_gemm = rows["time of `store_all` / its FLOPs ÷ GEMM rate, 256 tokens"][0]
    assert of_gemm == f"{1 / work:.3g}"


def test_difference_of_gradients() -> None:
    want = {"a": np.array([4.0, -8.0]), "b": np.array([1e-3])}
    got = {"a": np.array([4.0, -7.0]), "b": np.array([1.5e-3])}
    assert frameworks.difference(got, want) == pytest.approx(0.5)
    assert np.isnan(frameworks.difference(got | {"b": np.array([np.nan])}, want))
    with pytest.raises(mr.MespRefError, match="1 tensors, expected torch's 2"):
        frameworks.difference({"a": want["a"]}, want)


def test_systems_take_turns() -> None:
    """Each round starts with another one, and a probe follows each."""
    order: list[str] = []
    turns = {name: partial(order.append, name) for name in "abc"}
    timed = common.interleaved(
        turns, 2, warmup=1, probes={name: Counter({(8, 8, 8): 1}) for name in "abc"}
    )
    assert "".join(order) == "cab" + "abc" + "bca"
    assert all(len(timed.seconds[name]) == len(timed.rates[name]) == 2 for name in "abc")
    assert all(rate > 0 for rates in timed.rates.values() for rate in rates)


def test_a_training_step_imports_little() -> None:
    """The memory of a small process is its imports; scipy, tokenizers and plots are for others."""
    code = """if True:
        import sys, mesp_ref as mr
        from mesp_ref.train.optim import SGD
        model = mr.random_model(mr.Qwen2Config(32, 8, 12, 1, 2, 1, 4))
        adapter, optimiser = mr.init_lora(model.config, rank=2), SGD()
        update = lambda layer, grads: optimiser.step(adapter.weights, grads, 0.1)
        for method in mr.METHODS:
            ids = [[1, 2, 3]]
            mr.loss_and_grads(model, adapter, ids, ids, method=method, on_gradients=update)
        print(*sorted({name.split(".")[0] for name in sys.modules}))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported = set(done.stdout.split())
    assert {"numpy", "mesp_ref"} <= imported
    heavy = {"scipy", "tokenizers", "matplotlib", "jinja2", "tqdm", "hypothesis"}
    assert not heavy & imported, sorted(heavy & imported)


@pytest.fixture
def tiny_lengths(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """benchmarks/length.py on a tiny shape; returns where it writes."""
    monkeypatch.setitem(length.SHAPES, length.SHAPE, CONFIG)
    monkeypatch.setitem(length.SHAPES, length.LARGE, replace(CONFIG, hidden_size=64))
    for name, value in (
        ("OUT", tmp_path), ("FACTS", tmp_path / "length.json"), ("TIMES_AT", (8, 16, 24, 32)),
        ("VOCABULARY", 64), ("PEAKS_AT", (8, 40)),
    ):  # fmt: skip
        monkeypatch.setattr(length, name, value)
    return tmp_path


def test_the_page_of_lengths(tiny_lengths: Path) -> None:
    """Every part runs, and the page shows what each found."""
    facts = {
        "peaks": length.peaks((8, 40)), "time": length.times(1), "ratio": {
            "mesp_tiled": [2.0], "mesp_streamed": [2.1]
        },
        "full": {"tokens": 40, "cpu": 90.0, "traced": 8_000_000, "own_before": 0, "own_peak": 2**24},
    }  # fmt: skip
    model = mr.random_model(CONFIG)
    facts["large"] = {
        "mesp_tiled": length._whole(model, 8, "mesp_tiled") | {"mapped": 4_300_000_000}
    }
    assert all(0 <= x["measured"] - x["predicted"] < 300_000 for x in facts["peaks"].values())
    length.draw(tiny_lengths / "length-memory.png")
    assert (tiny_lengths / "length-memory.png").stat().st_size > 10_000
    text = length.report(facts)
    for words in (
        "on disk 2.00 s of CPU, medians of 1: **1.05**",
        "1.5 minutes of CPU",
        "16 MiB of its own",
        "The 4.3 GB of mapped files",
    ):
        assert words in text
    assert "{" not in text
    for table in _tables(text):
        assert len({len(line) for line in table}) == 1, table


def test_the_fit_of_time_against_length() -> None:
    """Seconds made from a, b and c give a, b and c, and a linear part that is b everywhere."""
    a, b, c = 0.3, 2e-3, 5e-8
    made = {str(t): [99.0, a + b * t + c * t * t] for t in (512, 1024, 2048, 4096, 8192)}
    found, flat = length.fit(made)
    np.testing.assert_allclose(found, (a, b, c), rtol=1e-6)
    np.testing.assert_allclose(list(flat.values()), b, rtol=1e-6)


def test_where_the_time_goes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every op is there with its products, which are those that are counted elsewhere."""
    monkeypatch.setattr(common, "_LEAST", 1e-4)
    packable = Qwen2Config(137, 64, 128, 2, 2, 1, 32)
    runs = where.measure(packable, 20, 1, ("mesp_tiled", "mesp_streamed", where.PACKED))
    text = where.report(packable, 20, 1, runs)
    assert "`streamed_attention_bwd`" in text
    assert "| all |" in text
    assert "| `mesp_tiled`, 4-bit base |" in text
    for table in _tables(text):
        assert len({len(line) for line in table}) == 1, table
    where.draw(runs, tmp_path / "where.png")
    assert (tmp_path / "where.png").stat().st_size > 5_000
    for method, place in where.WAYS.items():
        work = where.flops(CONFIG, method, 20)
        expected = common.gemms(CONFIG, method, 20, where.RANK, checkpoints=place)
        assert sum(work.values()) == common.total_flops(expected)


def test_a_step_over_its_products() -> None:
    """Two seconds for 3 TFLOP at 3 TFLOP/s are twice what the products take."""
    run = where.Run({"lora_linear": 1.5, where.BETWEEN: 0.5}, Counter({"lora_linear": 3}), 3.0)
    assert run.over == 2.0
    assert "| all | 2000 | 1000 | 1000 | 50.0% |" in where.table(run)


def _jobs() -> dict[str, list[job.Job]]:
    """The Trainer's at 64 tokens a second, ours at 128."""
    names = (job.TRAINER, job.CHECKPOINTED, *job.OURS)
    seconds = {name: 128.0 if name in job.OURS else 256.0 for name in names}
    return {name: [job.Job(seconds[name], [2.0, 1.5], 900.0)] for name in names}


def test_the_page_of_the_whole_job() -> None:
    found = job.figures(_jobs(), 16)
    assert found[job.TRAINER]["tokens a second"] == 64
    text = job.report(found, 16, 1, True, 1)
    assert "the fastest of ours reaches **2.00**" in text
    for table in _tables(text):
        assert len({len(line) for line in table}) == 1, table


def test_jobs_that_learn_otherwise_are_refused() -> None:
    """A loss that differs, that is missing, that is no number."""
    for losses, words in (
        ([2.0, 1.51], "differ from the Trainer's by 6.7e-03"), ([2.0], "expected the Trainer's 2"),
        ([2.0, float("nan")], "by nan"),
    ):  # fmt: skip
        jobs = _jobs()
        jobs[next(iter(job.OURS))] = [job.Job(1.0, losses, 0.0)]
        with pytest.raises(mr.MespRefError, match=words):
            job.figures(jobs, 16)


def test_all_pages_in_one_table(
    side_by_side: list[frameworks_report.Measured], tmp_path: Path
) -> None:
    """Every system and both kernels; a figure that is missing is a dash."""
    frameworks_report.write(tmp_path, side_by_side, 2, None, cpu=True)
    common.write_report(tmp_path / "where.json", '{"over": {"mesp_tiled": 1.125}, "packed": 1.25}')
    (tmp_path / "avx512").mkdir()
    common.write_report(
        tmp_path / "avx512/where.json", '{"over": {"mesp_tiled": 1.5}, "packed": 2}'
    )
    text = index.report(tmp_path)
    assert (
        "| `mesp_tiled`, checkpoints on disk | 1.00 | 1.25 | – | – | 1.12 / 1.50 | 20 | 206 |"
        in text
    )
    assert "| JAX, jit | 0.80 | 1.00 | – | – | – | 20 | – |" in text
    assert "batch 1, AVX2 (transformers) | 16.0 | 8.0 | 2.00 | – |" in text
    assert "`mesp_tiled`, AVX2 | – | – | 1.25 | ≤ 1.15 |" in text
    assert "`mesp_tiled`, AVX-512 | – | – | 2.00 | ≤ 1.15 |" in text
    assert "[frameworks.md](frameworks.md)" in text
    assert "{" not in text
    for table in _tables(text):
        assert len({len(line) for line in table}) == 1, table
