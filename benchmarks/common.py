"""What the benchmarks share: the machine, a step's GEMMs, timing in turns, reports.

A benchmark is judged against the machine it runs on: `gemms` lists the matrix products of a step,
`gemm_rate` measures how fast this BLAS does products of those shapes, and their quotient is the
time that a step of nothing but GEMMs would take.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mesp_ref import lean as tiled
from mesp_ref.cli import options
from mesp_ref.cli.memory import SHAPES
from mesp_ref.engine.adapter import Adapter
from mesp_ref.engine.config import PROJECTIONS, Qwen2Config
from mesp_ref.engine.init import init_lora
from mesp_ref.engine.model import Model
from mesp_ref.errors import MespRefError
from mesp_ref.files.figure import METHOD_COLOURS
from mesp_ref.files.output import write_aside
from mesp_ref.lean.chunks import CHUNK, chunks
from mesp_ref.lean.streamed_attention import KEYS
from mesp_ref.ops import Array
from mesp_ref.train.ranks import Ranks

COLOURS = METHOD_COLOURS
Gemms = Counter[tuple[int, int, int]]  # (m, k, n) of [m, k]·[k, n] -> how many times
median = statistics.median


# The machine


def machine() -> list[str]:
    """What a figure depends on: processor, memory, system, BLAS kernel and threads, versions."""
    packages = ("numpy", "mesp-ref", "torch", "transformers", "peft", "jax", "mlx")
    found = [f"{name} {version}" for name in packages if (version := _version(name))]
    return [
        f"{_field('/proc/cpuinfo', 'model name') or platform.processor()}, {_cores()} cores, "
        f"{_field('/proc/meminfo', 'MemTotal')} of memory",
        f"{platform.system()} {platform.release()}, {platform.machine()}",
        *_blas(),
        f"Python {platform.python_version()}, {', '.join(found)}",
        f"{datetime.datetime.now(datetime.UTC):%d %B %Y}",
    ]


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _field(file: str, name: str) -> str:
    """The value of `name : value` in a file of /proc; sizes in GiB; empty where there is none."""
    try:
        lines = Path(file).read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return ""
    value = next((line.split(":", 1)[1].strip() for line in lines if line.startswith(name)), "")
    return f"{int(value.split()[0]) / 2**20:.0f} GiB" if value.endswith(" kB") else value


def _blas() -> list[str]:
    """Kernel and threads of the BLAS that NumPy loaded, and what the environment says about it."""
    try:
        from threadpoolctl import threadpool_info
    except ImportError:  # the extra `benchmarks` brings it
        return ["BLAS unknown: threadpoolctl is not installed"]

    lines = [
        f"{pool['internal_api']} {pool['version']}, kernel {pool.get('architecture', 'unknown')}, "
        f"{pool['num_threads']} threads"
        for pool in threadpool_info()
        if pool["user_api"] == "blas" and "numpy" in pool["filepath"]
    ]
    pinned = [f"{n}={os.environ[n]}" for n in sorted(os.environ) if n.startswith("OPENBLAS_")]
    return [*(lines or ["BLAS unknown"]), *([f"set: {', '.join(pinned)}"] if pinned else [])]


# Several processes


def on_ranks(args: argparse.Namespace, command: Callable[[Ranks], int]) -> int:
    """Run a benchmark alone, or with --mpi on all ranks; a user's mistake is one line, exit code 2."""
    try:
        return options.on_ranks(args, command)
    except MespRefError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def machines(ranks: Ranks) -> list[str]:
    """`machine` of rank 0, and what else took part."""
    own, *others = ranks.in_order([machine()], ranks.size)
    if others:
        own.append(f"{ranks.size} processes, started by mpiexec, shared the cells")
    return own + [f"also {found[0]}" for found in others if found[0] != own[0]]


# FLOPs


def flops(
    config: Qwen2Config, method: str, seq: int, rank: int, batch: int = 1, checkpoints: str = "ram"
) -> int:
    """FLOPs of one LoRA step: 2·m·k·n for every matrix product that the method performs.

    Counted    the seven projections and their LoRA branches (A, B and both gradients), attention
               scores and mixes, the head; rebuilds included, each product as often as it is done
    Not        norms, softmax, SiLU, RoPE, embedding and the optimiser: elementwise, under 1%
    """
    return total_flops(gemms(config, method, seq, rank, batch, checkpoints))


