"""Questions about bytes: when probabilities outgrow the MLP, a forgotten del, checkpoints, a step's file."""

from mesp_ref.engine.config import Qwen2Config
from mesp_ref.learn.exercise import Case, Given, Outputs, Wrong
from mesp_ref.learn.exercises.question import question, sizes
from mesp_ref.memory import Shapes, peak

_SHAPES = (
    sizes("Qwen2.5-0.5B", "H 14, G 2, D 64, C 896, F 4864", H=14, G=2, D=64, C=896, F=4864),
    sizes("small", "H 4, G 1, D 8, C 40, F 64", H=4, G=1, D=8, C=40, F=64),
    sizes("wide", "H 6, G 3, D 16, C 80, F 100", H=6, G=3, D=16, C=80, F=100),
)


def equal_length(H: int, G: int, D: int, C: int, F: int) -> float:
    """Where the square wins.

    Asked     A block holds the probabilities of attention, [H, T, T], and gate and up, [T, F] each. At which
              number of tokens T are they of the same size?
    Shapes    H, G, D, C, F numbers -> T, a number
    Answer    H·T² = 2·T·F, so T = 2·F/H
    """
    return 2 * F / H


def _length(g: Given, m: Wrong) -> Outputs:
    numbers = m.pick(2, one_of_two=1, three=3, causal=4) * m.pick(g.F, c_for_f=g.C)
    heads = m.pick(g.H, groups=g.G, d_for_h=g.D, c_for_h=g.C, no_heads=1, all_d=g.H * g.D)
    t = numbers / heads
    return {"T": m.pick(t, multiplied=numbers * heads, rooted=t**0.5, upside_down=1 / t, squared=t * t, heads_over=heads / numbers * numbers)}  # fmt: skip


EQUAL_LENGTH = question(
    equal_length,
    "the length at which probabilities outgrow gate and up",
    outputs="T",
    cases=_SHAPES,
    formula=_length,
    hints=("Write both as a number of entries.", "H·T·T on one side, T·F twice on the other: one T cancels."),
    mistakes={
        "one_of_two": "only one of gate and up is counted: 2·F.",
        "three": "three arrays are counted: gate and up are two.",
        "causal": "only half of the probabilities is counted, the triangle that the causal mask leaves: the whole [T, T] is held, masked entries as zeros.",
        "c_for_f": "C stands where F belongs: gate and up have F columns.",
        "groups": "G stands where H belongs: every query head has probabilities of its own.",
        "d_for_h": "the head's width D stands where the number of heads H belongs.",
        "c_for_h": "the hidden size C stands where the number of heads H belongs.",
        "no_heads": "the heads are missing: there is a [T, T] for each of H.",
        "all_d": "H·D stands where H belongs: probabilities have no entry for D.",
        "multiplied": "H multiplies where it must divide.",
        "rooted": "a root is taken: gate and up have a factor T, too, so one T cancels.",
        "upside_down": "it is upside down.",
        "squared": "it is squared: one T cancels, and T alone is left.",
        "heads_over": "it is H alone: 2·F/H.",
    },
)  # fmt: skip


def block_grads(R: int, H: int, G: int, D: int, C: int, F: int, itemsize: int) -> int:
    """One del less.

    Asked     Each loop of store_all ends with del grads. Without it the LoRA gradients of a block stay alive
              while the next block goes back. How many bytes are these?
    Shapes    rank R; q [H·D, C], k and v [G·D, C], o [C, H·D], gate and up [F, C], down [C, F] -> bytes
    Answer    R·itemsize·Σ (in + out) over the seven projections
    """
    q, kv = H * D, G * D
    return R * itemsize * (2 * (C + q) + 2 * (C + kv) + 3 * (C + F))


