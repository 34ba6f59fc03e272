"""What a backend with a mistake would have written for a case: Plain, or a bent one, on its inputs."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mesp_ref.engine.adapter import Adapter
from mesp_ref.engine.config import SLIDING, Qwen2Config
from mesp_ref.engine.model import Model
from mesp_ref.files.checkpoint import is_gain
from mesp_ref.files.config import config_of
from mesp_ref.files.models import load_model
from mesp_ref.files.peft import load_adapter
from mesp_ref.golden.plain import Arrays, Plain, Setting
from mesp_ref.golden.positions import model_tables, tables
from mesp_ref.golden.suite import Case
from mesp_ref.ops import Array

Run = Callable[[type[Plain]], Arrays]  # every tensor of a case that a Plain computes


def simulator(case: Case, inputs: Arrays, root: Path) -> Run | None:
    """How a case is computed by a Plain; None where none can (an op or a family it does not know)."""
    wide = {n: a.astype(np.float64) if a.dtype.kind == "f" else a for n, a in inputs.items()}
    if case.kind in ("op", "tile"):
        return of_op(case.attributes["op"], wide, case.attributes)
    if case.kind == "positions":
        at, d = case.attributes, wide["x"].shape[-1]
        cos, sin = tables(wide["positions"], d, at["theta"], at["scaling"])
        return of_op("rope", wide | {"cos": cos, "sin": sin}, {})
    if case.kind == "quant":
        return lambda kind: _quantised(kind(_setting(wide, {})), wide, case.attributes)
    if case.kind == "block":
        setting = _case_setting(case, wide["cos"], wide["sin"])
        return lambda kind: block(kind(setting), wide)
    if case.kind in ("e2e", "traj"):
        return _model_simulator(case, wide, root)
    return None


# -- operations --------------------------------------------------------------------------------


def of_op(op: str, inputs: Arrays, attributes: Mapping[str, Any]) -> Run | None:
    """An op's output "y" and its gradients "d…" from float64 arguments, cotangent "dy" among them."""
    if op not in OF_OPS or "first" in inputs:
        return None
    setting = _setting(inputs, {**attributes, **({"is_gelu": True} if op == "geglu" else {})})
    return lambda kind: OF_OPS[op](kind(setting), inputs)


def _setting(v: Arrays, attributes: Mapping[str, Any]) -> Setting:
    """What Plain needs to know of an op."""
    q, k = v.get("q", np.empty((1, 1, 1, 1))), v.get("k", np.empty((1, 1, 1, 1)))
    rank = next((len(v[name]) for name in ("A", "Aq", "Ag") if name in v), 1)
    none = np.empty((1, 1))
    return Setting(
        q.shape[2], k.shape[2], q.shape[3], attributes.get("eps", 0.0), rank,
        rank * attributes.get("s", 1.0), v.get("cos", none), v.get("sin", none),
        attributes.get("scale"), attributes.get("window"), v.get("positions"),
        gelu=bool(attributes.get("is_gelu")),
    )  # fmt: skip


def _linear(plain: Plain, v: Arrays) -> Arrays:
    dw, db = plain.linear_params(v["dy"], v["x"])
    y = plain.linear(v["x"], v["w"], v.get("b"))
    found = {"y": y, "dx": plain.linear_bwd(v["dy"], v["w"]), "dw": dw}
    return found | ({"db": db} if "b" in v else {})


def _lora_linear(plain: Plain, v: Arrays) -> Arrays:
    grads = plain.lora_bwd(v["dy"], v["x"], v["w"], v["A"], v["B"])
    dw, db = plain.linear_params(v["dy"], v["x"])
    found = {"y": plain.lora(v["x"], v["w"], v.get("b"), v["A"], v["B"])}
    found |= dict(zip(("dx", "dA", "dB", "dw"), (*grads, dw), strict=True))
    return found | ({"db": db} if "b" in v else {})


def _rmsnorm(plain: Plain, v: Arrays) -> Arrays:
    args = v["dy"], v["x"], v["w"]
    return {"y": plain.norm(v["x"], v["w"]), "dx": plain.norm_bwd(*args),
            "dw": plain.norm_params(*args)}  # fmt: skip