def total_flops(products: Gemms) -> int:
    """Σ 2·m·k·n."""
    return sum(2 * m * k * n * count for (m, k, n), count in products.items())


class _Sizes(NamedTuple):
    """The letters of the project for one step."""

    config: Qwen2Config
    N: int
    T: int
    R: int

    @property
    def M(self) -> int:
        return self.N * self.T

    @property
    def C(self) -> int:
        return self.config.hidden_size

    def matrices(self) -> dict[str, tuple[int, int]]:
        """(in, out) of each projection."""
        shapes = self.config.weight_shapes()
        return {
            name: (shapes[w][1], shapes[w][0])
            for name, path in PROJECTIONS.items()
            if (w := f"model.layers.0.{path}.weight")
        }


_QKV = ("q_proj", "k_proj", "v_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")


def gemms(
    config: Qwen2Config, method: str, seq: int, rank: int, batch: int = 1, checkpoints: str = "ram"
) -> Gemms:
    """Every matrix product of one LoRA step on seven projections, all labels counted."""
    s, found = _Sizes(config, batch, seq, rank), Gemms()
    forward, backward = _FORWARDS[method](s), _BACKWARDS[method](s, checkpoints)
    times = 2 if method == "mezo" else 1
    for products in (forward, backward):
        for shape, count in products.items():
            found[shape] += count * config.num_hidden_layers * times
    parts = _chunks(s) if method == "mesp_streamed" else [(s, 0, s.N * (s.T - 1))]
    for here, _, counted in parts:
        for shape, count in _head(here, counted, gradient=method != "mezo").items():
            found[shape] += count * times
    return found


def _linear(s: _Sizes, *names: str) -> Gemms:
    """x·Wᵀ, h = x·Aᵀ and h·Bᵀ."""
    found, sizes = Gemms(), s.matrices()
    for name in names:
        inner, outer = sizes[name]
        found.update([(s.M, inner, outer), (s.M, inner, s.R), (s.M, s.R, outer)])
    return found


def _linear_bwd(s: _Sizes, *names: str, h: bool) -> Gemms:
    """dy·W, dy·B, dh·A, dA = dhᵀ·x, dB = dyᵀ·h, and h = x·Aᵀ once more where it is rebuilt."""
    found, sizes = Gemms(), s.matrices()
    for name in names:
        inner, outer = sizes[name]
        found.update([(s.M, outer, inner), (s.M, outer, s.R), (s.M, s.R, inner)])
        found.update([(s.R, s.M, inner), (outer, s.M, s.R)])
        if h:
            found[s.M, inner, s.R] += 1
    return found


def _attention(s: _Sizes) -> Gemms:
    """Scores and mixes of whole heads, those of a group stacked."""
    groups, d = s.config.num_key_value_heads, s.config.head_dim
    rows = s.T * s.config.num_attention_heads // groups
    return Gemms({(rows, d, s.T): s.N * groups}) + Gemms({(rows, s.T, d): s.N * groups})


def _attention_bwd(s: _Sizes) -> Gemms:
    """dp and dq, dv and dk."""
    groups, d = s.config.num_key_value_heads, s.config.head_dim
    rows = s.T * s.config.num_attention_heads // groups
    return _attention(s) + Gemms({(s.T, rows, d): 2 * s.N * groups})


def _block(s: _Sizes) -> Gemms:
    return _linear(s, *PROJECTIONS) + _attention(s)


def _head(s: _Sizes, counted: int, gradient: bool) -> Gemms:
    """Each tile of the vocabulary once for the logits and once for their gradient."""
    found = Gemms()
    for a, b in tiled.tiles(s.config.vocab_size, tiled.vocabulary_tile(counted)):
        found.update([(counted, s.C, b - a)] + [(counted, b - a, s.C)] * gradient)
    return found