def _grads(g: Given, m: Wrong) -> Outputs:
    q, kv = m.pick(g.H * g.D, q_is_c=g.C), m.pick(g.G * g.D, unshared=g.H * g.D, kv_is_c=g.C)
    parts = {"q": (q, g.C), "k": (kv, g.C), "v": (kv, g.C), "o": (g.C, q), "gate": (g.F, g.C), "up": (g.F, g.C), "down": (g.C, g.F)}  # fmt: skip
    left = m.pick((), no_mlp=("gate", "up", "down"), no_attention=("q", "k", "v", "o"), one_of_two=("up",), no_down=("down",), no_o=("o",), q_v=("k", "o", "gate", "up", "down"))  # fmt: skip
    kept = [parts[name] for name in parts if name not in left]
    mlp_products = sum(
        (o * i if name in ("gate", "up", "down") else o + i) for name, (o, i) in parts.items()
    )
    both = m.pick(
        sum(o + i for o, i in kept), only_A=sum(i for _, i in kept), only_B=sum(o for o, _ in kept), products=sum(o * i for o, i in kept),
        mlp_products=mlp_products,
    )  # fmt: skip
    size = m.pick(g.itemsize, no_itemsize=1, bits=8 * g.itemsize, double=2 * g.itemsize)
    return {"bytes": m.pick(g.R, no_rank=1, rank_squared=g.R**2) * size * both}


BLOCK_GRADS = question(
    block_grads,
    "what a forgotten del costs",
    outputs="bytes",
    cases=tuple(
        Case(case.name, f"rank {r}, {b} bytes a number; {case.note}", lambda rng, case=case, r=r, b=b: {"R": r} | case.draw(rng) | {"itemsize": b})  # type: ignore[misc]
        for case, r, b in zip(_SHAPES, (8, 2, 3), (4, 8, 2), strict=True)
    ),
    formula=_grads,
    hints=("A gradient has the shape of what it belongs to: A [R, in] and B [out, R].", "Seven pairs a block, R·(in + out) numbers each."),
    mistakes={
        "unshared": "k and v are counted with H heads: they have G (shared).",
        "kv_is_c": "k and v are counted with C outputs: they have G·D, shared.",
        "q_is_c": "q and o are counted with C for H·D: that holds in some models only.",
        "no_mlp": "the MLP's three projections are missing.",
        "no_attention": "attention's four projections are missing.",
        "one_of_two": "one of the MLP's three projections is missing: gate, up and down.",
        "no_down": "one of the MLP's three projections is missing: gate, up and down.",
        "no_o": "o_proj is missing.",
        "q_v": "only q and v are counted: all seven are adapted.",
        "only_A": "only A, R·in, is counted: B has R·out.",
        "only_B": "only B, R·out, is counted: A has R·in.",
        "products": "products in·out stand where in + out belongs: these are the gradients of whole weights, not of A and B.",
        "mlp_products": "products in·out stand in the MLP where in + out belongs.",
        "no_itemsize": "the itemsize is missing: bytes are asked for, not numbers.",
        "bits": "it is in bits: bytes are asked for (8 bits each).",
        "double": "it is twice what it must be: one gradient for A and one for B is in R·(in + out).",
        "no_rank": "the rank R is missing.",
        "rank_squared": "the rank R stands twice.",
    },
)  # fmt: skip


def checkpoint_bytes(layers: int, N: int, T: int, C: int, itemsize: int) -> int:
    """What the checkpoints are.

    Asked     mesp_tiled keeps the input of every block until its backward. With checkpoints="disk" these lie
              in a mapped file. By how many bytes does the predicted peak fall?
    Shapes    blocks, N sequences of T tokens, hidden size C, bytes of a number -> bytes
    Answer    layers·N·T·C·itemsize: all inputs are held when the first backward begins
    """
    return layers * N * T * C * itemsize


def _checkpoints(g: Given, m: Wrong) -> Outputs:
    found = m.pick(g.layers, no_layers=1, one_more=g.layers + 1, one_fewer=g.layers - 1) * m.pick(
        g.N, no_batch=1
    )
    found *= m.pick(g.T, no_tokens=1, squared=g.T**2) * m.pick(g.C, no_width=1, width_is_t=g.T) * m.pick(g.itemsize, no_itemsize=1, bits=8 * g.itemsize)  # fmt: skip
    return {
        "bytes": m.pick(
            found, both_halves=2 * found, in_mb=found / 1e6, in_mib=found / 2**20, half=found / 2
        )
    }