def _rope(plain: Plain, v: Arrays) -> Arrays:
    return {"y": plain.rotate(v["x"]), "dx": plain.rotate_bwd(v["dy"])}


def _softmax(plain: Plain, v: Arrays) -> Arrays:
    p = plain.probabilities(v["s"])
    return {"y": p, "ds": plain.softmax_bwd(v["dy"], p)}


def _attention(plain: Plain, v: Arrays) -> Arrays:
    p, o = plain.attention(v["q"], v["k"], v["v"])
    grads = plain.attention_bwd(v["dy"], v["q"], v["k"], v["v"], p)
    return {"y": o} | dict(zip(("dq", "dk", "dv"), grads, strict=True))


def _swiglu(plain: Plain, v: Arrays) -> Arrays:
    grads = plain.swiglu_bwd(v["dy"], v["gate"], v["up"])
    z = plain.swiglu(v["gate"], v["up"])[1]
    return {"y": z} | dict(zip(("dgate", "dup"), grads, strict=True))


def _embedding(plain: Plain, v: Arrays) -> Arrays:
    return {"y": plain.embed(v["w"], v["ids"]), "dw": plain.embed_bwd(v["dy"], v["ids"], v["w"])}


def _cross_entropy(plain: Plain, v: Arrays) -> Arrays:
    loss, dlogits = plain.cross_entropy(v["logits"][None], plain.labels(v["labels"][None]))
    return {"y": loss, "dlogits": plain.scaled_loss(v["dy"], dlogits[0])}


def _lm_loss(plain: Plain, v: Arrays) -> Arrays:
    x, labels = v["x"].reshape(-1, *v["x"].shape[-2:]), np.atleast_2d(v["labels"])
    loss, dlogits = plain.cross_entropy(plain.linear(x, v["w"], None), plain.labels(labels))
    dlogits = plain.scaled_loss(v["dy"], dlogits)
    dx, (dw, _) = plain.linear_bwd(dlogits, v["w"]), plain.linear_params(dlogits, x)
    return {"y": loss, "dx": dx.reshape(v["x"].shape), "dw": dw}


def _qkv(plain: Plain, v: Arrays) -> Arrays:
    y, dx, found = list[Array](), list[Array](), Arrays()
    dys = plain.apart(v["dy"], [len(v[f"w{c}"]) for c in "qkv"])
    for c, dy in zip("qkv", dys, strict=True):
        w, b, A, B = v[f"w{c}"], v.get(f"b{c}"), v[f"A{c}"], v[f"B{c}"]
        plain.at = f"self_attn.{c}_proj"
        y.append(plain.lora(v["x"], w, b, A, B))
        more, found[f"dA{c}"], found[f"dB{c}"] = plain.lora_bwd(dy, v["x"], w, A, B)
        dx.append(plain.add(plain.at, dx[-1], more) if dx else more)
        found[f"dw{c}"], db = plain.linear_params(dy, v["x"])
        found |= {} if b is None else {f"db{c}": db}
    return {"y": plain.side_by_side(y), "dx": dx[-1]} | found


def _mlp(plain: Plain, v: Arrays) -> Arrays:
    names = {"g": "gate", "u": "up", "d": "down"}

    def layer(c: str, x: Array) -> Array:
        plain.at = f"mlp.{names[c]}_proj"
        return plain.lora(x, v[f"w{c}"], None, v[f"A{c}"], v[f"B{c}"])

    def back(c: str, dy: Array, x: Array) -> tuple[Array, Arrays]:
        plain.at = f"mlp.{names[c]}_proj"
        dx, dA, dB = plain.lora_bwd(dy, x, v[f"w{c}"], v[f"A{c}"], v[f"B{c}"])
        return dx, {f"dA{c}": dA, f"dB{c}": dB, f"dw{c}": plain.linear_params(dy, x)[0]}

    gate, up = layer("g", v["x"]), layer("u", v["x"])
    z = plain.swiglu(gate, up)[1]
    y = layer("d", z)
    dz, down = back("d", v["dy"], z)
    dgate, dup = plain.swiglu_bwd(dz, gate, up)
    (dx, first), (more, second) = back("g", dgate, v["x"]), back("u", dup, v["x"])
    return {"y": y, "dx": plain.add("up_proj", dx, more)} | first | second | down