def _query_tiles(s: _Sizes) -> Iterable[tuple[int, int]]:
    """(stacked queries, visible keys) of each tile of every key/value head."""
    groups = s.config.num_key_value_heads
    share = s.config.num_attention_heads // groups
    bounds = list(tiled.tiles(s.T, tiled.query_tile(share, s.T)))
    return [((b - a) * share, b) for a, b in bounds] * (s.N * groups)


def _tiled_attention(s: _Sizes, backward: bool = False) -> Gemms:
    """As _attention, with the visible keys only; the backward forms the scores again."""
    found, d = Gemms(), s.config.head_dim
    for rows, seen in _query_tiles(s):
        found.update([(rows, d, seen), (rows, seen, d)])
        if backward:
            found.update([(rows, d, seen), (seen, rows, d), (seen, rows, d)])
    return found


def _mlp_tiles(s: _Sizes) -> list[int]:
    bounds = tiled.tiles(s.config.intermediate_size, tiled.mlp_width(s.M))
    return [b - a for a, b in bounds]


def _tiled_mlp(s: _Sizes) -> Gemms:
    found = Gemms({(s.M, s.C, s.R): 2}) + Gemms({(s.M, s.R, s.C): 1})
    for w in _mlp_tiles(s):
        found.update([(s.M, s.C, w), (s.M, s.R, w)] * 2 + [(s.M, w, s.C), (s.M, w, s.R)])
    return found


def _tiled_mlp_bwd(s: _Sizes, kept: bool) -> Gemms:
    """dz of a tile, its two shares of dx, its LoRA gradients; h and dh around them; gate and up."""
    again = 0 if kept else 2
    found = Gemms({(s.M, s.C, s.R): 4 + again, (s.M, s.R, s.C): 2, (s.C, s.M, s.R): 1})
    found[s.R, s.M, s.C] += 2
    for w in _mlp_tiles(s):
        found.update([(s.M, s.C, w), (s.M, s.R, w)] * (1 + again) + [(s.M, w, s.R)] * 3)
        found.update([(s.M, w, s.C), (w, s.M, s.R)] * 2 + [(s.R, s.M, w)])
    return found


def _plain_bwd(s: _Sizes, checkpoints: str) -> Gemms:
    return _linear_bwd(s, *PROJECTIONS, h=False) + _attention_bwd(s)


def _mesp_bwd(s: _Sizes, checkpoints: str) -> Gemms:
    """The block once more, q, k and v once more after that, and every h."""
    rebuilt = _block(s) + _linear(s, *_QKV)
    return rebuilt + _linear_bwd(s, *PROJECTIONS, h=True) + _attention_bwd(s)


def _half(s: _Sizes) -> Gemms:
    """The attention half of a block: q, k, v, attention, o_proj."""
    return _linear(s, *_QKV, "o_proj") + _tiled_attention(s)


def _mesp_tiled_bwd(s: _Sizes, checkpoints: str) -> Gemms:
    """The MLP from its input, which in RAM is computed again; q, k, v and attention again."""
    kept, again = checkpoints == "offload", _half(s) if checkpoints == "ram" else Gemms()
    rebuilt = Gemms() if kept else _linear(s, *_QKV) + _tiled_attention(s)
    projections = _linear_bwd(s, *_QKV, "o_proj", h=True)
    return again + _tiled_mlp_bwd(s, kept) + rebuilt + _tiled_attention(s, True) + projections


def _chunks(s: _Sizes) -> list[tuple[_Sizes, int, int]]:
    """Each chunk of mesp_streamed: its sizes, the tokens before it, and its counted rows."""
    found = []
    for rows, tokens in chunks((s.N, s.T), CHUNK):
        n, t = rows.stop - rows.start, tokens.stop - tokens.start
        here = _Sizes(s.config, n, t, s.R)
        found.append((here, tokens.start, n * (t - (tokens.stop == s.T))))
    return found


def _streamed_attention(s: _Sizes, before: int, backward: bool = False) -> Gemms:
    """As _tiled_attention of a chunk that sees `before` earlier keys, too, some at a time."""
    found, d, groups = Gemms(), s.config.head_dim, s.config.num_key_value_heads
    share, most = s.config.num_attention_heads // groups, max(s.T, min(KEYS, before))
    for a, b in tiled.tiles(s.T, tiled.query_tile(share, most)):
        earlier = [min(KEYS, before - start) for start in range(0, before, KEYS)]
        for seen in [b, *earlier] * (s.N * groups):
            rows = (b - a) * share
            found.update([(rows, d, seen), (rows, seen, d)])
            if backward:
                found.update([(rows, d, seen), (seen, rows, d), (seen, rows, d)])
    return found