CHECKPOINTS = question(
    checkpoint_bytes,
    "what checkpoints on disk save",
    outputs="bytes",
    cases=(
        sizes("Qwen2.5-0.5B", "24 blocks, 256 tokens, C 896, float32", layers=24, N=1, T=256, C=896, itemsize=4),
        sizes("batch", "3 blocks, 2 × 50 tokens, C 64, float64", layers=3, N=2, T=50, C=64, itemsize=8),
        sizes("wide", "7 blocks, 5 × 11 tokens, C 128, bfloat16", layers=7, N=5, T=11, C=128, itemsize=2),
    ),
    formula=_checkpoints,
    hints=("What shape has the input of a block?", "One [N, T, C] for each block."),
    mistakes={
        "no_layers": "the layers are missing: every block has an input.",
        "one_more": "one input too many (layers + 1): the output of the last block is not kept.",
        "one_fewer": "one input is missing (layers − 1): the first block's input is kept as well.",
        "no_batch": "the batch size N is missing.",
        "no_tokens": "the tokens T are missing.",
        "squared": "T stands squared: a block's input has a row for each token.",
        "no_width": "the width C is missing: each row has C numbers.",
        "width_is_t": "T stands where the width C belongs (T squared).",
        "no_itemsize": "the itemsize is missing: bytes are asked for.",
        "bits": "it is in bits: bytes are asked for (8 bits each).",
        "both_halves": "two inputs a block are counted, one for each half: one is kept.",
        "in_mb": "it is in MB (10⁶): bytes are asked for.",
        "in_mib": "it is in MiB (2²⁰): bytes are asked for.",
        "half": "it is half of what it must be.",
    },
)  # fmt: skip


def streamed_bytes(layers: int, H: int, G: int, D: int, C: int, itemsize: int) -> int:
    """A token on disk.

    Asked     mesp_streamed keeps on a file, of every block: the input of each half, k and v, attention's output,
              and one number (lse) for each head; and once for all blocks the gradients that go down, of the rows
              and of k and v. How many bytes are that for one token?
    Shapes    blocks; H, G, D, C numbers; bytes of a number -> bytes
    Answer    itemsize·(layers·(2·C + 2·G·D + H·D + H) + C + 2·G·D)
    """
    return itemsize * (layers * (2 * C + 2 * G * D + H * D + H) + C + 2 * G * D)


def _streamed(g: Given, m: Wrong) -> Outputs:
    kv = m.pick(2, one_of_kv=1) * m.pick(g.G, unshared=g.H) * g.D
    inputs = m.pick(2, one_input=1, three=3) * g.C
    block = inputs + m.pick(kv, no_kv=0) + m.pick(g.H * g.D, no_output=0, output_c=g.C) + m.pick(g.H, no_lse=0, lse_wide=g.H * g.D, one_lse=1)  # fmt: skip
    down = m.pick(g.C, no_rows=0) + m.pick(kv, no_dkv=0)
    whole = (
        m.pick(g.layers, one_block=1) * block
        + m.pick(1, each_block=g.layers, no_gradients=0) * down
    )
    return {"bytes": m.pick(g.itemsize, no_itemsize=1, bits=8 * g.itemsize) * whole}


STREAMED = question(
    streamed_bytes,
    "the file of a streamed step, for one token",
    outputs="bytes",
    cases=(
        sizes("Qwen2.5-0.5B", "24 blocks, H 14, G 2, D 64, C 896, float32", layers=24, H=14, G=2, D=64, C=896, itemsize=4),
        sizes("small", "2 blocks, H 4, G 1, D 8, C 40, float64", layers=2, H=4, G=1, D=8, C=40, itemsize=8),
        sizes("wide", "5 blocks, H 6, G 3, D 16, C 80, bfloat16", layers=5, H=6, G=3, D=16, C=80, itemsize=2),
    ),
    formula=_streamed,
    hints=("Count numbers for one block first, then what is there once.", "Two rows of C, k and v of G·D each, o of H·D, lse of H."),
    mistakes={
        "one_of_kv": "only one of k and v is counted: 2·G·D.",
        "unshared": "k and v are counted with H heads: they have G (groups), shared by the query heads.",
        "one_input": "one input a block is counted: each half has its own, 2·C.",
        "three": "three inputs a block are counted: there are two halves.",
        "no_kv": "k and v of the blocks are missing.",
        "no_output": "attention's output, H·D, is missing.",
        "output_c": "attention's output has H·D numbers, not C.",
        "no_lse": "lse is missing: one number for each of H heads.",
        "lse_wide": "lse has one number for each head, H, not H·D.",
        "one_lse": "lse has one number for each of H heads, not one for all.",
        "no_rows": "the gradient of the rows, C, is missing.",
        "no_dkv": "the gradients of k and v are missing.",
        "one_block": "the layers are missing: every block has its own rows, k, v, output and lse.",
        "each_block": "the gradients are counted once for each block: they are there once, for all layers.",
        "no_gradients": "the gradients that go down are missing: C + 2·G·D, once.",
        "no_itemsize": "the itemsize is missing: bytes are asked for.",
        "bits": "it is in bits: bytes are asked for (8 bits each).",
    },
)  # fmt: skip


