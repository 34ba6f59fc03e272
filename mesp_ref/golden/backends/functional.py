"""What JAX and MLX share: the forward on an array namespace, gradients by the framework's vjp.

The gradient of an intermediate is that of a zero added to it, so one vjp gives every tensor of a
trace. Trajectories are not covered.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mesp_ref.engine.config import SLIDING
from mesp_ref.files.config import config_of
from mesp_ref.files.models import load_model
from mesp_ref.files.peft import load_adapter
from mesp_ref.golden.backends import NotCovered
from mesp_ref.golden.positions import model_tables
from mesp_ref.golden.rows import ROWS, masked
from mesp_ref.golden.simulate import in_file
from mesp_ref.golden.suite import Case
from mesp_ref.ops import Array
from mesp_ref.registry import attention, cross_entropy, geglu, linear, rmsnorm, rope
from mesp_ref.registry.twins import Namespace, wide

Values = dict[str, Any]


class Framework(Namespace, Protocol):
    """What a framework adds to the namespace of the twins: its dtypes, and gradients."""

    @property
    def dtypes(self) -> Mapping[str, Any]: ...

    def vjp(self, f: Callable[..., Any], primals: list[Any], cotangent: Any) -> list[Any]: ...
    def numpy(self, x: Any) -> Array: ...


class Client:
    """The suite's computations in one framework and dtype."""

    def __init__(self, framework: Framework, dtype: str):
        if dtype not in framework.dtypes:
            raise NotCovered
        self.fw, self.xp, self.dtype = framework, framework.xp, framework.dtypes[dtype]

    def array(self, value: Array) -> Any:
        made = self.xp.array(value)
        return made.astype(self.dtype) if value.dtype.kind == "f" else made

    def op(self, case: Case, given: Values) -> Values:
        attributes = dict(case.attributes)
        row, dy = ROWS.get(attributes.pop("op")), given.pop("dy")
        if row is None or row.golden is None:
            raise NotCovered
        twin = row.golden.functional
        names = [t.name[1:] for t in case.tensors if t.name != "y"]

        def f(*primals: Any) -> Any:
            args = given | dict(zip(names, primals, strict=True))
            return twin(self.fw, **args, **attributes)

        primals = [given[name] for name in names]
        y = f(*primals)
        grads = self.fw.vjp(f, primals, dy.astype(y.dtype))
        return {"y": y} | {f"d{name}": g for name, g in zip(names, grads, strict=True)}

    def quantised(self, case: Case, given: Values) -> Values:
        """Unpack, decode in the type of the scales, and use as a linear layer."""
        at = case.attributes
        if at["scale_dtype"] not in self.fw.dtypes:
            raise NotCovered
        stored = self.fw.dtypes[at["scale_dtype"]]
        shifts = self.xp.array(np.arange(0, 32, at["bits"], dtype=np.uint32))
        codes = (given["packed"][..., None] >> shifts) & (2 ** at["bits"] - 1)
        groups = codes.reshape(*given["scales"].shape, -1).astype(stored)
        scales, biases = (given[n].astype(stored)[..., None] for n in ("scales", "biases"))
        w = (groups * scales + biases).reshape(codes.shape[0], -1).astype(self.dtype)
        (dx,) = self.fw.vjp(lambda x: x @ w.T, [given["x"]], given["dy"])
        return {"w": w, "y": given["x"] @ w.T, "dx": dx}

    def step(
        self, case: Case, leaves: Values, f: Callable[["Tape", Values], Any], dy: Any
    ) -> Values:
        """Every tensor of a block or model: f(tape, leaves) is its output."""
        tape = Tape(self, case, {})
        output = f(tape, leaves)
        seen = dict(tape.seen)
        wanted = [t.name for t in case.tensors]
        names = [n.removesuffix(".grad") for n in wanted if n.endswith(".grad") or n == "dx"]
        names = ["x" if name == "dx" else name for name in names]
        primals = [leaves[n] if n in leaves else self.xp.zeros_like(seen[n]) for n in names]

        def again(*values: Any) -> Any:
            moved = dict(zip(names, values, strict=True))
            deltas = {n: v for n, v in moved.items() if n not in leaves}
            return f(
                Tape(self, case, deltas), leaves | {n: v for n, v in moved.items() if n in leaves}
            )

        grads = self.fw.vjp(again, primals, self.xp.ones_like(output) if dy is None else dy)
        found = {("dx" if n == "x" else f"{n}.grad"): g for n, g in zip(names, grads, strict=True)}
        return {n: found[n] if n in found else seen[n] for n in wanted}