def _mesp_streamed(s: _Sizes) -> Gemms:
    """Chunk by chunk: the attention half and the MLP."""
    found = Gemms()
    for here, before, _ in _chunks(s):
        found += _linear(here, *_QKV, "o_proj") + _streamed_attention(here, before)
        found += _tiled_mlp(here)
    return found


def _mesp_streamed_bwd(s: _Sizes, checkpoints: str) -> Gemms:
    """Chunk by chunk: the MLP from its input, q, k and v again; what attention gave was kept."""
    found = Gemms()
    for here, before, _ in _chunks(s):
        found += _tiled_mlp_bwd(here, False) + _streamed_attention(here, before, True)
        found += _linear(here, *_QKV) + _linear_bwd(here, *_QKV, "o_proj", h=True)
    return found


_FORWARDS: dict[str, Callable[[_Sizes], Gemms]] = {
    "store_all": _block,
    "mebp": _block,
    "mesp": _block,
    "mesp_tiled": lambda s: _half(s) + _tiled_mlp(s),
    "mesp_streamed": _mesp_streamed,
    "mezo": _block,
}
_BACKWARDS: dict[str, Callable[[_Sizes, str], Gemms]] = {
    "store_all": _plain_bwd,
    "mebp": lambda s, checkpoints: _block(s) + _plain_bwd(s, checkpoints),
    "mesp": _mesp_bwd,
    "mesp_tiled": _mesp_tiled_bwd,
    "mesp_streamed": _mesp_streamed_bwd,
    "mezo": lambda s, checkpoints: Gemms(),
}


# Time

PROBE: Gemms = Gemms({(256, 896, 4864): 2, (256, 4864, 896): 1})  # the MLP of the 0.5B shape
_SHARE = 0.01  # a probe leaves out shapes with less than this share of the FLOPs
_LEAST = 0.02  # seconds that each shape of a probe is repeated for


def gemm_rate(products: Gemms = PROBE, clock: Callable[[], float] = time.perf_counter) -> float:
    """FLOP/s of this BLAS on the products of a step: float32, x·Wᵀ with W as stored, into scratch.

    Each shape with at least 1% of the FLOPs is timed alone, its median of several calls counts as
    often as the step does it: Σ FLOPs / Σ seconds.
    """
    whole, work, seconds = total_flops(products), 0, 0.0
    for (m, k, n), count in products.items():
        size = 2 * m * k * n * count
        if size >= _SHARE * whole:
            work += size
            seconds += count * _gemm_seconds(m, k, n, clock)
    return work / seconds


def _gemm_seconds(m: int, k: int, n: int, clock: Callable[[], float]) -> float:
    x, w, out = (np.full(shape, 0.5, np.float32) for shape in ((m, k), (n, k), (m, n)))
    seconds: list[float] = []
    while len(seconds) < 4 or sum(seconds) < _LEAST:
        begin = clock()
        np.matmul(x, w.T, out=out)
        seconds.append(clock() - begin)
    return median(seconds[1:])


class Timed(NamedTuple):
    """What `interleaved` found, round by round."""

    seconds: dict[str, list[float]]
    rates: dict[str, list[float]]  # FLOP/s of the GEMM probe taken right after each timing

    def median(self, name: str) -> float:
        return median(self.seconds[name])

    def ratio(self, name: str, to: str) -> float:
        """Ratio of medians."""
        return self.median(name) / self.median(to)


