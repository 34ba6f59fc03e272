"""Block cases and whole models: float64 values of the engine, held against a second writing."""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from mesp_ref.api import trace
from mesp_ref.engine.adapter import Adapter
from mesp_ref.engine.block import block, block_bwd
from mesp_ref.engine.config import FAMILIES, FULL, PROJECTIONS, SLIDING, Qwen2Config
from mesp_ref.engine.init import adapter_shapes
from mesp_ref.engine.layer import Layer
from mesp_ref.engine.model import Model
from mesp_ref.engine.positions import first_keys
from mesp_ref.files.checkpoint import is_gain, save_checkpoint
from mesp_ref.files.config import config_fields
from mesp_ref.files.peft import save_adapter
from mesp_ref.golden.builder.draw import generator, representable, stored
from mesp_ref.golden.builder.emulate import gates
from mesp_ref.golden.plain import Arrays, Plain, Setting
from mesp_ref.golden.simulate import block as again
from mesp_ref.golden.simulate import cast, layer_weights, setting_of, step, whole_setting
from mesp_ref.golden.suite import DTYPES, Case, Tensor, Vectors
from mesp_ref.ops import IGNORED, Array, RopeScaling, rope_tables

SOURCE = (
    "mesp_ref in float64, held against a second writing at build time and against torch float64, "
    "transformers with PEFT and complex step in the tests"
)
AGREE = 1e-12  # of a tensor's largest entry; measured: 4e-15
LAYER = "model.layers.0."


class Shape(NamedTuple):
    """The sizes of a case under the letters."""

    name: str
    note: str
    n: int = 2
    t: int = 6
    heads: int = 4
    groups: int = 2
    layers: int = 1
    tied: bool = True
    rank: int = 4
    alpha: float = 6.0
    hidden: int = 16
    head_dim: int = 6
    vocabulary: int = 21
    labels: int = 12  # token ids below this
    unequal: bool = False  # most labels of the first sequence are ignored
    family: str = "qwen2"
    more: Mapping[str, Any] = MappingProxyType({})  # what else the config says


LLAMA3 = RopeScaling(8.0, 40, 1.0, 4.0)  # of three pairs one is kept, one stretched, one between
SLIDES = {"layer_types": (SLIDING,), "sliding_window": 3}
GEMMA = {"attention_scale": 1 / 3, "rope_local_base_freq": 100.0}  # query_pre_attn_scalar is 9
BLOCKS = (
    Shape("usual", "H = 4 on G = 2, batch of two"),
    Shape("every_head_its_own", "H = G = 3", heads=3, groups=3, n=1),
    Shape("one_kv_head", "G = 1, rank 1", heads=3, groups=1, n=1, rank=1, alpha=2.0),
    Shape("one_token", "T = 1", n=1, t=1),
    Shape(
        "head_dim_is_width_over_heads",
        "head_dim = hidden/heads = 24/4, as engines that derive it",
        hidden=24,
    ),
    Shape("qwen3", "Qwen3: q and k are normalised head by head before RoPE, no biases", family="qwen3"),
    Shape("llama", "Llama: no biases, head_dim = hidden/heads", hidden=24, family="llama"),
    Shape("gemma3", "Gemma 3, a layer that sees all: gains 1 + w, norms behind the halves, GELU, scores "
          "times query_pre_attn_scalar^−½", family="gemma3_text", more=GEMMA),
    Shape("gemma3_window", "Gemma 3, a layer with a window of 3 keys; T = 7, G = 1", t=7, groups=1,
          family="gemma3_text", more=GEMMA | SLIDES),
)  # fmt: skip
MODELS = (
    Shape("tied", "two blocks, tied head, ignored labels, repeated tokens, a label 0",
          t=7, layers=2),
    Shape("untied", "two blocks, head of its own, one key/value head",
          n=1, layers=2, groups=1, tied=False),
    Shape("unequal", "head_dim = hidden/heads, unequal label counts, labels across the vocabulary",
          n=3, t=7, layers=2, hidden=24, vocabulary=37, labels=37, unequal=True),
    Shape("qwen3", "Qwen3: two blocks with norms of q and k, tied head", t=7, layers=2, family="qwen3"),
    Shape("llama", "Llama: two blocks, head of its own, RoPE scaled as Llama 3 does", t=7, layers=2,
          hidden=24, tied=False, family="llama", more={"rope_scaling": LLAMA3}),
    Shape("gemma3", "Gemma 3: a layer with a window of 3 and RoPE of its own, one that sees all with "
          "RoPE scaled linearly; the embedding times √C, tied head", t=7, layers=2, family="gemma3_text",
          more=GEMMA | {"layer_types": (SLIDING, FULL), "sliding_window": 3, "rope_theta": 1000.0,
                        "rope_scaling": RopeScaling(4.0)}),
)  # fmt: skip


def config_of(shape: Shape) -> Qwen2Config:
    """All axis lengths different; an eps and angles that matter."""
    sizes: dict[str, Any] = {
        "vocab_size": shape.vocabulary, "hidden_size": shape.hidden, "intermediate_size": 20,
        "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.groups, "head_dim": shape.head_dim, "rms_norm_eps": 0.03125,
        "rope_theta": 100.0, "max_position_embeddings": 64, "tie_word_embeddings": shape.tied,
        "traits": FAMILIES[shape.family],
    }  # fmt: skip
    return Qwen2Config(**sizes | dict(shape.more))