def _add_norm(plain: Plain, v: Arrays) -> Arrays:
    a = plain.join("the sum", v["x"], v["f"])
    read = plain.join("what is normalised", v["x"], v["f"])
    dn, da = plain.apart(v["dy"], [a.shape[-1]] * 2)
    back = plain.norm_bwd(dn, read, v["w"])
    return {
        "y": plain.side_by_side([plain.norm(read, v["w"]), a]),
        "dx": plain.add("the sum's own, to x", back, da),
        "df": plain.add("the sum's own, to f", back, da),
        "dw": plain.norm_params(dn, read, v["w"]),
    }


def _head_loss(plain: Plain, v: Arrays) -> Arrays:
    plain.at = "model.norm"
    n = plain.norm(v["x"], v["w"])
    found = _lm_loss(plain, {"x": n, "w": v["head"], "labels": v["labels"], "dy": v["dy"]})
    dn = found["dx"]
    return {
        "y": found["y"],
        "dx": plain.norm_bwd(dn, v["x"], v["w"]),
        "dw": plain.norm_params(dn, v["x"], v["w"]),
        "dhead": found["dw"],
    }


OF_OPS: dict[str, Callable[[Plain, Arrays], Arrays]] = {
    "linear": _linear,
    "lora_linear": _lora_linear,
    "rmsnorm": _rmsnorm,
    "rope": _rope,
    "causal_softmax": _softmax,
    "attention": _attention,
    "masked_attention": _attention,
    "swiglu": _swiglu,
    "geglu": _swiglu,
    "embedding": _embedding,
    "cross_entropy": _cross_entropy,
    "lm_loss": _lm_loss,
    "qkv_lora": _qkv,
    "mlp_lora": _mlp,
    "gelu_mlp_lora": _mlp,
    "add_norm": _add_norm,
    "head_loss": _head_loss,
}


def _quantised(plain: Plain, v: Arrays, at: Mapping[str, Any]) -> Arrays:
    codes = plain.unpack(v["packed"], at["bits"]).astype(np.int64)
    w = plain.decode(codes.reshape(len(codes), -1), v["scales"], v["biases"], at["bits"])
    return {"w": w, "y": v["x"] @ w.T, "dx": v["dy"] @ w}


# -- blocks, models, trajectories --------------------------------------------------------------


def setting_of(config: Qwen2Config, rank: int, alpha: float, cos: Array, sin: Array) -> Setting:
    """What Plain needs to know of the first block of a model; `kinds` and `local` of the others are not
    set."""
    traits = config.traits
    return Setting(
        config.num_attention_heads, config.num_key_value_heads, config.head_dim,
        config.rms_norm_eps, rank, alpha, cos, sin, config.attention_scale,
        config.sliding_window if config.layer_type(0) == SLIDING else None,
        norms=traits.norms, head_norms=traits.head_norms, gelu=traits.gelu, gain=traits.gain,
        embedding=config.hidden_size**0.5 if traits.scaled_embedding else 1.0,
    )  # fmt: skip


def whole_setting(config: Qwen2Config, rank: int, alpha: float, tokens: int) -> Setting:
    """Of a whole model on positions from 0: the tables of its layers, and which have a window."""
    whole, local = model_tables(config, tokens)
    setting = setting_of(config, rank, alpha, *whole)
    if local is None:
        return setting
    return setting._replace(kinds=config.layer_types, local=local, window=config.sliding_window)


def _case_setting(case: Case, cos: Array, sin: Array) -> Setting:
    at = case.attributes
    return setting_of(config_of(at["config"]), at.get("rank", 1), at.get("alpha", 1.0), cos, sin)


def block(plain: Plain, v: Arrays) -> Arrays:
    """The trace of a block's forward and backward: inputs x, dy, and weights by name."""
    weights = {name: array for name, array in v.items() if "." in name}
    _, res = plain.block(weights, v["x"])
    plain.block_bwd(weights, v["dy"], res)
    return plain.trace


