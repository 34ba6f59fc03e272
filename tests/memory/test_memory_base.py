"""Bases in 16, 8 and 4 bits: what decoding costs is counted, to the byte and by tracemalloc."""

import functools
import gc
from collections.abc import Callable

import numpy as np
import pytest

import mesp_ref as mr
from mesp_ref.engine.config import Qwen2Config
from mesp_ref.files.affine import Affine
from mesp_ref.files.random import write_random_checkpoint
from mesp_ref.lean.activations import KINDS
from mesp_ref.memory import PEAKS, Base, Ledger, Shapes, at, measure, peak
from mesp_ref.memory.dry_run import dry_run

PYTHON = 96 * 1024  # bytes of Python objects and small temporaries beside the arrays

# (config, batch, tokens, rank): rows of whole groups; "narrow" and "wide" peak where they decode,
# "large" has projections of attention that tiled methods decode a tile at a time
CASES = {
    "grouped": (Qwen2Config(3001, 96, 352, 3, 6, 2, 16), 1, 97, 4),
    "batch": (Qwen2Config(1201, 96, 704, 2, 3, 3, 32, tie_word_embeddings=False), 3, 50, 16),
    "narrow": (Qwen2Config(65, 256, 288, 2, 4, 2, 64), 1, 20, 4),
    "wide": (Qwen2Config(131, 128, 1312, 2, 4, 4, 32), 1, 30, 4),
    "large": (Qwen2Config(65, 1024, 96, 1, 16, 4, 80), 1, 20, 4),
}
BASES = {
    "float32": ("float32", None),
    "bfloat16": ("bfloat16", None),
    "4 bits": ("bfloat16", Affine(4, 32)),
    "4 bits, float32 scales": ("float32", Affine(4, 32)),
    "8 bits": ("float16", Affine(8, 32)),
}
PLACES_OF = {"mesp": ("ram", "disk"), "mesp_tiled": KINDS}
ALL = [
    (case, base, method, checkpoints)
    for case in CASES
    for base in BASES
    if case in ("narrow", "wide")
    or base == "4 bits"
    or (base, case != "large") == ("bfloat16", True)
    for method in PEAKS
    if case != "large" or method in ("mesp_tiled", "mesp_streamed")
    for checkpoints in KINDS
    if checkpoints in PLACES_OF.get(method, ("ram",))
]


Open = Callable[[str, str], mr.Model]


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Open:
    """Models by case and base, each written once."""

    @functools.cache
    def model_of(case: str, base: str) -> mr.Model:
        dtype, affine = BASES[base]
        path = tmp_path_factory.mktemp("base") / "model"
        write_random_checkpoint(CASES[case][0], path, dtype=dtype, affine=affine)
        return mr.load_model(path)

    return model_of


def run(model: mr.Model, case: str, method: str, checkpoints: str) -> tuple[Ledger, Shapes]:
    """The ledger of one step, LoRA left out, and its shapes."""
    config, batch, tokens, rank = CASES[case]
    adapter = mr.init_lora(config, rank=rank, b_std=0.1)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (batch, tokens))

    def step() -> None:
        mr.loss_and_grads(
            model, adapter, ids, ids, method=method, checkpoints=checkpoints,
            on_gradients=lambda layer, grads: None,
        )  # fmt: skip

    step()  # caches of Python, NumPy and the decoder fill once
    gc.collect()
    ledger = measure(step, [*adapter.weights.values(), ids], model.weights)
    found = Base.of(model.weights, model.head)
    shapes = Shapes(config, batch, tokens, rank, adapter.targets, base=found)
    return ledger, at(shapes, checkpoints)


@pytest.mark.parametrize(("case", "base"), [(c, b) for c in CASES for b in BASES])
def test_a_checkpoint_tells_its_base(opened: Open, case: str, base: str) -> None:
    """What is read from the tables is what was asked of the writer."""
    model = opened(case, base)
    assert Base.of(model.weights, model.head) == Base.uniform(CASES[case][0], *BASES[base])


def held(ledger: Ledger) -> list[tuple[str, int]]:
    return [(moment.op, moment.held) for moment in ledger.moments if moment.op != "rope_tables"]


@pytest.mark.parametrize(("case", "base", "method", "checkpoints"), ALL)
def test_decoding_is_counted(
    opened: Open, case: str, base: str, method: str, checkpoints: str
) -> None:
    """The ledger's bytes are those of ghosts at every op; tracemalloc's peak is theirs + a constant."""
    for attempt in range(2):  # a table of the interpreter that grows is not the step's
        ledger, shapes = run(opened(case, base), case, method, checkpoints)
        traced = max(max(m.between, m.traced + m.added) for m in ledger.moments)
        if traced - peak(method, shapes).total <= PYTHON or attempt:
            break
    ghosts = dry_run(method, shapes).ledger
    assert held(ghosts) == held(ledger)
    assert 0 <= traced - peak(method, shapes).total <= PYTHON, peak(method, shapes)


def test_a_float32_base_costs_nothing() -> None:
    config = CASES["grouped"][0]
    for method in PEAKS:
        plain, mapped = (Shapes(config), Shapes(config, base=Base.uniform(config, "float32")))
        assert peak(method, plain).total == peak(method, mapped).total


def test_tiled_decodes_two_tiles_of_the_mlp_at_a_time() -> None:
    """0.5B: 4-bit adds gate's and up's tile of 640 rows and the scratch of one decode: 16 MB hold."""
    config = Qwen2Config(151936, 896, 4864, 24, 14, 2, 64)
    base = Base.uniform(config, "bfloat16", Affine(4, 64))
    dense, packed = (
        next(found for found in PEAKS["mesp_tiled"](shapes) if found.op == "mlp_bwd")
        for shapes in (Shapes(config, disk=True), Shapes(config, disk=True, base=base))
    )
    tiles = 2 * 640 * 896 * 4
    chunk = 128 * 896  # a fifth of the tile is decoded at once: a byte, a float32, the scales
    scratch = 5 * chunk + chunk // 64 * 4
    assert packed.total - dense.total == tiles + scratch - 2 * 640 * 8 * 4  # in place of dB's tiles
    assert peak("mesp_tiled", Shapes(config, disk=True, base=base)).total <= 16e6
