"""The bits of every method: hashes of loss and gradients, and the exact peak of memory.

Two checkouts compute the same when they print the same hashes on the same machine:

    python benchmarks/bits.py --out before.json        in the one
    python benchmarks/bits.py --against before.json    in the other

The model is random, large enough that every tiled op has several tiles; its base lies in float32 and
in MLX 4-bit; `trainable="all"` runs on float32. Uses the public names of mesp_ref alone.
"""

import argparse
import gc
import hashlib
import json
import subprocess
import sys
import tempfile
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

import mesp_ref as mr

CONFIG: dict[str, Any] = {
    "model_type": "qwen2", "vocab_size": 3001, "hidden_size": 256, "intermediate_size": 1536,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": True, "hidden_act": "silu",
    "max_position_embeddings": 1024,
}  # fmt: skip
WAYS = {
    "store_all": ("ram",), "mebp": ("ram", "disk"), "mesp": ("ram", "disk"),
    "mesp_tiled": ("ram", "disk", "offload"), "mesp_streamed": ("ram", "disk"),
    "mezo": ("ram",),
}  # fmt: skip


def shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the checkpoint, written out here: no part of the package is asked."""
    c, f = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    q, k = CONFIG["num_attention_heads"] * 64, CONFIG["num_key_value_heads"] * 64
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (CONFIG["vocab_size"], c)}
    for i in range(CONFIG["num_hidden_layers"]):
        at = f"model.layers.{i}."
        for name, out, into in (
            ("self_attn.q_proj", q, c), ("self_attn.k_proj", k, c), ("self_attn.v_proj", k, c),
            ("self_attn.o_proj", c, q), ("mlp.gate_proj", f, c), ("mlp.up_proj", f, c),
            ("mlp.down_proj", c, f),
        ):  # fmt: skip
            found[f"{at}{name}.weight"] = out, into
            if name[-6] in "qkv":
                found[f"{at}{name}.bias"] = (out,)
        found[f"{at}input_layernorm.weight"] = found[f"{at}post_attention_layernorm.weight"] = (c,)
    return found | {"model.norm.weight": (c,)}


def write_model(folder: Path) -> Path:
    """A checkpoint of seeded random numbers; no weight is 0 or 1."""
    folder.mkdir()
    rng = np.random.default_rng(7)
    arrays = {n: rng.standard_normal(s).astype(np.float32) * 0.1 for n, s in shapes().items()}
    save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    return folder


def cells(folder: Path) -> Iterator[tuple[str, dict[str, Any], Path]]:
    """Name, options of loss_and_grads and model of every measurement."""
    dense, packed = write_model(folder / "dense"), folder / "packed"
    subprocess.run(
        [sys.executable, "-m", "mesp_ref", "quantize", str(dense), str(packed)],
        check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    for base in (dense, packed):
        for method, places in WAYS.items():
            for place in places:
                for workers in (1, 2):
                    options = {"method": method, "checkpoints": place, "workers": workers}
                    yield f"{method} {place} {workers} {base.name} lora", options, base
                    if base == dense and method != "mezo":
                        options = options | {"trainable": "all"}
                        yield f"{method} {place} {workers} {base.name} all", options, base


def measured(model: Any, options: dict[str, Any], tokens: tuple[int, int]) -> dict[str, Any]:
    """Hash of the loss and of every gradient by name, and tracemalloc's peak above the start."""
    adapter = mr.init_lora(model.config, rank=8, alpha=16.0, seed=3, b_std=0.02)
    rng = np.random.default_rng(5)
    ids = rng.integers(0, CONFIG["vocab_size"], tokens)
    labels = np.where(rng.random(tokens) < 0.2, -100, ids)

    def run(emit: Any) -> float:
        return mr.loss_and_grads(model, adapter, ids, labels, on_gradients=emit, **options)[0]

    grads: dict[str, Any] = {}
    loss = run(lambda number, found: grads.update({n: g.copy() for n, g in found.items()}))
    digest = hashlib.sha256(np.float64(loss).tobytes())
    for name in sorted(grads):
        digest.update(name.encode() + np.ascontiguousarray(grads[name]).tobytes())
    grads.clear()
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    run(lambda number, found: None)
    peak = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    return {"sha256": digest.hexdigest(), "peak": peak}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="write what was found to this file")
    parser.add_argument("--against", type=Path, help="compare with such a file; 1 on a difference")
    args = parser.parse_args()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, options, path in cells(Path(folder)):
            for tokens in ((1, 200), (2, 300)):
                model = mr.load_model(path)
                found[f"{name} {tokens[0]}x{tokens[1]}"] = measured(model, options, tokens)
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if not args.against:
        print(f"{len(found)} cells")
        return 0
    want = json.loads(args.against.read_text(encoding="utf-8"))
    differ = [name for name in want if found[name]["sha256"] != want[name]["sha256"]]
    more = {n: found[n]["peak"] - want[n]["peak"] for n in want}
    print(f"{len(want) - len(differ)} of {len(want)} cells have the same bits")
    print(*(f"  differs: {name}" for name in differ), sep="\n")
    for name, by in sorted(more.items(), key=lambda item: -item[1]):
        print(f"{by:>10,} bytes  {name}")
    return int(bool(differ))


if __name__ == "__main__":
    raise SystemExit(main())
