"""Valid inputs, one or a few per reader, made by the writers of the package itself."""

import json
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import published
from helpers import CHATML, STOP, byte_level_tokenizer, words
from mutate import SEPARATOR

import mesp_ref as mr
from mesp_ref.engine.config import FAMILIES
from mesp_ref.engine.init import random_arrays
from mesp_ref.files.checkpoint import save_checkpoint
from mesp_ref.files.config import config_fields
from mesp_ref.files.gguf_export import add_sizes, divisors
from mesp_ref.files.gguf_families import ARCHITECTURES, OF_FAMILY
from mesp_ref.files.mlx import save_mlx_adapter
from mesp_ref.files.quantize import quantize_checkpoint
from mesp_ref.golden.suite import FORMAT, VERSION
from mesp_ref.job.directory import write_json
from mesp_ref.job.state import environment, save_state
from mesp_ref.ops import RopeScaling
from mesp_ref.train.trainer import TrainConfig, Trainer
from mesp_ref.verify.samples import FAMILY_SIZES, small_config

CONFIG = small_config(num_hidden_layers=1)


def _join(folder: Path, names: Iterable[str]) -> bytes:
    parts = (folder / name for name in names)
    return SEPARATOR.join(p.read_bytes() if p.is_file() else b"" for p in parts)


def _made(make: Callable[[Path], list[bytes]]) -> Callable[[], list[bytes]]:
    """The seeds that `make` builds in a folder of its own."""

    def seeds() -> list[bytes]:
        with tempfile.TemporaryDirectory() as folder:
            return make(Path(folder))

    return seeds


def _config(folder: Path) -> list[bytes]:
    values = config_fields(mr.Qwen2Config(32, 16, 24, 2, 4, 2, 4, eos_token_id=(1, 2)))
    old = {k: v for k, v in values.items() if k not in ("rope_parameters", "head_dim")}
    families = [config_fields(small_config(**sizes)) for sizes in FAMILY_SIZES.values()]
    own = [values, old | {"rope_scaling": None}, *families, *published.CONFIGS.values()]
    return [json.dumps(fields).encode() for fields in own]


def _settings(folder: Path) -> list[bytes]:
    both = ((t, g) for t in published.TOKENIZERS.values() for g in published.GENERATION.values())
    return [SEPARATOR.join(json.dumps(fields).encode() for fields in pair) for pair in both]


def _tensors(folder: Path, **arrays: Any) -> bytes:
    save_state(folder / "t", {k: np.asarray(v) for k, v in arrays.items()}, {"step": 1})
    return (folder / "t").read_bytes()


def _safetensors(folder: Path) -> list[bytes]:
    two = _tensors(folder, a=np.ones((2, 3), "f4"), b=np.arange(4, dtype="i4"), c=np.zeros((0, 5)))
    return [two, _tensors(folder, x=np.float64(1))]


def _checkpoint(folder: Path) -> list[bytes]:
    save_checkpoint(CONFIG, random_arrays(CONFIG), folder, "bfloat16")
    names = ("config.json", "model.safetensors", "model.safetensors.index.json", "b.safetensors")
    dense = _join(folder, names)
    index = {"weight_map": dict.fromkeys(CONFIG.weight_shapes(), "model.safetensors")}
    (folder / names[2]).write_text(json.dumps(index))
    sharded = _join(folder, names)
    (folder / names[2]).unlink()
    wide = small_config(num_hidden_layers=1, hidden_size=32, intermediate_size=32, vocab_size=8)
    save_checkpoint(wide, random_arrays(wide), folder)
    quantize_checkpoint(folder, folder / "q", group_size=32, dtype="float16")
    return [dense, sharded, _join(folder / "q", names), *_families(folder, names)]


def _families(folder: Path, names: Iterable[str]) -> list[bytes]:
    """A checkpoint of each family."""
    found = []
    for family, sizes in FAMILY_SIZES.items():
        config = small_config(**sizes)
        (folder / family).mkdir()
        save_checkpoint(config, random_arrays(config), folder / family, "bfloat16")
        found.append(_join(folder / family, names))
    return found


