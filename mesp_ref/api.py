"""What users import: logits, loss, the gradients of a batch by any method, a trace of every tensor."""

import math
import shutil
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np

from mesp_ref import ops
from mesp_ref.engine.adapter import Adapter
from mesp_ref.engine.half import Gradients
from mesp_ref.engine.init import arrays_in_memory, check_adapter
from mesp_ref.engine.inputs import apart, check_batch, check_ids, check_positions, finite
from mesp_ref.engine.methods import OnGradients, Step, store_all
from mesp_ref.engine.mezo import perturbation_seeds
from mesp_ref.engine.model import Model, hidden_states, shift
from mesp_ref.engine.positions import layers
from mesp_ref.errors import MespRefError
from mesp_ref.lean.activations import open_checkpoints
from mesp_ref.lean.chunks import LARGEST_CHUNK, chunk_rows
from mesp_ref.lean.steps import METHODS, by_block, new_step
from mesp_ref.lean.workers import hire
from mesp_ref.memory import SCHEDULES, Base, Choice, Schedule, Shapes, choose, parse_size
from mesp_ref.ops import Array


def loss_and_grads(
    model: Model,
    adapter: Adapter | None,
    input_ids: Any,
    labels: Any,
    method: str = "mesp",
    trainable: str = "lora",
    seed: int = 0,
    eps: float = 1e-3,
    on_gradients: OnGradients | None = None,
    checkpoints: str | None = None,
    perturbations: int = 1,
    workers: int = 1,
    position_ids: Any = None,
    probe: Callable[[Step], list[list[float]]] | None = None,
    chunk: int | None = None,
) -> tuple[float, Gradients]:
    """Loss of one batch and its gradients: the one front door to every method.

    Loss      mean cross entropy of the next token over labels ≠ −100; labels are shifted inside
    Shapes    input_ids, labels [N, T] integers; right padding through labels of −100
    Returns   the loss and {name: gradient}: PEFT names, and with trainable="all" also the Hugging
              Face name of every base weight, each gradient of its tensor's shape and dtype
    method    "store_all", "mebp" and "mesp" are exact and with as many workers agree bit for bit,
              "mesp_tiled" and "mesp_streamed" up to the order of sums; "mezo" estimates from `seed` and
              `eps`, as a mean over `perturbations` seeds (`perturbation_seeds`), 2 forwards each: see
              `expected_cosine`
    on_gradients(layer, grads) receives each block's gradients once dx has been formed from the old
              parameters, so it may update them in place; the returned dict is then empty. Layer −1
              is the embedding, num_hidden_layers the final norm and head.
    checkpoints   "ram", or "disk" for a temporary file (mebp, mesp, mesp_tiled, and mesp_streamed, which
              takes it where nothing is said); with "offload"
              that of mesp_tiled takes q, k, v, the attention output, gate and up, too, and no
              projection is computed again. At 0.5B the file is 7.6 times as large and a fifth of the
              arithmetic is saved: faster while the file finds room in the system's page cache
    position_ids   [N, T] where rows hold several documents: each begins anew at 0. Documents do not see
              each other, and the first token of each is nobody's target: the gradients are those of
              the documents apart
    workers   threads that share each block (its attention at most num_key_value_heads of them) and the
              head, with one BLAS thread each; a base weight's gradient in head and embedding is one
              thread's. They decide the order of sums, and so the last bits
    chunk     of mesp_streamed: rows at once, by default 256 for each worker, and at least 512 where
              weights are decoded, which happens once a chunk. Its memory depends on this and not on T;
              where one chunk holds all rows, its bits are those of mesp_tiled
    probe     of mezo, in place of its forwards: returns the two losses of each seed, as
              engine.mezo.two_sided_losses does, or none: then no estimate is formed

    Raises MespRefError for an unknown method, ids outside the vocabulary, a foreign adapter, and where
    the file of mesp_streamed finds no room
    """
    _check_way(model, adapter, method, trainable, eps)
    check_perturbations(perturbations, method)
    check_workers(workers)
    check_offload(checkpoints, method)
    check_chunk(chunk, method)
    ids, targets = check_batch(model.config, input_ids, labels)
    positions = check_positions(position_ids, ids.shape)
    grads: Gradients = {}
    with open_checkpoints(place_of(checkpoints, method)) as stack, hire(workers) as team:
        step = new_step(
            model, adapter, ids, targets,
            on_gradients or (lambda number, found: grads.update(found)),
            params=trainable == "all", method=method, stack=stack, workers=team, positions=positions,
            chunk=chunk or rows_at_once(model, workers),
        )  # fmt: skip
        if method == "mezo":
            seeds = perturbation_seeds(seed, perturbations)
            step = step._replace(parameters=_parameters(step), seeds=seeds, eps=eps, probe=probe)
        loss = METHODS[method](step)
    return np.asarray(loss).item(), grads  # a scalar's own item() looks itself up by a new string


