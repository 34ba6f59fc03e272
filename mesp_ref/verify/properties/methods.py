"""The exact methods are one function computed in several ways."""

from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np

from mesp_ref import ops
from mesp_ref.api import loss_and_grads, trace
from mesp_ref.engine.adapter import Adapter
from mesp_ref.engine.block import MESP, block, block_bwd
from mesp_ref.engine.config import PROJECTIONS, Qwen2Config
from mesp_ref.engine.half import copied
from mesp_ref.engine.model import NORM, Model, embed, shift
from mesp_ref.engine.positions import layers
from mesp_ref.lean import activations, chunks
from mesp_ref.ops import IGNORED, NOTHING, Array
from mesp_ref.train.rows import Cursor, Row
from mesp_ref.train.trainer import TrainConfig, Trainer
from mesp_ref.verify.properties.claim import agree, exactly, holds
from mesp_ref.verify.result import Finding
from mesp_ref.verify.samples import (
    FAMILY_SIZES,
    sample_adapter,
    sample_batch,
    sample_model,
    small_config,
)


@holds("model")
def methods_agree(rng: np.random.Generator) -> Iterator[Finding]:
    """mesp = mebp = store-all to the bit, checkpoints in RAM or on disk, for every tensor."""
    config = small_config()
    model, adapter = sample_model(rng, config), sample_adapter(rng, config)
    batch = sample_batch(rng, config)
    loss, grads = loss_and_grads(model, adapter, *batch, method="store_all", trainable="all")
    for method in ("mebp", "mesp"):
        for kind in ("ram", "disk"):
            value, found = loss_and_grads(
                model, adapter, *batch, method=method, trainable="all", checkpoints=kind
            )
            yield exactly("model", f"loss by {method}, {kind}", value, loss)
            for name, grad in grads.items():
                yield exactly("model", f"{name} by {method}, {kind}", found[name], grad)


@holds("model")
def microbatches_add_up(rng: np.random.Generator) -> Iterator[Finding]:
    """Gradients of microbatches, weighted with their counted tokens, are those of the batch."""
    config = small_config()
    model, adapter = sample_model(rng, config), sample_adapter(rng, config)
    ids, labels = sample_batch(rng, config, (3, 6))
    labels[0, :4] = IGNORED  # so that the sequences do not count alike
    counts = (labels[:, 1:] != IGNORED).sum(axis=1)
    loss, grads = loss_and_grads(model, adapter, ids, labels)
    parts = [loss_and_grads(model, adapter, ids[i : i + 1], labels[i : i + 1]) for i in range(3)]
    share = counts / counts.sum()
    mean = sum(w * part[0] for w, part in zip(share, parts, strict=True))
    yield agree("model", "loss", loss, mean, 16 * abs(loss))
    for name, grad in grads.items():
        total = sum(w * part[1][name] for w, part in zip(share, parts, strict=True))
        size = sum(np.abs(w * part[1][name]) for w, part in zip(share, parts, strict=True)).max()
        yield agree("model", name, grad, total, size, relative=1e-12)


@holds("model")
def packed_rows_are_documents_apart(rng: np.random.Generator) -> Iterator[Finding]:
    """Loss and gradients of a row of several documents are the weighted mean of the documents'."""
    yield from _packed(rng, small_config(), ("mesp", "mesp_tiled", "mesp_streamed"))


@holds("model")
def packed_rows_of_windows_are_documents_apart(rng: np.random.Generator) -> Iterator[Finding]:
    """The same where some layers see a window: a document's border may lie inside of it."""
    yield from _packed(rng, small_config(**FAMILY_SIZES["gemma3"]), ("mesp", "mesp_streamed"))


def _packed(
    rng: np.random.Generator, config: Qwen2Config, methods: tuple[str, ...]
) -> Iterator[Finding]:
    model, adapter = sample_model(rng, config), sample_adapter(rng, config)
    lengths = (7, 1, 4)
    ids, _ = sample_batch(rng, config, (1, sum(lengths)))
    positions = np.concatenate([np.arange(n) for n in lengths])[None]
    ends = np.cumsum(lengths)
    parts = [ids[:, end - n : end] for n, end in zip(lengths, ends, strict=True) if n > 1]
    counts = np.array([part.shape[1] - 1 for part in parts])
    apart = [loss_and_grads(model, adapter, part, part) for part in parts]
    share = counts / counts.sum()
    loss = sum(w * value for w, (value, _) in zip(share, apart, strict=True))
    for method in methods:
        options: dict[str, Any] = {"chunk": 5} if method == "mesp_streamed" else {}  # 5 6 0 0 1
        given = model, adapter, ids, ids, method
        value, grads = loss_and_grads(*given, position_ids=positions, **options)
        yield agree("model", f"loss by {method}", value, loss, 16 * abs(loss))
        for name, grad in grads.items():
            terms = [w * found[name] for w, (_, found) in zip(share, apart, strict=True)]
            size = sum(np.abs(term) for term in terms).max()
            yield agree("model", f"{name} by {method}", grad, sum(terms), size, relative=1e-12)