class Tape:
    """The forward of a block and a model; records tensors and adds a delta to some of them."""

    def __init__(self, client: Client, case: Case, deltas: Values):
        self.c, self.at, self.deltas, self.seen = client, case.attributes, deltas, Values()
        self.family = config_of(self.at["config"])
        self.tables: Any = None  # cos and sin
        self.local: Any = None  # those of layers with a window

    def keep(self, name: str, value: Any) -> Any:
        self.seen[name] = value
        return value + self.deltas[name] if name in self.deltas else value

    def project(self, w: Values, at: str, part: str, x: Any) -> Any:
        h = self.keep(f"{at}{part}.h", x @ w[f"{part}.lora_A.weight"].T)
        y = linear.functional_twin(self.c.fw, x, w[f"{part}.weight"], w.get(f"{part}.bias"))
        return self.keep(f"{at}{part}", y + self.at["s"] * (h @ w[f"{part}.lora_B.weight"].T))

    def norm(self, name: str, x: Any, w: Any) -> Any:
        if gain := self.family.traits.gain:
            w = gain + wide(self.c.fw, w)
        return self.keep(
            name, rmsnorm.functional_twin(self.c.fw, x, w, self.at["config"]["rms_norm_eps"])
        )

    def slides(self, at: str) -> bool:
        """Whether a layer has a window: the one of a block case, or that named model.layers.N."""
        return self.family.layer_type(int(at.split(".")[2]) if at else 0) == SLIDING

    def heads(self, w: Values, at: str, n: Any) -> list[Any]:
        """q, k and v [N, T, heads, D], the first two normalised where the family does, and turned."""
        found, tables = [], self.local if self.local and self.slides(at) else self.tables
        for letter in "qkv":
            part = f"self_attn.{letter}_norm"
            y = self.project(w, at, f"self_attn.{letter}_proj", n)
            y = y.reshape(*y.shape[:2], -1, self.at["config"]["head_dim"])
            if f"{part}.weight" in w:
                y = self.norm(f"{at}{part}", y, w[f"{part}.weight"])
            if letter != "v":
                y = rope.functional_twin(self.c.fw, y, *tables)
                y = self.keep(f"{at}self_attn.{letter}_rope", y)
            found.append(y)
        return found

    def attention(self, w: Values, at: str, n: Any) -> Any:
        q, k, v = self.heads(w, at, n)
        first = None
        if self.slides(at) and self.family.sliding_window is not None:
            tokens = self.c.xp.array(np.arange(q.shape[1]))
            first = masked.first_keys(None, self.family.sliding_window, tokens)
        p = attention.probabilities(self.c.fw, q, k, first, self.family.attention_scale)
        p = self.keep(f"{at}self_attn.attention.p", p)
        o = self.keep(f"{at}self_attn.attention", attention.mix(self.c.fw, p, v))
        return o.reshape(*o.shape[:2], -1)

    def mlp(self, w: Values, at: str, n: Any) -> Any:
        gate, up = (self.project(w, at, f"mlp.{p}_proj", n) for p in ("gate", "up"))
        if self.family.traits.gelu:
            name, kind = "mlp.geglu", "gelu"
            act = geglu.functional_twin(self.c.fw, gate, 1.0)
        else:
            name, kind, act = "mlp.swiglu", "silu", self.c.fw.silu(gate)
        return self.keep(f"{at}{name}", self.keep(f"{at}{name}.{kind}", act) * up)

    def half(
        self, w: Values, at: str, norms: tuple[str, str], x: Any, inside: Any, last: str
    ) -> Any:
        """x + what a half makes of x: its norm, `inside`, its last projection, in Gemma a norm again."""
        before, after = norms
        y = inside(w, at, self.norm(f"{at}{before}", x, w[f"{before}.weight"]))
        y = self.project(w, at, last, y)
        return x + (self.norm(f"{at}{after}", y, w[f"{after}.weight"]) if after else y)

    def block(self, w: Values, x: Any, at: str = "", name: str = "y") -> Any:
        first, second = self.family.traits.norms
        a = self.half(w, at, first, x, self.attention, "self_attn.o_proj")
        a = self.keep(f"{at}after_attention", a)
        return self.keep(name, self.half(w, at, second, a, self.mlp, "mlp.down_proj"))

    def model(self, w: Values, ids: Any, labels: Any) -> Any:
        scaled = self.family.traits.scaled_embedding
        x = w["model.embed_tokens.weight"][ids]
        x = x * self.at["config"]["hidden_size"] ** 0.5 if scaled else x
        x = self.keep("model.embed_tokens", x)
        for number in range(self.at["config"]["num_hidden_layers"]):
            at = f"model.layers.{number}."
            x = self.block({n.split(at)[1]: v for n, v in w.items() if at in n}, x, at, at[:-1])
        n = self.norm("model.norm", x, w["model.norm.weight"])
        head = w["lm_head.weight" if "lm_head.weight" in w else "model.embed_tokens.weight"]
        z = self.keep("lm_head", n @ head.T)[:, :-1]
        flat = z.reshape(-1, z.shape[-1])
        loss = cross_entropy.functional_twin(self.c.fw, flat, labels[:, 1:].reshape(-1))
        return self.keep("loss", loss)


def compute_block(client: Client, case: Case, given: Values) -> Values:
    def f(tape: Tape, leaves: Values) -> Any:
        tape.tables = given["cos"], given["sin"]
        return tape.block(leaves, leaves["x"])

    return client.step(case, given, f, given["dy"])


def compute_model(client: Client, case: Case, given: Values, root: Path) -> Values:
    """The checkpoint and adapter directories of the case; angles from float64, rounded once."""
    model = load_model(root / case.attributes["model"])
    adapter = load_adapter(root / case.attributes["adapter"])
    arrays = {name: in_file(model, name) for name in model.weights} | adapter.weights
    whole, local = model_tables(model.config, given["input_ids"].shape[1])

    def f(tape: Tape, leaves: Values) -> Any:
        tape.tables = [client.array(table) for table in whole]
        tape.local = [client.array(table) for table in local] if local else None
        return tape.model(leaves, given["input_ids"], given["labels"])

    return client.step(case, {n: client.array(a) for n, a in arrays.items()}, f, None)


def compute(
    framework: Framework, case: Case, inputs: dict[str, Array], root: Path, dtype: str
) -> dict[str, Array]:
    """One case in `dtype`."""
    client = Client(framework, dtype)
    given = {name: client.array(array) for name, array in inputs.items()}
    if case.kind in ("op", "tile"):
        found = client.op(case, given)
    elif case.kind == "block":
        found = compute_block(client, case, given)
    elif case.kind == "e2e":
        found = compute_model(client, case, given, root)
    elif case.kind == "quant":
        found = client.quantised(case, given)
    else:
        raise NotCovered
    return {name: framework.numpy(value) for name, value in found.items()}