def _check_way(
    model: Model, adapter: Adapter | None, method: str, trainable: str, eps: float
) -> None:
    """Raise MespRefError for a method, a set of parameters or an eps that there is not."""
    if method not in METHODS:
        raise MespRefError(f"method: found {method!r}, expected one of {', '.join(METHODS)}")
    if trainable not in ("lora", "all"):
        raise MespRefError(f"trainable: found {trainable!r}, expected 'lora' or 'all'")
    if trainable == "lora" and adapter is None:
        raise MespRefError("adapter: found None, expected an adapter for trainable='lora'")
    if adapter is not None:
        check_adapter(adapter, model.config)
    if not eps > 0:
        raise MespRefError(f"eps: found {eps!r}, expected a positive number")


def check_perturbations(perturbations: int, method: str) -> None:
    """Raise MespRefError for fewer perturbations than one, or for several without mezo."""
    if perturbations < 1:
        raise MespRefError(f"perturbations: found {perturbations}, expected at least 1")
    if perturbations > 1 and method != "mezo":
        raise MespRefError(
            f"perturbations: found {perturbations} with {method}, expected 1: only mezo averages"
        )


def check_workers(workers: int) -> None:
    """Raise MespRefError for fewer workers than one."""
    if workers < 1:
        raise MespRefError(f"workers: found {workers}, expected at least 1")


def check_offload(checkpoints: str | None, method: str) -> None:
    """Raise MespRefError for "offload" where nothing but block inputs can lie on disk."""
    if checkpoints == "offload" and method != "mesp_tiled":
        raise MespRefError(
            f"checkpoints: found 'offload' with {method}, expected 'ram' or 'disk': only mesp_tiled "
            "offloads activations"
        )


def check_chunk(chunk: int | None, method: str) -> None:
    """Raise MespRefError for chunks of no rows, or of so many, or for another method than theirs."""
    if chunk is None:
        return
    if method != "mesp_streamed":
        raise MespRefError(
            f"chunk: found {chunk} with {method}, expected none: only mesp_streamed has chunks"
        )
    if not 1 <= chunk <= LARGEST_CHUNK:
        raise MespRefError(f"chunk: found {chunk}, expected 1 to {LARGEST_CHUNK} rows")


def place_of(checkpoints: str | None, method: str) -> str:
    """Where checkpoints are, also where nobody says: in a file where that is the method's point."""
    return checkpoints or ("disk" if method == "mesp_streamed" else "ram")


def rows_at_once(model: Model, workers: int = 1) -> int:
    """Rows of a chunk of mesp_streamed where nobody says."""
    store = Base.of(model.weights, model.head).matrices
    return chunk_rows(bool(store.decoded(1, itemsize=model.dtype.itemsize)), workers)


def step_shapes(
    model: Model, adapter: Adapter, batch: int, tokens: int, workers: int = 1
) -> Shapes:
    """What the prediction of memory knows of a step on [batch, tokens] ids."""
    return Shapes(
        model.config, batch, tokens, adapter.rank, adapter.targets,
        itemsize=model.dtype.itemsize, base=Base.of(model.weights, model.head), workers=workers,
    )  # fmt: skip