@holds("model")
def the_trainer_weighs_tokens(rng: np.random.Generator) -> Iterator[Finding]:
    """A training step of three batches is that of one batch of all their sequences."""
    config = small_config()
    model = sample_model(rng, config)
    ids, labels = sample_batch(rng, config, (3, 6))
    labels[0, :4] = IGNORED  # so that the sequences do not count alike
    rows = [Row(*row) for row in zip(ids, labels, strict=True)]
    together, apart = (sample_adapter(np.random.default_rng(1), config) for _ in range(2))
    for adapter, size in ((together, 3), (apart, 1)):
        plan = TrainConfig(
            optimizer="sgd", lr=0.1, schedule="constant", steps=1, clip=0.0,
            batch_size=size, accumulate=3 // size,
        )  # fmt: skip
        Trainer(model, adapter, _Rows(rows), plan).advance()
    for name, array in together.weights.items():
        size = np.abs(array).max()
        yield agree("model", name, apart.weights[name], array, size, relative=1e-12)


class _Rows:
    """A source of rows that has just these."""

    cursor = Cursor()

    def __init__(self, rows: list[Row]):
        self._rows = rows

    def take(self, count: int) -> list[Row]:
        return self._rows[:count]


@holds("model")
def a_block_keeps_what_is_not_dropped(rng: np.random.Generator) -> Iterator[Finding]:
    """h, of seven projections, as `drop` says; what is taken from a copy stays in the original."""
    config = small_config()
    model, adapter = sample_model(rng, config), sample_adapter(rng, config)
    ids, _ = sample_batch(rng, config)
    layer = layers(model, adapter, 0, ids.shape[1])[0]
    for drop, count in ((NOTHING, 7), (MESP, 0)):
        res = block(embed(model, ids), layer, drop=drop)[1]
        halves = [half.inside for half in (res.attention, res.mlp)]
        held = sum(len(half.h or ()) for half in halves)
        yield exactly("model", f"h of {count} projections", held, count)
        twin = copied(res)
        block_bwd(np.ones((*ids.shape, config.hidden_size)), twin, layer)
        kept = sum(len(half.h or ()) for half in halves)
        yield exactly("model", "h beside a copy", kept, count)
        there = [half.take("x") is not None for half in (res.attention, res.mlp)]
        yield exactly("model", "x beside a copy", np.array(there), True)


@holds("model")
def checkpoints_come_back(rng: np.random.Generator) -> Iterator[Finding]:
    """From memory or a file, of several maps and in several writes; afterwards nothing is held."""
    wanted = {"ram": (False, False), "disk": (True, False), "offload": (True, True)}
    for kind, roles in wanted.items():
        with mock.patch.multiple(activations, _ROOM=4096, _MOST=1000):
            stack = activations.open_checkpoints(kind)
            yield exactly("model", f"roles of {kind}", (stack.halves, stack.offload) == roles, True)
            arrays = [rng.standard_normal((size, 3)) for size in (5, 60, 200, 1, 170, 400, 2)]
            with stack:
                for array in arrays:
                    stack.push(array)
                for array in reversed(arrays):
                    yield exactly("model", f"array from {kind}", stack.pop(), array)
                stack.push(arrays[0])
            yield exactly("model", f"{kind} holds nothing", len(stack._stack), 0)


@holds("model")
def rooms_come_back(rng: np.random.Generator) -> Iterator[Finding]:
    """Arrays in chunks, from memory or a file of several maps; what is cleared is zero, and no more."""
    shape = 2, 9
    arrays = {name: rng.standard_normal((*shape, 40)) for name in "xkv"}
    for kind in ("ram", "disk"):
        small = mock.patch.multiple(activations, _ROOM=4096, _MOST=1000)
        with (
            small,
            mock.patch.object(chunks, "_CLEARED", 4),
            activations.open_checkpoints(kind) as stack,
        ):
            rooms = chunks.Rooms(stack, shape)
            for at in chunks.chunks(shape, 4):
                for name, array in arrays.items():
                    rooms.write(name, at, array[at])
            rooms.clear("k", slice(1, 2), arrays["k"][1:, :4])
            expected = arrays | {"k": arrays["k"] * np.array([1, 0])[:, None, None]}
            for name, array in expected.items():
                found = rooms.read(name, (slice(None), slice(None)))
                yield exactly("model", f"{name} from {kind}", found, array)