def _adapter(folder: Path) -> list[bytes]:
    mr.save_adapter(mr.init_lora(CONFIG, rank=1, b_std=1.0, targets="q_proj,up_proj"), folder)
    names = ("adapter_config.json", "adapter_model.safetensors")
    own, sizes = _join(folder, names), {"r": 1, "target_modules": ["q_proj", "up_proj"]}
    (folder / names[0]).write_text(json.dumps(published.ADAPTERS["peft 0.19"] | sizes))
    return [own, _join(folder, names)]


def _mlx_adapter(folder: Path) -> list[bytes]:
    save_mlx_adapter(mr.init_lora(CONFIG, rank=1, b_std=1.0, targets="q_proj,up_proj"), folder)
    return [_join(folder, ("adapter_config.json", "adapters.safetensors"))]


def _tokenizer(folder: Path) -> list[bytes]:
    return [json.dumps(json.loads(byte_level_tokenizer().to_str())).encode()]


def _text(folder: Path) -> list[bytes]:
    return [words(200).encode(), ("Ünïcödé, 漢字 and 🙂. " * 20).encode(), b"\xef\xbb\xbfbom " * 9]


def _jsonl(folder: Path) -> list[bytes]:
    settings = json.dumps(
        {"chat_template": CHATML, "eos_token": STOP, "bos_token": {"content": "x"}}
    )
    turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Nobody knew."}]
    chats = json.dumps({"messages": turns}) + "\n" + json.dumps({"messages": turns, "tools": [{}]})
    others = json.dumps({"text": words(30)}) + "\n\n" + json.dumps({"tokens": [1, 2, 3] * 9})
    named = json.dumps({"chat_template": [{"name": "default", "template": CHATML}]})
    own = "{% for m in messages %}{% generation %}{{ m | tojson }}{% endgeneration %}{% endfor %}"
    files = ((settings, chats, ""), (named, others, ""), ("{}", chats, own))
    return [
        SEPARATOR.join(part.encode() for part in parts[: 2 + bool(parts[2])]) for parts in files
    ]


def _golden(folder: Path) -> list[bytes]:
    tensor = {"name": "y", "shape": [2], "role": "result", "direction": "forward"}
    attributes = {"eps": 1.0, "rank": 2, "alpha": 4.0, "s": 2.0}
    case = {"name": "ops/x/a", "kind": "op", "file": "case.safetensors", "note": "n", "source": "s",
            "dtypes": ["float32", "float16"], "attributes": attributes,
            "tensors": [tensor | {"k": 3, "s": 1}]}  # fmt: skip
    model = case | {"tensors": [tensor | {"gates": {"float32": 0.1, "float16": 0.2}}]}
    wrong = {"name": "w", "of": "ops/x/a", "bug": "b", "file": "wrong.safetensors",
             "dtypes": ["float32"]}  # fmt: skip
    vectors = _tensors(
        folder, **{"in/x": np.ones(2), "want/y": np.ones(2), "mag/y": np.ones(2, "f4")}
    )
    answers = [_tensors(folder, y=np.array(v, "f4")) for v in ([1.0, 1.0], [1.0, 2.0])]
    seeds = []
    for entry, answer in ((case, answers[0]), (case, answers[1]), (model, answers[1])):
        manifest = {"format": FORMAT, "version": VERSION, "release": "1",
                    "date": "2026-01-01", "conventions": {"a": "b"}, "units": {},
                    "cases": [entry], "wrong": [wrong]}  # fmt: skip
        seeds.append(SEPARATOR.join((json.dumps(manifest).encode(), vectors, answer, answers[1])))
    return seeds


def _sketch(folder: Path) -> list[bytes]:
    from mesp_ref.golden.sketch import FORMAT as SKETCH
    from mesp_ref.golden.sketch import project

    g = np.ones((2, 3), "f4")
    entry = {"shape": [2, 3], "norm": 6**0.5, "drift": 1e-7, "projections": project("g", g)}
    sketch = {"format": SKETCH, "loss": 1.0, "loss_drift": 1e-7, "tensors": {"g": entry}}
    return [json.dumps(sketch).encode() + SEPARATOR + _tensors(folder, g=g)]