def choose_schedule(
    model: Model,
    adapter: Adapter,
    shape: tuple[int, int],
    limit: int | str,
    *,
    hold_gradients: bool = False,
    workers: int = 1,
    schedule: Schedule | None = None,
    packed: bool = False,
    name: str = "memory_limit",
) -> Choice:
    """The fastest exact method, and place for its checkpoints, whose step keeps a memory limit.

    A temporary file must find room, too, where such files lie: in TMPDIR, which should not be a tmpfs,
    whose files are memory.

    Shapes    `shape` is that of input_ids, [N, T]
    limit     bytes above weights, LoRA parameters and optimiser state: 64_000_000, "64MB", "64MiB"
    hold_gradients   whether all LoRA gradients live until the step's end, as without on_gradients
    workers   that would share the blocks
    schedule  the only one to be considered, whatever room there is
    packed    whether rows hold several documents, kept apart by position_ids
    Use       method, checkpoints = choose_schedule(...).schedule, both for loss_and_grads

    Raises MespRefError for a malformed limit, and for one that nothing keeps: what would fit
    """
    shapes = step_shapes(model, adapter, *shape, workers)._replace(packed=packed)
    return choose(
        shapes, parse_size(limit, name), hold_gradients=hold_gradients, name=name,
        schedules=[schedule] if schedule else SCHEDULES,
        room=math.inf if schedule else _room_for_files(),
    )  # fmt: skip


def _room_for_files() -> int:
    """Bytes free where temporary files lie; 0 where there is no such place."""
    try:
        return shutil.disk_usage(tempfile.gettempdir()).free
    except OSError:
        return 0


def _parameters(step: Step) -> dict[int, Gradients]:
    """The arrays that mezo perturbs, by the number under which their gradients are handed over."""
    named: Gradients = {}
    model, adapter = step.model, step.adapter
    if step.params:
        named |= arrays_in_memory(model.weights, "mezo with trainable='all'")
    if adapter is not None:
        named |= adapter.weights
    for name, array in named.items():
        if array.dtype.kind == "c":
            raise MespRefError(f"{name}: found {array.dtype}, expected float32 or float64 for mezo")
    return by_block(named, model)


def trace(model: Model, adapter: Adapter | None, input_ids: Any, labels: Any) -> Gradients:
    """Every named intermediate of one step, forward and backward, in execution order.

    Names     a tensor has the name of the module that puts it out, model.layers.0.self_attn.q_proj;
              what an op holds inside stands behind it: ….attention.p, ….q_proj.h, ….swiglu.silu;
              the gradient with respect to it is <name>.grad, that of a parameter <parameter>.grad
    Returns   {name: array}, from model.embed_tokens through loss to the gradients of layer 0
    Raises    MespRefError as loss_and_grads does
    """
    ids, targets = check_batch(model.config, input_ids, labels)
    named: Gradients = {}

    def emit(index: int, grads: Gradients) -> None:
        named.update({f"{name}.grad": grad for name, grad in grads.items()})

    def tap(name: str, value: Array) -> None:
        named[name] = value
        if name == "model.norm":  # lm_loss never holds the logits whole
            z, _ = ops.linear(value, model.weights[model.head])
            loss, res = ops.cross_entropy(ops.rows(z), shift(targets).reshape(-1))
            dz = ops.cross_entropy_bwd(1.0, res).reshape(z.shape)
            named.update({"lm_head": z, "loss": loss, "lm_head.grad": dz})

    step = new_step(model, adapter, ids, targets, emit, params=True)
    watched = [layer._replace(tap=tap) for layer in step.layers]
    store_all(step._replace(layers=watched, tap=tap))
    return named


def logits(model: Model, input_ids: Any, adapter: Adapter | None = None) -> Array:
    """Scores of every next token.

    Forward   z = norm(blocks(embed(ids)))·Eᵀ, with E the embedding table (tied) or lm_head
    Shapes    input_ids [N, T] -> [N, T, V] in the model's dtype
    Raises    MespRefError for ids outside the vocabulary
    """
    ids = check_ids(model.config, input_ids)
    n = hidden_states(model, ids, layers(model, adapter, 0, ids.shape[1]))
    return ops.linear(n, model.weights[model.head])[0]


def loss(
    model: Model, adapter: Adapter | None, input_ids: Any, labels: Any, position_ids: Any = None
) -> float:
    """Mean cross entropy of the next token over labels ≠ −100, forward only.

    Shapes    input_ids, labels [N, T]; labels are shifted inside, as in Hugging Face; position_ids as
              in loss_and_grads
    Raises    MespRefError as `logits` does, for labels of another shape, and for a loss that is not
              finite
    """
    ids, targets = check_batch(model.config, input_ids, labels)
    positions = check_positions(position_ids, ids.shape)
    n = hidden_states(model, ids, layers(model, adapter, 0, ids.shape[1], positions))
    w, targets = model.weights[model.head], shift(apart(targets, positions))
    value, _ = ops.lm_loss(n, w, targets, drop=frozenset({"dx"}))
    return finite("loss", value.item())
