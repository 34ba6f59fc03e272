"""torch: the forward in its functional ops, every gradient by its autograd.

It computes on torch's default device: a GPU after torch.set_default_device("cuda").
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
import torch.nn.functional as F

from mesp_ref.engine.config import SLIDING
from mesp_ref.files.config import config_of
from mesp_ref.files.models import load_model
from mesp_ref.files.peft import load_adapter
from mesp_ref.golden.backends import NotCovered
from mesp_ref.golden.positions import model_tables, tables
from mesp_ref.golden.rows import ROWS, masked
from mesp_ref.golden.simulate import in_file
from mesp_ref.golden.suite import Case
from mesp_ref.ops import Array
from mesp_ref.registry import attention, cross_entropy, rmsnorm, rope
from mesp_ref.registry.twins import torch_wide

Tensors = dict[str, torch.Tensor]


def to_torch(array: Array, dtype: torch.dtype) -> torch.Tensor:
    """Inputs are exact in every dtype, so the cast rounds nothing."""
    if array.dtype.kind == "f":
        return constant(array, dtype).requires_grad_()
    return constant(array, torch.long)


def constant(array: Array, dtype: torch.dtype) -> torch.Tensor:
    """An array on torch's default device."""
    return torch.from_numpy(np.array(array)).to(torch.get_default_device(), dtype)


def to_numpy(tensor: torch.Tensor) -> Array:
    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def compute_op(case: Case, given: Tensors) -> Tensors:
    """Output and the gradients that the case asks for."""
    attributes = dict(case.attributes)
    row, dy = ROWS.get(attributes.pop("op")), given.pop("dy")
    if row is None or row.golden is None:
        raise NotCovered
    y = row.golden.torch(torch, **given, **attributes)
    names = [tensor.name for tensor in case.tensors if tensor.name != "y"]
    grads = torch.autograd.grad(y, [given[name[1:]] for name in names], dy.to(y.dtype))
    return {"y": y} | dict(zip(names, grads, strict=True))


