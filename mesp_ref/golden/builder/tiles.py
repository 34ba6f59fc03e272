"""tile/: ops at sizes beyond any kernel's block, and at those where 16 bits bite.

Inputs are generated, expected values come in float64 from the op and from a second writing; of a large
tensor the suite keeps samples, projections on signs and, for 16 bits, the sums of its rows.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from mesp_ref.golden.builder.narrow import gates_of
from mesp_ref.golden.generate import made, projections, row_sums
from mesp_ref.golden.plain import Plain
from mesp_ref.golden.simulate import of_op
from mesp_ref.golden.suite import Case, Tensor, Vectors
from mesp_ref.ops import Array
from mesp_ref.registry import OPS, Sizes

Entry = dict[str, Any]
SAMPLES, LARGE = 768, 4096  # samples of a tensor with more entries than LARGE
AGREE = 1e-10  # of a tensor's largest entry, between two writings in float64; measured: 2e-13
SOURCE = "mesp_ref in float64, held against a second writing in float64 at build time"
ALL = ("float64", "float32", "float16", "bfloat16")
BITING = "16 bits: a bias of whole rows shows what is rounded on the way"


def fill(*shape: int, scale: float, offset: float = 0.0, rows: bool = False) -> Entry:
    """Numbers from −128·scale to 127·scale around an offset."""
    entry: Entry = {"kind": "numbers", "shape": list(shape), "scale": float(scale)}
    return entry | ({"offset": float(offset)} if offset else {}) | ({"rows": True} if rows else {})


def ids(*shape: int, high: int, ignored: int = 0) -> Entry:
    return {"kind": "integers", "shape": list(shape), "high": high} | (
        {"ignored": ignored} if ignored else {}
    )


UNIT, SMALL = 1 / 64, 1 / 1024
V, LOSS = 70_000, {"kind": "numbers", "shape": [], "scale": 0.0, "offset": 0.75}
# name, note, sizes, attributes, inputs
CASES: tuple[tuple[str, str, Sizes, Entry, dict[str, Entry]], ...] = (
    ("attention/usual", "T = 300, H = 4 on G = 2, D = 64",
     Sizes(n=1, t=300, past=0, g=2, share=2, d=64), {},
     {"q": fill(1, 300, 4, 64, scale=UNIT), "k": fill(1, 300, 2, 64, scale=UNIT),
      "v": fill(1, 300, 2, 64, scale=UNIT), "dy": fill(1, 300, 4, 64, scale=UNIT)}),
    ("attention/cached", "129 queries on 300 keys, H = 3 on G = 1, D = 80",
     Sizes(n=1, t=129, past=171, g=1, share=3, d=80), {},
     {"q": fill(1, 129, 3, 80, scale=UNIT), "k": fill(1, 300, 1, 80, scale=UNIT),
      "v": fill(1, 300, 1, 80, scale=UNIT), "dy": fill(1, 129, 3, 80, scale=UNIT)}),
    ("causal_softmax/usual", "300 queries on 300 keys", Sizes(n=1, t=300, past=0, g=2, share=1), {},
     {"s": fill(1, 2, 300, 300, scale=1 / 16), "dy": fill(1, 2, 300, 300, scale=UNIT)}),
    ("rmsnorm/usual", "300 rows of 1,000 channels", Sizes(n=1, t=300, c=1000), {"eps": 0.01},
     {"x": fill(1, 300, 1000, scale=UNIT), "w": fill(1000, scale=UNIT),
      "dy": fill(1, 300, 1000, scale=UNIT)}),
    ("rmsnorm/rows_and_channels", f"520 rows of 640 channels. {BITING}",
     Sizes(n=1, t=520, c=640), {"eps": 0.01},
     {"x": fill(1, 520, 640, scale=UNIT), "w": fill(640, scale=1 / 128, offset=1.0),
      "dy": fill(1, 520, 640, scale=UNIT)}),
    ("rope/usual", "300 tokens, D = 64: the tables are any numbers",
     Sizes(n=1, t=300, g=4, share=1, d=64),
     {}, {"x": fill(1, 300, 4, 64, scale=UNIT), "cos": fill(300, 32, scale=1 / 128),
          "sin": fill(300, 32, scale=1 / 128), "dy": fill(1, 300, 4, 64, scale=UNIT)}),
    ("swiglu/usual", "300 rows of 1,000, gates from −8 to 8", Sizes(n=1, t=300, f=1000), {},
     {"gate": fill(1, 300, 1000, scale=1 / 16), "up": fill(1, 300, 1000, scale=UNIT),
      "dy": fill(1, 300, 1000, scale=UNIT)}),
    ("swiglu/one_gate_a_row", f"520 rows of 640, one gate each, from 0 to 8. {BITING}",
     Sizes(n=1, t=520, f=640), {},
     {"gate": fill(1, 520, 640, scale=1 / 32, offset=4.0, rows=True),
      "up": fill(1, 520, 640, scale=UNIT), "dy": fill(1, 520, 640, scale=UNIT)}),
    ("linear/usual", "hidden 640 to 1,000", Sizes(n=1, t=300, c=640, f=1000), {},
     {"x": fill(1, 300, 640, scale=UNIT), "w": fill(1000, 640, scale=SMALL),
      "b": fill(1000, scale=UNIT), "dy": fill(1, 300, 1000, scale=UNIT)}),
    ("lora_linear/usual", "hidden 640 to 1,000, rank 17", Sizes(n=1, t=300, c=640, f=1000, r=17),
     {"s": 0.75},
     {"x": fill(1, 300, 640, scale=UNIT), "w": fill(1000, 640, scale=SMALL),
      "b": fill(1000, scale=UNIT), "A": fill(17, 640, scale=SMALL),
      "B": fill(1000, 17, scale=SMALL * 4), "dy": fill(1, 300, 1000, scale=UNIT)}),
    ("embedding/usual", "900 tokens of a vocabulary of 70,000, some repeat",
     Sizes(n=3, t=300, v=V, c=40), {},
     {"ids": ids(3, 300, high=V), "w": fill(V, 40, scale=UNIT), "dy": fill(3, 300, 40, scale=UNIT)}),
    ("cross_entropy/usual", "V = 70,000, labels across it, unequal counts",
     Sizes(n=1, t=23, v=V), {},
     {"logits": fill(23, V, scale=1 / 16, offset=-8.0) | {"ramp": 4.0},
      "labels": ids(23, high=V, ignored=4), "dy": LOSS}),
    ("lm_loss/usual", "V = 70,000, hidden 40, labels across it, unequal counts",
     Sizes(n=2, t=13, v=V, c=40), {},
     {"x": fill(2, 13, 40, scale=UNIT), "w": fill(V, 40, scale=1 / 256),
      "labels": ids(2, 13, high=V, ignored=4), "dy": LOSS}),
)  # fmt: skip


def streamed(inputs: dict[str, Entry]) -> dict[str, Entry]:
    """Every input with a stream of its own."""
    return {
        name: entry | {"stream": number} for number, (name, entry) in enumerate(inputs.items(), 1)
    }


def computed(op: str, args: dict[str, Any]) -> dict[str, Array]:
    """Output and gradients in float64, which the second writing must confirm."""
    spec, dy = OPS[op], args["dy"]
    given = dict.fromkeys(spec.optional) | {n: v for n, v in args.items() if n != "dy"}
    y, res = spec.forward(**given)
    want = {"y": np.asarray(y)} | {f"d{n}": g for n, g in spec.gradients(dy, res, given).items()}
    arrays = {n: a for n, a in args.items() if isinstance(a, np.ndarray)}
    again = of_op(op, arrays, {n: a for n, a in args.items() if n not in arrays})
    assert again is not None
    for name, value in again(Plain).items():
        error = float(np.abs(value - want[name]).max())
        if error > AGREE * float(np.abs(want[name]).max()):
            raise ArithmeticError(f"tile/{op}: {name}: two writings differ by {error:.2g}")
    return want


def make_tile(row: tuple[str, str, Sizes, Entry, dict[str, Entry]]) -> tuple[Case, Vectors]:
    """One case with samples, projections and row sums of its tensors."""
    name, note, sizes, attributes, inputs = row
    op, generated = name.split("/")[0], streamed(inputs)
    args: dict[str, Any] = {n: made(entry) for n, entry in generated.items()}
    args = {n: a.astype(np.float64) if a.dtype.kind == "f" else a for n, a in args.items()}
    want = computed(op, args | attributes)
    mag = _magnitudes(op, args | attributes)
    biting = gates_of(op, args | attributes, want) if BITING in note else {}
    vectors, tensors = Vectors({}, {}, {}, {}, {}), []
    for stream, (key, value) in enumerate(want.items()):
        tensor = _tensor(op, key, value, sizes, stream, biting.get(key, {}))
        tensors.append(tensor)
        vectors.want[key], vectors.mag[key] = tensor.sampled(value), tensor.sampled(mag[key])
        if tensor.samples:
            norms = [np.linalg.norm(mag[key]), np.linalg.norm(value)]
            vectors.whole[key] = np.append(projections(value, stream), norms)
        if tensor.biases:
            vectors.rows[key] = row_sums(value)
    dtypes = ALL[:2] if sizes.v == V else ALL
    case = Case(
        f"tile/{name}", "tile", f"tile/{name}.safetensors", note, SOURCE, dtypes,
        attributes | {"op": op}, tuple(tensors), generated,
    )  # fmt: skip
    return case, vectors


def _magnitudes(op: str, args: dict[str, Any]) -> dict[str, Array]:
    golden = OPS[op].golden
    assert golden is not None
    given = dict.fromkeys(OPS[op].optional) | {n: v for n, v in args.items() if n != "dy"}
    gradients = (golden.gradient_magnitudes or OPS[op].magnitudes)(args["dy"], given)
    forward = {n: v for n, v in given.items() if n != "first"}
    return {"y": np.asarray(golden.output_magnitude(**forward))} | {
        f"d{n}": value for n, value in gradients.items()
    }


def _tensor(
    op: str, key: str, value: Array, sizes: Sizes, stream: int, gates: dict[str, dict[str, float]]
) -> Tensor:
    spec, golden = OPS[op], OPS[op].golden
    assert golden is not None
    role = "base" if key[1:] in spec.parameters else "result"
    large = math.prod(value.shape) > LARGE
    return Tensor(
        key, value.shape, role, "forward" if key == "y" else "backward",
        spec.length(key, sizes), golden.roundings[key], {}, SAMPLES if large else 0,
        stream if large else 0, **gates,
    )  # fmt: skip


def tile_cases() -> Iterator[tuple[Case, Vectors]]:
    """Every tile case, one after the other."""
    yield from map(make_tile, CASES)
