"""Products of matrices that read TF32, as tensor cores read a float32 unless they are told otherwise.

TF32 keeps 10 of the 23 bits behind a float32's point. cuBLAS and XLA round to the nearest TF32 number;
Triton's tl.dot hands float32 numbers over as they are, and the hardware cuts the other 13 bits off.
No mistake in a formula, and far outside what float32 allows: the first thing a GPU shows.
"""

from collections.abc import Callable, Sequence

import numpy as np

from mesp_ref.golden.answer import Answer
from mesp_ref.golden.plain import Arrays, Plain, flat
from mesp_ref.golden.relations import listed
from mesp_ref.ops import Array

EXACT = 0.1  # of its error, by norm, a tensor may keep and count as explained
FEW = 4  # numbers, of which an error may look like another by chance
LARGER = 5.0  # times the error that TF32 makes, by norm, no error may be


def cut(x: Array) -> Array:
    """The lower 13 bits of every float32 cleared."""
    bits = np.asarray(x, np.float32).view(np.uint32) & np.uint32(0xFFFFE000)
    return bits.view(np.float32).astype(np.float64)


def nearest(x: Array) -> Array:
    """Every float32 as the nearest number of TF32, ties to even."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    bits = bits + np.uint32(0xFFF) + ((bits >> np.uint32(13)) & np.uint32(1))
    return cut(bits.view(np.float32))


class ReadsTf32(Plain):
    """A step whose products of matrices read `read` of their operands."""

    read: Callable[[Array], Array] = staticmethod(nearest)

    def scores(self, q: Array, k: Array) -> Array:
        return super().scores(self.read(q), self.read(k))

    def mixed(self, p: Array, v: Array) -> Array:
        return super().mixed(self.read(p), self.read(v))

    def linear(self, x: Array, w: Array, b: Array | None) -> Array:
        return super().linear(self.read(x), self.read(w), b)

    def linear_bwd(self, dy: Array, w: Array) -> Array:
        return super().linear_bwd(self.read(dy), self.read(w))

    def linear_params(self, dy: Array, x: Array) -> tuple[Array, Array]:
        dw, _ = super().linear_params(self.read(dy), self.read(x))
        return dw, flat(dy).sum(axis=0)

    def lora(self, x: Array, w: Array, b: Array | None, A: Array, B: Array) -> Array:
        h = self.keep(f"{self.at}.h", self.read(x) @ self.read(A).T)
        return self.linear(x, w, b) + self.scale() * (self.read(h) @ self.read(B).T)

    def lora_bwd(self, dy: Array, x: Array, w: Array, A: Array, B: Array) -> tuple[Array, ...]:
        read, s = self.read, self.scale()
        dh, h = s * (read(dy) @ read(B)), read(x) @ read(A).T
        dx = self.add("frozen weight", read(dh) @ read(A), self.linear_bwd(dy, w))
        return dx, flat(read(dh)).T @ flat(read(x)), s * (flat(read(dy)).T @ flat(read(h)))


class Online(ReadsTf32):
    """The same in FlashAttention's order: o = (e·v)/Σe with e = exp(s − max s), and Σ dp·p as o·do."""

    def attention(self, q: Array, k: Array, v: Array) -> tuple[Array, Array]:
        p = self.keep("self_attn.attention.p", self.softmax(q, self.share(k)))
        top = p.max(axis=-1, keepdims=True)
        e = p / np.where(top > 0, top, 1)
        total = e.sum(axis=-1, keepdims=True).swapaxes(1, 2)
        self.o = self.mix(e, self.share(v)) / np.where(total > 0, total, 1)
        return p, self.o

    def attention_bwd(self, do: Array, q: Array, k: Array, v: Array, p: Array) -> tuple[Array, ...]:
        self.dot = (self.o * do).sum(axis=-1).swapaxes(1, 2)[..., None]
        return super().attention_bwd(do, q, k, v, p)

    def softmax_bwd(self, dp: Array, p: Array) -> Array:
        return p * (dp - getattr(self, "dot", (dp * p).sum(axis=-1, keepdims=True)))


def _kind(base: type[Plain], read: Callable[[Array], Array]) -> type[Plain]:
    return type(base.__name__, (base,), {"read": staticmethod(read)})


WAYS = (
    (nearest, "rounded to it, as cuBLAS and XLA read a float32 where that is allowed"),
    (cut, "its other bits cut off, as Triton's tl.dot hands a float32 to NVIDIA's hardware"),
)


def in_tf32(answer: Answer, run: Callable[[type[Plain]], Arrays]) -> list[str]:
    """The sentence where TF32 explains a float32 answer: a failed tensor to the digit, all in size.

    What follows a product whose operand fell on the other side of a rounding cannot be told to the
    digit: of those only the size must be that of TF32's errors.
    """
    if answer.dtype != "float32":
        return []
    for read, how in WAYS:
        runs = [run(_kind(base, read)) for base in (ReadsTf32, Online)]
        exact = [name for name in answer.failed if _explained(answer, name, runs)]
        if exact and all(_in_size(answer, name, runs) for name in answer.failed):
            some = (
                ""
                if len(exact) == len(answer.failed)
                else f"; {listed(exact, answer)} to the digit"
            )
            return [f"like: products of matrices in TF32, {how}{some}"]
    return []


def _off(answer: Answer, name: str, runs: Sequence[Arrays]) -> list[Array]:
    """What TF32 is off by."""
    view = answer.views.get(name, np.asarray)
    return [view(found[name]) - answer.want[name] for found in runs if name in found]


def _explained(answer: Answer, name: str, runs: Sequence[Arrays]) -> bool:
    error = answer.got[name] - answer.want[name]
    size = EXACT * np.linalg.norm(error)
    return error.size >= FEW and any(
        np.linalg.norm(error - off) <= size for off in _off(answer, name, runs)
    )


def _in_size(answer: Answer, name: str, runs: Sequence[Arrays]) -> bool:
    size = np.linalg.norm(answer.got[name] - answer.want[name])
    return any(size <= LARGER * np.linalg.norm(off) for off in _off(answer, name, runs))