def interleaved(
    functions: Mapping[str, Callable[[], Any]],
    rounds: int,
    warmup: int = 1,
    probes: Mapping[str, Gemms] | None = None,
    report: Callable[[str], object] = lambda line: None,
    clock: Callable[[], float] = time.perf_counter,
    probe_clock: Callable[[], float] | None = None,
    before: Mapping[str, Callable[[], Any]] | None = None,
) -> Timed:
    """Seconds of each function, called in turns: a slow minute slows all of them.

    Every round starts with another function. After each call a GEMM probe with the shapes
    `probes[name]` (or PROBE) tells what the machine did at that moment, by `probe_clock` or the same.
    What stands in `before` is called ahead of a function, and not timed.
    """
    probes, names = probes or {}, list(functions)
    timed = Timed({name: [] for name in names}, {name: [] for name in names})
    for turn in range(-warmup, rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            if before and name in before:
                before[name]()
            begin = clock()
            functions[name]()
            seconds = clock() - begin
            if turn < 0:
                continue
            timed.seconds[name].append(seconds)
            timed.rates[name].append(gemm_rate(probes.get(name, PROBE), probe_clock or clock))
            rate = timed.rates[name][-1] / 1e9
            report(f"round {turn + 1}/{rounds}  {name}: {seconds:.3f} s, GEMM {rate:.0f} GFLOP/s")
    return timed


# What is run


def random_weights(config: Qwen2Config, seed: int = 0, std: float = 0.02) -> dict[str, Array]:
    """Seeded float32 weights in which nothing is trivial: norms near 1, biases not 0."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for name, shape in config.weight_shapes().items():
        w = rng.standard_normal(shape, dtype=np.float32)
        w *= np.float32(std)
        if name.endswith("norm.weight"):
            w += 1
        arrays[name] = w
    return arrays


def model_and_batch(
    shape: str | Qwen2Config, seq: int, rank: int = 8, seed: int = 0, batch: int = 1
) -> tuple[Model, Adapter, Array, Array]:
    """Random float32 model in memory, adapter with B ≠ 0, ids and labels [batch, seq]."""
    config = SHAPES[shape] if isinstance(shape, str) else shape
    model = Model(config, random_weights(config, seed))
    return model, *adapter_and_batch(config, seq, rank, seed, batch)


def adapter_and_batch(
    config: Qwen2Config, seq: int, rank: int = 8, seed: int = 0, batch: int = 1
) -> tuple[Adapter, Array, Array]:
    """Adapter with B ≠ 0, ids and labels [batch, seq]; every label is counted."""
    adapter = init_lora(config, rank, seed=seed, b_std=0.02)
    ids = np.random.default_rng(seed).integers(0, config.vocab_size, (batch, seq))
    return adapter, ids, ids.copy()


# Reports


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; the first column is text, the others are aligned right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def write_report(path: str | Path, text: str) -> None:
    """Write a report, whole or not at all, with one newline at its end."""
    with write_aside(path) as aside:
        aside.write_text(text.strip() + "\n", encoding="utf-8")


def save_figure(figure: Any, path: str | Path) -> None:
    """Write a matplotlib figure as PNG, without a date, so that equal pictures are equal files.

    Its metadata hold what it shows, so that a test can compare it with today's numbers.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL.PngImagePlugin import PngInfo

    FigureCanvasAgg(figure)
    held = PngInfo()
    held.add_text("Description", drawn(figure), zip=True)
    with write_aside(path) as aside:
        figure.savefig(aside, format="png", dpi=120, pil_kwargs={"pnginfo": held})


def drawn(figure: Any) -> str:
    """What a figure shows as JSON: every line, bar, mark and word, numbers to five digits."""
    panels = [
        {
            "title": axes.get_title(), "x": axes.get_xlabel(), "y": axes.get_ylabel(),
            "lines": [
                [line.get_label().lstrip("_"), *map(_digits, line.get_data(orig=True))]
                for line in axes.lines
            ],
            "bars": [_digits(bar.get_bbox().bounds) for bar in axes.patches if hasattr(bar, "get_bbox")],
            "marks": [
                _digits(np.ravel(marks.get_offsets() if len(marks.get_offsets()) > 1 else [
                    v for path in marks.get_paths() for v in path.vertices
                ])) for marks in axes.collections
            ],
            "words": [text.get_text() for text in axes.texts],
        }
        for axes in figure.axes
    ]  # fmt: skip
    return json.dumps(panels, ensure_ascii=True)


def _digits(values: Iterable[Any]) -> list[str]:
    return [v if isinstance(v, str) else f"{float(v):.5g}" for v in values]