def _resume(folder: Path) -> list[bytes]:
    adapter = mr.init_lora(CONFIG, rank=1, targets="q_proj")

    class Rows:
        cursor = (0, 0, 0)

    config = TrainConfig(accumulate=1, batch_size=1)
    trainer = Trainer(mr.random_model(CONFIG), adapter, Rows(), config)  # type: ignore[arg-type]
    zeros = {name: np.zeros_like(w) for name, w in trainer.params.items()}
    trainer.optimizer.step(trainer.params, zeros, 0.0)
    trainer.step = 1
    arrays, facts = trainer.state()
    facts |= {
        "identity": {"lr": 1.0, "method": "mesp", "checkpoints": "ram", "steps": 9},
        "environment": environment(),
        "started": "2026-01-01T00:00:00",
    }
    save_state(folder / "state.safetensors", arrays, facts)
    write_json(folder / "run.json", {})
    events = (
        {
            "event": "step",
            "step": 1,
            "loss": 1.0,
            "lr": 0.1,
            "grad_norm": 1.0,
            "tokens": 3,
            "computed_tokens": 4,
            "seconds": 0.1,
            "tokens_per_second": 40.0,
            "memory_mb": 9.0,
        },
        {"event": "eval", "step": 1, "loss": 1.0, "accuracy": 0.5, "perplexity": None},
        {"event": "sample", "step": 1, "prompt": "a", "text": "b"},
    )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    return [_join(folder, ("run.json", "state.safetensors", "metrics.jsonl"))]


# The smallest model of each architecture of llama.cpp: a block, or as many as its kinds of layers take.
GGUF_SIZES: dict[str, dict[str, Any]] = {
    "qwen2": {"head_dim": 4}, "qwen3": {},
    "llama": {"rope_scaling": RopeScaling(32.0, 8192, 1.0, 4.0)},
    "smollm3": {"num_hidden_layers": 4, "layer_types": ("full_attention",) * 3 + ("no_rope",)},
    "gemma3_text": {
        "layer_types": ("sliding_attention",), "sliding_window": 4, "rope_scaling": RopeScaling(8.0),
    },
}  # fmt: skip


def _gguf(folder: Path) -> list[bytes]:
    found = []
    for family, own in GGUF_SIZES.items():
        sizes = {"num_hidden_layers": 1, "hidden_size": 8, "vocab_size": 6, "head_dim": 6}
        sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 8}
        config = small_config(**(sizes | {"traits": FAMILIES[family]} | own))
        _write_gguf(folder / family, config)
        found.append((folder / family).read_bytes())
    return found


def _write_gguf(path: Path, config: mr.Qwen2Config) -> None:
    import gguf

    name = OF_FAMILY[config.traits.model_type]
    writer = gguf.GGUFWriter(path, name)
    add_sizes(writer, config)
    if name == "gemma3":  # pieces with scores
        writer.add_tokenizer_model("llama")
        writer.add_token_list(["<unk>", "<|x|>", "<0x0A>", "\u2581", "a", "\u2581a"])
        writer.add_token_types([2, 3, 6, 1, 1, 1])
        writer.add_token_scores([0.0, 0.0, 0.0, -2.0, -3.0, -1.0])
        writer.add_add_space_prefix(False)
        writer.add_unk_token_id(0)
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm" if name == "llama" else "qwen2")
        writer.add_token_list(["a", "<|x|>", "b", "ab", "c", "d"])
        writer.add_token_types([1, 3, 1, 1, 1, 1])
        writer.add_token_merges(["a b"])
    writer.add_eos_token_id(1)
    for full, shape in config.weight_shapes().items():
        module, kind = full.rsplit(".", 1)
        writer.add_tensor(f"{ARCHITECTURES[name].name(module)}.{kind}", np.ones(shape, np.float32))
    for tensor in divisors(config):
        writer.add_tensor(tensor.name, tensor.rows(0, tensor.shape[0]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


SEEDS: dict[str, Callable[[], list[bytes]]] = {
    name: _made(make)
    for name, make in {
        "config": _config, "settings": _settings, "safetensors": _safetensors,
        "checkpoint": _checkpoint, "adapter": _adapter, "mlx_adapter": _mlx_adapter,
        "tokenizer": _tokenizer, "text": _text, "jsonl": _jsonl, "golden": _golden,
        "sketch": _sketch, "resume": _resume, "gguf": _gguf,
    }.items()
}  # fmt: skip