def layer_weights(model: Model, adapter: Adapter, number: int) -> Arrays:
    """A block's arrays by the part of their name behind model.layers.N, as files have them."""
    prefix, found = f"model.layers.{number}.", Arrays()
    for name in model.weights:
        if name.startswith(prefix):
            found[name.removeprefix(prefix)] = in_file(model, name)
    for name, array in adapter.weights.items():
        if f".{prefix}" in name:
            found[name.split(prefix)[1]] = array
    return found


def in_file(model: Model, name: str) -> Array:
    """A weight as a checkpoint holds it: Gemma's norms without the 1 of their gain 1 + w."""
    array: Array = model.weights[name][...]
    return array - model.config.traits.gain if is_gain(name, model.config) else array


def top_weights(model: Model) -> Arrays:
    """The arrays outside the blocks; head is embed when the two are tied."""
    embed = model.weights["model.embed_tokens.weight"][...]
    head = embed if model.config.tie_word_embeddings else model.weights["lm_head.weight"][...]
    return {"embed": embed, "head": head, "norm": in_file(model, "model.norm.weight")}


def cast(arrays: Arrays, dtype: Any) -> Arrays:
    """All arrays in another precision; one that has two names stays one."""
    made = {id(a): a.astype(dtype, copy=False) for a in arrays.values()}
    return {name: made[id(a)] for name, a in arrays.items()}


def step(plain: Plain, model: Model, adapter: Adapter, ids: Array, labels: Array) -> Arrays:
    """The trace of forward and backward, in the dtype of the Plain."""
    layers = [layer_weights(model, adapter, i) for i in range(model.config.num_hidden_layers)]
    layers = [cast(layer, plain.dtype) for layer in layers]
    return plain.model(layers, cast(top_weights(model), plain.dtype), ids, labels)


def trajectory(
    plain: Plain, model: Model, start: Adapter, v: Arrays, at: Mapping[str, Any]
) -> Arrays:
    """Losses of the steps, and every matrix after each of them."""
    w = {name: a.astype(plain.dtype) for name, a in start.weights.items()}
    states: dict[str, Arrays] = {name: {} for name in w}
    losses, shown = [], Arrays()

    def trace(weights: Arrays) -> Arrays:
        moved = Adapter(start.rank, start.alpha, start.targets, False, weights)
        return step(plain, model, moved, v["input_ids"], v["labels"])

    for t in range(1, at["steps"] + 1):
        if at["optimizer"] == "mezo":
            z = {name: v[f"z/{name}"][t - 1].astype(plain.dtype) for name in w}
            eps = at["eps"]
            up, down = (
                float(trace({n: w[n] + side * z[n] for n in w})["loss"]) for side in (eps, -eps)
            )
            losses.append(plain.mezo_loss(up, down))
            w = {n: plain.mezo(a, plain.slope(up, down, eps), z[n], at) for n, a in w.items()}
        else:
            found, rule = trace(w), getattr(plain, at["optimizer"])
            losses.append(float(found["loss"]))
            w = {n: rule(a, found[f"{n}.grad"], states[n], t, at) for n, a in w.items()}
        shown |= {f"{n}.step_{t}": plain.stepped(f"{n}.step_{t}", a) for n, a in w.items()}
    return {"loss": np.array(losses)} | shown


def _model_simulator(case: Case, v: Arrays, root: Path) -> Run:
    at = case.attributes
    opened = load_model(root / at["model"], dtype="float64")
    model = Model(opened.config, {name: opened.weights[name][...] for name in opened.weights})
    adapter = load_adapter(root / at["adapter"], dtype="float64", config=model.config)
    setting = whole_setting(model.config, adapter.rank, adapter.alpha, v["input_ids"].shape[1])

    def run(kind: type[Plain]) -> Arrays:
        if case.kind == "traj":
            return trajectory(kind(setting), model, adapter, v, at)
        return step(kind(setting), model, adapter, v["input_ids"], v["labels"])

    return run