class Step:
    """A block or a model that records every tensor and asks autograd for its gradient."""

    local: tuple[torch.Tensor, torch.Tensor] | None = None  # cos and sin of layers with a window

    def __init__(self, case: Case, cos: torch.Tensor, sin: torch.Tensor):
        self.config, self.s = case.attributes["config"], case.attributes["s"]
        self.family = config_of(self.config)
        self.cos, self.sin, self.seen = cos, sin, Tensors()

    def keep(self, name: str, value: torch.Tensor) -> torch.Tensor:
        if value.requires_grad and not value.is_leaf:
            value.retain_grad()
        self.seen[name] = value
        return value

    def project(self, w: Tensors, at: str, part: str, x: torch.Tensor) -> torch.Tensor:
        A, B = w[f"{part}.lora_A.weight"], w[f"{part}.lora_B.weight"]
        h = self.keep(f"{at}{part}.h", F.linear(x, A))
        y = F.linear(x, w[f"{part}.weight"], w.get(f"{part}.bias"))
        return self.keep(f"{at}{part}", y + self.s * F.linear(h, B))

    def norm(self, name: str, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        if gain := self.family.traits.gain:
            w = gain + torch_wide(torch, w)
        return self.keep(name, rmsnorm.torch_twin(torch, x, w, self.config["rms_norm_eps"]))

    def head_norm(self, w: Tensors, at: str, letter: str, x: torch.Tensor) -> torch.Tensor:
        """q or k [N, T, heads, D], each head normalised in families that do so."""
        part = f"self_attn.{letter}_norm"
        return self.norm(f"{at}{part}", x, w[f"{part}.weight"]) if f"{part}.weight" in w else x

    def slides(self, at: str) -> bool:
        """Whether a layer has a window: the one of a block case, or that named model.layers.N."""
        return self.family.layer_type(int(at.split(".")[2]) if at else 0) == SLIDING

    def masks(self, at: str, tokens: int) -> tuple[Any, ...]:
        """First keys and the scale of scores, where a layer has its own."""
        window = self.family.sliding_window if self.slides(at) else None
        scale, first = self.family.attention_scale, None
        if window is not None:
            first = masked.first_keys(None, window, torch.arange(tokens))
        return () if first is None and scale is None else (first, scale)

    def attention(self, w: Tensors, at: str, n: torch.Tensor) -> torch.Tensor:
        heads = []
        tables = self.local if self.local and self.slides(at) else (self.cos, self.sin)
        for letter in "qkv":
            y = self.project(w, at, f"self_attn.{letter}_proj", n)
            y = y.reshape(*y.shape[:2], -1, self.config["head_dim"])
            if letter != "v":
                turned = rope.torch_twin(torch, self.head_norm(w, at, letter, y), *tables)
                y = self.keep(f"{at}self_attn.{letter}_rope", turned)
            heads.append(y)
        q, k, v = heads
        p = attention.torch_probabilities(torch, q, k, *self.masks(at, q.shape[1]))
        p = self.keep(f"{at}self_attn.attention.p", p)
        return self.keep(f"{at}self_attn.attention", attention.torch_mix(torch, p, v)).flatten(2)

    def mlp(self, w: Tensors, at: str, n: torch.Tensor) -> torch.Tensor:
        gate, up = (self.project(w, at, f"mlp.{p}_proj", n) for p in ("gate", "up"))
        gelu = self.family.traits.gelu
        name, kind = ("mlp.geglu", "gelu") if gelu else ("mlp.swiglu", "silu")
        act = F.gelu(gate, approximate="tanh") if gelu else F.silu(gate)
        return self.keep(f"{at}{name}", self.keep(f"{at}{name}.{kind}", act) * up)

    def half(
        self, w: Tensors, at: str, norms: tuple[str, str], x: torch.Tensor, inside: Any, last: str
    ) -> torch.Tensor:
        """x + what a half makes of x: its norm, `inside`, its last projection, in Gemma a norm again."""
        before, after = norms
        y = inside(w, at, self.norm(f"{at}{before}", x, w[f"{before}.weight"]))
        y = self.project(w, at, last, y)
        return x + (self.norm(f"{at}{after}", y, w[f"{after}.weight"]) if after else y)

    def block(self, w: Tensors, x: torch.Tensor, at: str = "", name: str = "y") -> torch.Tensor:
        first, second = self.family.traits.norms
        a = self.half(w, at, first, x, self.attention, "self_attn.o_proj")
        a = self.keep(f"{at}after_attention", a)
        return self.keep(name, self.half(w, at, second, a, self.mlp, "mlp.down_proj"))

    def embed(self, w: Tensors, ids: torch.Tensor) -> torch.Tensor:
        x = F.embedding(ids, w["model.embed_tokens.weight"])
        return x * self.config["hidden_size"] ** 0.5 if self.family.traits.scaled_embedding else x

    def model(self, w: Tensors, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.keep("model.embed_tokens", self.embed(w, ids))
        for number in range(self.config["num_hidden_layers"]):
            at = f"model.layers.{number}."
            part = {name.split(at)[1]: tensor for name, tensor in w.items() if at in name}
            x = self.block(part, x, at, at[:-1])
        n = self.norm("model.norm", x, w["model.norm.weight"])
        head = w.get("lm_head.weight", w["model.embed_tokens.weight"])
        logits = self.keep("lm_head", F.linear(n, head))
        flat, moved = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        return self.keep("loss", cross_entropy.torch_twin(torch, flat, moved))

    def results(self, case: Case, leaves: Tensors) -> Tensors:
        """What the case asks for: recorded values, and gradients by the name of their tensor."""
        found = self.seen | leaves
        wanted = Tensors()
        for name in (tensor.name for tensor in case.tensors):
            value = found.get(name.removesuffix(".grad"))
            value = value.grad if value is not None and name.endswith(".grad") else value
            if value is not None:
                wanted[name] = value
        return wanted


def compute_block(case: Case, given: Tensors) -> Tensors:
    step = Step(case, given["cos"], given["sin"])
    y = step.block(given, given["x"])
    torch.autograd.backward(y, given["dy"])
    dx = given["x"].grad
    assert dx is not None
    return step.results(case, given) | {"dx": dx}


def leaves_of(case: Case, root: Path, dtype: torch.dtype) -> tuple[Tensors, list[str]]:
    """The checkpoint and adapter directories of a case; and the names of the adapter's tensors."""
    model = load_model(root / case.attributes["model"])
    adapter = load_adapter(root / case.attributes["adapter"])
    arrays = {name: in_file(model, name) for name in model.weights} | adapter.weights
    leaves = {name: to_torch(array, dtype) for name, array in arrays.items()}
    return leaves, list(adapter.weights)


def run_model(case: Case, leaves: Tensors, given: Tensors, dtype: torch.dtype) -> Step:
    """A forward that autograd can go back through."""
    whole, local = model_tables(config_of(case.attributes["config"]), given["input_ids"].shape[1])
    cos, sin = (constant(table, dtype) for table in whole)
    step = Step(case, cos, sin)
    if local:
        first, second = (constant(table, dtype) for table in local)
        step.local = first, second
    step.model(leaves, given["input_ids"], given["labels"])
    return step


def compute_model(case: Case, given: Tensors, root: Path, dtype: torch.dtype) -> Tensors:
    leaves, _ = leaves_of(case, root, dtype)
    step = run_model(case, leaves, given, dtype)
    torch.autograd.backward(step.seen["loss"])
    return step.results(case, leaves)


def mezo_step(weights: Tensors, given: Tensors, number: int, at: Any, loss: Any) -> torch.Tensor:
    """θ ± eps·z, and the step along z."""
    z = {name: given[f"z/{name}"][number] for name in weights}
    sides = []
    for move in (at["eps"], -at["eps"]):
        moved = {name: w + move * z[name] for name, w in weights.items()}
        sides.append(loss(moved))
    g = (sides[0] - sides[1]) / (2 * at["eps"])
    for name, w in weights.items():
        w -= at["lr"] * g * z[name]
    return (sides[0] + sides[1]) / 2


def compute_trajectory(case: Case, given: Tensors, root: Path, dtype: torch.dtype) -> Tensors:
    """Steps of torch.optim, or of MeZO with the z of the case."""
    leaves, names = leaves_of(case, root, dtype)
    at, weights = case.attributes, {name: leaves[name] for name in names}
    kinds: dict[str, Callable[[], Any]] = {
        "sgd": lambda: torch.optim.SGD(
            weights.values(), at["lr"], at["momentum"], weight_decay=at["weight_decay"]
        ),
        "adamw": lambda: torch.optim.AdamW(
            weights.values(), at["lr"], (at["beta1"], at["beta2"]), at["eps"], at["weight_decay"]
        ),
        "mezo": lambda: None,
    }
    optimizer, losses, found = kinds[at["optimizer"]](), [], Tensors()

    def loss(moved: Tensors) -> torch.Tensor:
        return run_model(case, leaves | moved, given, dtype).seen["loss"]

    for number in range(at["steps"]):
        if optimizer is None:
            with torch.no_grad():
                losses.append(mezo_step(weights, given, number, at, loss))
        else:
            optimizer.zero_grad()
            losses.append(loss(weights))
            torch.autograd.backward(losses[-1])
            optimizer.step()
        found |= {f"{name}.step_{number + 1}": w.detach().clone() for name, w in weights.items()}
    wanted = {tensor.name for tensor in case.tensors}
    return {"loss": torch.stack(losses)} | {n: w for n, w in found.items() if n in wanted}


def compute_quantised(case: Case, given: Tensors, dtype: torch.dtype) -> Tensors:
    """Unpack, decode in the type of the scales, and use as a linear layer."""
    at = case.attributes
    shifts = torch.arange(0, 32, at["bits"])
    codes = (given["packed"][..., None] >> shifts) & (2 ** at["bits"] - 1)
    stored: torch.dtype = getattr(torch, at["scale_dtype"])
    groups = codes.reshape(*given["scales"].shape, -1).to(stored)
    scales, biases = (given[name].detach().to(stored)[..., None] for name in ("scales", "biases"))
    w = (groups * scales + biases).reshape(len(codes), -1).to(dtype)
    y = F.linear(given["x"], w)
    (dx,) = torch.autograd.grad(y, given["x"], given["dy"])
    return {"w": w, "y": y, "dx": dx}


def compute_positions(case: Case, given: Tensors, dtype: torch.dtype) -> Tensors:
    """RoPE with angles from the positions."""
    at, d = case.attributes, given["x"].shape[-1]
    positions = to_numpy(given["positions"])
    cos, sin = (constant(t, dtype) for t in tables(positions, d, at["theta"], at["scaling"]))
    y = rope.torch_twin(torch, given["x"], cos, sin)
    (dx,) = torch.autograd.grad(y, given["x"], given["dy"])
    return {"y": y, "dx": dx}


def compute(case: Case, inputs: dict[str, Array], root: Path, dtype: str) -> dict[str, Array]:
    """One case in `dtype`."""
    precision: torch.dtype = getattr(torch, dtype)
    given = {name: to_torch(array, precision) for name, array in inputs.items()}
    if case.kind in ("op", "tile"):
        found = compute_op(case, given)
    elif case.kind == "block":
        found = compute_block(case, given)
    elif case.kind == "e2e":
        found = compute_model(case, given, root, precision)
    elif case.kind == "traj":
        found = compute_trajectory(case, given, root, precision)
    elif case.kind == "positions":
        found = compute_positions(case, given, precision)
    elif case.kind == "quant":
        found = compute_quantised(case, given, precision)
    else:
        raise NotCovered
    return {name: to_numpy(tensor) for name, tensor in found.items()}