@holds("model")
def checkpoint_boundaries_do_not_matter(rng: np.random.Generator) -> Iterator[Finding]:
    """Checkpoints before some blocks only, all between run again: the bits of store-all."""
    config = small_config()
    model, adapter = sample_model(rng, config), sample_adapter(rng, config)
    ids, labels = sample_batch(rng, config)
    _, grads = loss_and_grads(model, adapter, ids, labels, method="store_all")
    for starts in ({0}, set(range(config.num_hidden_layers))):
        found = _from_checkpoints(model, adapter, ids, labels, starts)
        for name, grad in grads.items():
            yield exactly("model", f"{name}, checkpoints {sorted(starts)}", found[name], grad)


def _from_checkpoints(
    model: Model, adapter: Adapter, ids: Array, labels: Array, starts: set[int]
) -> dict[str, Array]:
    """LoRA gradients with a checkpoint before each block of `starts`, which has 0."""
    grads: dict[str, Array] = {}
    blocks = layers(model, adapter, 0, ids.shape[1])
    x, checkpoints = embed(model, ids), []
    for layer in blocks:
        if layer.number in starts:
            checkpoints.append((layer.number, x))
        x = block(x, layer)[0]
    w, w_norm, eps = (
        model.weights[model.head][...],
        model.weights[NORM][...],
        model.config.rms_norm_eps,
    )
    n, r_norm = ops.rmsnorm(x, w_norm, eps=eps)
    dn = ops.lm_loss_bwd(1.0, ops.lm_loss(n, w, shift(labels))[1], w)
    dx, stop = ops.rmsnorm_bwd(dn, r_norm, w_norm, eps=eps), len(blocks)
    for start, x in reversed(checkpoints):
        kept = []
        for layer in blocks[start:stop]:
            x, res = block(x, layer, drop=MESP)
            kept.append(res)
        for layer in reversed(blocks[start:stop]):
            dx, found = block_bwd(dx, kept.pop(), layer)
            grads |= found
        stop = start
    return grads


@holds("model")
def trace_is_complete(rng: np.random.Generator) -> Iterator[Finding]:
    """Every module is traced, with its gradient of its shape, and the weights' gradients are those
    of loss_and_grads; a bias's is the sum of its layer's."""
    config = small_config()
    model, adapter = sample_model(rng, config), sample_adapter(rng, config)
    batch = sample_batch(rng, config)
    named = trace(model, adapter, *batch)
    _, grads = loss_and_grads(model, adapter, *batch, trainable="all")
    forward = {name for name in named if not name.endswith(".grad")}
    yield exactly("model", "what is traced", forward == _traced(config.num_hidden_layers), True)
    for name, value in named.items():
        inside = name.endswith((".p", ".h", ".silu", ".grad")) or name == "loss"
        if not inside:
            grad = named.get(f"{name}.grad")
            fits = grad is not None and grad.shape == value.shape
            yield exactly("model", f"{name}.grad is traced", fits, True)
    for name, grad in grads.items():
        yield exactly("model", name, named[f"{name}.grad"], grad)
        if name.endswith(".bias"):
            output = named[f"{name.removesuffix('.bias')}.grad"]
            yield agree("model", name, grad, output.sum((0, 1)), np.abs(output).sum((0, 1)), 1e-13)


def _traced(layers: int) -> set[str]:
    """Names of all outputs of a forward."""
    parts = ["input_layernorm", "post_attention_layernorm", "after_attention"]
    parts += [f"self_attn.{part}" for part in ("q_rope", "k_rope", "attention", "attention.p")]
    for projection in PROJECTIONS.values():
        parts += [projection, f"{projection}.h"]
    parts += ["mlp.swiglu", "mlp.swiglu.silu"]
    blocks = [f"model.layers.{number}" for number in range(layers)]
    inside = {f"{block}.{part}" for block in blocks for part in parts}
    return {"model.embed_tokens", "model.norm", "lm_head", "loss", *blocks, *inside}


@holds("model")
def blocks_are_handed_over_in_order(rng: np.random.Generator) -> Iterator[Finding]:
    """on_gradients gets norm and head, then the blocks from the last, then the embedding as −1."""
    config = small_config(tied=False)
    model, adapter = sample_model(rng, config), sample_adapter(rng, config)
    for method in ("store_all", "mebp", "mesp", "mesp_tiled", "mesp_streamed"):
        numbers = _order(model, adapter, *sample_batch(rng, config), method)
        yield exactly("model", f"order of {method}", numbers == [2, 1, 0, -1], True)


def _order(model: Model, adapter: Adapter, ids: Array, labels: Array, method: str) -> list[int]:
    """The block numbers under which a method hands over its gradients."""
    numbers: list[int] = []

    def note(number: int, grads: dict[str, Array]) -> None:
        numbers.append(number)

    loss_and_grads(model, adapter, ids, labels, method, trainable="all", on_gradients=note)
    return numbers
