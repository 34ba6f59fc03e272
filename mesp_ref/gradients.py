"""The front door: the gradients of a batch by any method, and a trace of every intermediate."""

from typing import Any

from mesp_ref.checkpoints import Checkpoints, open_checkpoints
from mesp_ref.errors import MespRefError
from mesp_ref.inputs import check_batch
from mesp_ref.lora import Adapter, check_adapter
from mesp_ref.methods import METHODS, Gradients, OnGradients, Step, store_all
from mesp_ref.model import EMBEDDING, Model, layers
from mesp_ref.ops import Array
from mesp_ref.weights import ArrayWeights


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
    checkpoints: str = "ram",
) -> tuple[float, Gradients]:
    """Loss of one batch and its gradients: the one front door to every method.

    Loss      mean cross entropy of the next token over labels ≠ −100; labels are shifted inside
    Shapes    input_ids, labels [N, T] integers; right padding through labels of −100
    Returns   the loss and {name: gradient}: PEFT names, and with trainable="all" also the Hugging
              Face name of every base weight, each gradient of its tensor's shape and dtype
    method    "store_all", "mebp" and "mesp" are exact and agree bit for bit; "mezo" estimates from
              `seed` and `eps`
    on_gradients(layer, grads) receives each block's gradients once dx has been formed from the old
              parameters, so it may update them in place; the returned dict is then empty. Layer −1
              is the embedding, num_hidden_layers the final norm and head.
    checkpoints   "ram", or "disk" for a mapped temporary file (mebp, mesp)

    Raises MespRefError for an unknown method, ids outside the vocabulary, a foreign adapter
    """
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
    grads: Gradients = {}
    with open_checkpoints(checkpoints) as stack:
        step = new_step(
            model, adapter, *check_batch(model.config, input_ids, labels), stack,
            on_gradients or (lambda number, found: grads.update(found)),
            params=trainable == "all",
        )  # fmt: skip
        if method == "mezo":
            step = step._replace(parameters=_parameters(step), seed=seed, eps=eps)
        loss = METHODS[method](step)
    return loss.item(), grads


def new_step(
    model: Model,
    adapter: Adapter | None,
    ids: Array,
    labels: Array,
    stack: Checkpoints,
    emit: OnGradients,
    *,
    params: bool,
) -> Step:
    """A step of a checked batch [N, T], ready for a method."""
    blocks = layers(model, adapter, 0, ids.shape[1])
    return Step(model, adapter, ids, labels, blocks, params, emit, stack)


def _parameters(step: Step) -> dict[int, Gradients]:
    """The arrays that mezo perturbs, by the number under which their gradients are handed over."""
    named: Gradients = {}
    model, adapter = step.model, step.adapter
    if step.params:
        if not isinstance(model.weights, ArrayWeights):
            raise MespRefError(
                "model: found mapped read-only weights, expected arrays in memory for mezo with "
                "trainable='all'; pass mr.read_into_memory(model)"
            )
        named |= model.weights.arrays
    if adapter is not None:
        named |= adapter.weights
    blocks: dict[int, Gradients] = {}
    for name, array in named.items():
        if array.dtype.kind == "c":
            raise MespRefError(f"{name}: found {array.dtype}, expected float32 or float64 for mezo")
        blocks.setdefault(_number(name, model), {})[name] = array
    return blocks


def _number(name: str, model: Model) -> int:
    """The block a tensor belongs to: −1 is the embedding, num_hidden_layers the norm and head."""
    if ".layers." in name:
        return int(name.split(".layers.")[1].split(".")[0])
    return -1 if name == EMBEDDING else model.config.num_hidden_layers


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

    with open_checkpoints("ram") as stack:
        step = new_step(model, adapter, ids, targets, stack, emit, params=True)
        store_all(step._replace(tap=named.__setitem__))
    return named