def draw_model(shape: Shape, rng: np.random.Generator) -> tuple[Model, Adapter]:
    """Weights in which nothing is trivially 0 or 1, every number representable."""
    config, arrays = config_of(shape), Arrays()
    for name, size in config.weight_shapes().items():
        noise = rng.standard_normal(size)
        if is_gain(name, config):  # what the file holds must be representable
            arrays[name] = config.traits.gain + representable(0.3 * noise)
            continue
        if name.endswith("norm.weight"):
            array = 1 + 0.3 * noise
        elif name.endswith(".bias"):
            array = 0.4 * noise
        else:
            array = 0.5 * noise if "embed" in name else 0.6 * noise * size[1] ** -0.5
        arrays[name] = representable(array)
    adapter = Adapter(shape.rank, shape.alpha, tuple(PROJECTIONS))
    for name, size in adapter_shapes(config, shape.rank, PROJECTIONS).items():
        adapter.weights[name] = representable(0.8 * rng.standard_normal(size) * size[1] ** -0.5)
    return Model(config, arrays), adapter


class Made(NamedTuple):
    """A case with what is needed to compute it again, wrongly: run(plain) gives its trace."""

    case: Case
    vectors: Vectors
    setting: Setting
    run: Callable[[Plain], Arrays]


def assert_agree(want: Arrays, again: Arrays, case: str) -> None:
    """Two writings of a case; ArithmeticError where they differ."""
    for name, value in want.items():
        error = float(np.abs(again[name] - value).max())
        if not error <= AGREE * max(1e-3, float(np.abs(value).max())):
            raise ArithmeticError(f"{case}: {name}: two writings differ by {error:.2g}")


def _tensor(name: str, value: Array, gate: dict[str, float], backward: bool) -> Tensor:
    if ".lora_" in name or name in ("y", "dx", "loss"):
        role = "result"
    else:
        role = "base" if name.endswith((".weight.grad", ".bias.grad")) else "inner"
    return Tensor(
        name, value.shape, role, "backward" if backward else "forward",
        gates={dtype: float(f"{g:.3e}") for dtype, g in gate.items()},
    )  # fmt: skip


def make_block(shape: Shape) -> Made:
    """One block with LoRA everywhere: inputs x, dy and its weights; every intermediate."""
    rng = generator(f"block/{shape.name}")
    model, adapter = draw_model(shape, rng)
    cos, sin = map(
        representable, rope_tables(0, shape.t, shape.head_dim, 100.0, np.dtype(np.float64))
    )
    x, dy = (representable(rng.standard_normal((shape.n, shape.t, shape.hidden))) for _ in range(2))
    want = Arrays()

    def tap(name: str, value: Array) -> None:
        want["y" if name == LAYER[:-1] else name.removeprefix(LAYER)] = value

    first = first_keys(model.config, model.config.layer_type(0), 0, shape.t, None)
    layer = Layer(0, model.config, model.weights, adapter, cos, sin, first)
    _, res = block(x, layer._replace(tap=tap))
    dx, grads = block_bwd(dy, res, layer._replace(tap=tap), params=True)
    del want["grad"]  # the cotangent itself
    want |= {name.split(LAYER)[1] + ".grad": grad for name, grad in grads.items()} | {"dx": dx}
    given = {"x": x, "dy": dy} | layer_weights(model, adapter, 0)

    def run(plain: Plain) -> Arrays:
        return again(plain, cast(given, plain.dtype))

    inputs = {name: stored(a) for name, a in (given | {"cos": cos, "sin": sin}).items()}
    setting = setting_of(model.config, adapter.rank, adapter.alpha, cos, sin)
    return _made("block", shape, model, want, inputs, setting, run, rng)


def _made(
    kind: str,
    shape: Shape,
    model: Model,
    want: Arrays,
    inputs: Arrays,
    setting: Setting,
    run: Callable[[Plain], Arrays],
    rng: np.random.Generator,
) -> Made:
    """The case around its values: agreement of two writings, gates, manifest entry."""
    name = f"{kind}/{shape.name}"
    assert_agree(want, run(Plain(setting)), name)
    drift = gates(want, setting, run, rng)
    tensors = tuple(
        _tensor(key, np.asarray(value), drift[key], key.endswith(".grad") or key == "dx")
        for key, value in want.items()
    )
    attributes = {
        "config": config_fields(model.config),
        "rank": shape.rank,
        "alpha": shape.alpha,
        "s": setting.scale,
    }
    if kind == "e2e":
        attributes |= {"model": f"{name}/model", "adapter": f"{name}/adapter"}
    case = Case(name, kind, f"{name}.safetensors", shape.note, SOURCE, DTYPES, attributes, tensors)
    return Made(case, Vectors(inputs, want, {}), setting, run)


def make_model(shape: Shape, root: Path) -> Made:
    """A whole model, also as Hugging Face and PEFT directories under `root`."""
    rng = generator(f"e2e/{shape.name}")
    model, adapter = draw_model(shape, rng)
    ids = rng.integers(0, shape.labels, (shape.n, shape.t))  # some repeat, some are never met
    ids[0, 2] = 0
    labels = ids.copy()
    labels[0, 1] = labels[-1, -1] = IGNORED
    if shape.unequal:
        labels[0, :-2], labels[1, 3] = IGNORED, shape.vocabulary - 1
        ids[1, 3] = shape.vocabulary - 1
    want = trace(model, adapter, ids, labels)
    arrays = {name: model.weights[name][...] for name in model.weights}
    save_checkpoint(model.config, arrays, root / f"e2e/{shape.name}/model")
    single = adapter.astype(np.float32)
    single.base_model_name_or_path = "model"
    save_adapter(single, root / f"e2e/{shape.name}/adapter")

    def run(plain: Plain) -> Arrays:
        return step(plain, model, adapter, ids, labels)

    inputs = {"input_ids": stored(ids), "labels": stored(labels)}
    setting = whole_setting(model.config, adapter.rank, adapter.alpha, shape.t)
    return _made("e2e", shape, model, want, inputs, setting, run, rng)