def mezo_needs(config: Qwen2Config, tokens: int, disk: bool) -> int:
    """MeZO against a backward.

    Asked     How many bytes does MeZO's predicted peak lie above that of mesp_tiled (below: negative), without
              and with block inputs on disk?
    Shapes    config of a model, tokens, disk -> bytes; from mesp_ref.memory import Shapes, peak
    Answer    peak("mezo", Shapes(config, tokens=tokens)).total less peak("mesp_tiled", … disk=disk).total
    """
    zeroth = peak("mezo", Shapes(config, tokens=tokens)).total
    return zeroth - peak("mesp_tiled", Shapes(config, tokens=tokens, disk=disk)).total


def _needs(g: Given, m: Wrong) -> Outputs:
    def at(method: str, tokens: int = g.tokens, disk: bool = False) -> int:
        return peak(method, Shapes(g.config, tokens=tokens, disk=disk)).total

    disk = m.pick(g.disk, no_disk=False, always_disk=True, disk_turned=not g.disk)
    other = m.pick(
        "mesp_tiled",
        plain_mesp="mesp",
        mebp="mebp",
        store_all="store_all",
        streamed="mesp_streamed",
    )
    tokens = m.pick(g.tokens, default_tokens=256)
    a, b = at("mezo", tokens), at(other, tokens, disk)
    return {"bytes": m.pick(a - b, exchanged=b - a, mezo_alone=a, tiled_alone=b, in_mb=(a - b) / 1e6, in_mib=(a - b) / 2**20, ratio=a / b, yes_or_no=float(a > b), absolute=abs(a - b))}  # fmt: skip


def _config(name: str, note: str, tokens: int, disk: bool) -> Case:
    shape = Qwen2Config(256, 32, 88, 3, 4, 2, 8)
    return Case(name, note, lambda rng: {"config": shape, "tokens": tokens, "disk": disk})


NEEDS = question(
    mezo_needs,
    "MeZO's peak beside that of an exact backward",
    outputs="bytes",
    cases=(
        _config("memory", "3 blocks, 96 tokens, in RAM", 96, False),
        _config("disk", "3 blocks, 32 tokens, block inputs on disk", 32, True),
        _config("long", "3 blocks, 300 tokens, block inputs on disk", 300, True),
    ),
    formula=_needs,
    numbers=lambda g: {"tokens": g.tokens},
    given="from mesp_ref.memory import Shapes, peak\npeak(method, Shapes(config, tokens=…, disk=…)).total  bytes at the predicted peak",
    hints=("Both peaks come from the same function; only one of them knows of disk.", 'peak("mezo", Shapes(config, tokens=tokens)).total, and the other with disk=disk.'),
    mistakes={
        "no_disk": "disk is not handed on to mesp_tiled's shapes.",
        "always_disk": "disk is taken as True always.",
        "disk_turned": "disk is taken the other way round.",
        "plain_mesp": "mesp is compared, not mesp_tiled.",
        "mebp": "mebp is compared, not mesp_tiled.",
        "store_all": "store_all is compared, not mesp_tiled.",
        "streamed": "mesp_streamed is compared, not mesp_tiled.",
        "default_tokens": "the tokens are not handed on: Shapes takes 256 where nothing is said.",
        "exchanged": "the two are exchanged: the sign is wrong. MeZO's peak less that of mesp_tiled.",
        "mezo_alone": "this is MeZO's peak itself: the difference is asked for.",
        "tiled_alone": "this is mesp_tiled's peak itself: the difference is asked for.",
        "in_mb": "it is in MB (10⁶): bytes are asked for.",
        "in_mib": "it is in MiB (2²⁰): bytes are asked for.",
        "ratio": "the peaks are divided: their difference is asked for.",
        "yes_or_no": "it is True or False: the difference is asked for, a number of bytes.",
        "absolute": "the sign is lost: negative where MeZO needs less.",
    },
)  # fmt: skip
