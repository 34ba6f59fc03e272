"""One system in a process of its own: it loads a model, then does as it is told, line by line.

    python contender.py SYSTEM MODEL ADAPTER IDS THREADS

SYSTEM is "torch", "torch checkpointed", "torch compiled", "jax", "mlx", or a method of mesp_ref with
where its checkpoints are, "mesp_tiled disk". MODEL is a checkpoint directory, ADAPTER a PEFT
directory, IDS a .npy file. A process of its own keeps thread pools, allocators and peaks of memory
apart. What is imported here counts as this process's memory, so each system imports only what it
needs.

Commands on standard input, one JSON answer a line on standard output:
    step        one SGD step: {"loss": …, "read": how often it waited for the disk}
    gradients FILE   {"loss": …}; the gradients of the first batch, written as .npz
    reset       the adapter as it was at the start: {}
    traced      {"bytes": …}, the peak of NumPy's bytes above the model, by tracemalloc
    gemm        {"rate": …}, FLOP/s of the system's own [256, 896]·[896, 4864]
    generate N  {"tokens": …, "cpu": …, "wall": …}; greedy from N prompts, with a cache
"""

import json
import os
import resource
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

LEARNING_RATE = 1e-4
M, K, N = 256, 896, 4864
FILE = "model.safetensors"
PROMPT, NEW = 16, 32  # tokens of a prompt, and tokens that it is continued by
Stages = dict[str, float]  # what a process has done so far -> its anonymous memory, MiB


class Files(NamedTuple):
    """What every contender is given."""

    model: Path
    adapter: Path
    ids: Path
    threads: int


def anonymous_mib(pid: int | str = "self") -> float:
    """Resident anonymous memory of a process in MiB: no mapped files. 0 where it is unknown."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0.0
    found = (line.split()[1] for line in lines if line.startswith("RssAnon:"))
    return int(next(found, "0")) / 1024


class Ours:
    """A method of mesp_ref, gradients handed to SGD block by block, weights mapped."""

    def __init__(self, system: str, files: Files, stages: Stages):
        self.method, _, kind = system.partition(" ")
        self.files, self.checkpoints = files, kind or "ram"
        self.workers = files.threads
        import numpy as np

        stages["NumPy"] = anonymous_mib()
        import mesp_ref as mr
        from mesp_ref.train.optim import SGD

        stages["mesp_ref"] = anonymous_mib()
        small = np.ones((M, M), np.float32)
        small = small @ small
        del small
        stages["buffers of BLAS, at the first product"] = anonymous_mib()
        self.mr, self.np = mr, np
        self.model, self.ids = mr.load_model(files.model), np.load(files.ids)
        stages["model, mapped"] = anonymous_mib()
        self.optimiser = SGD()
        self.reset()
        stages["LoRA parameters"] = anonymous_mib()

    def reset(self) -> None:
        self.adapter = self.mr.load_adapter(self.files.adapter)

    def _run(self, take: Any) -> tuple[float, dict[str, Any]]:
        loss, grads = self.mr.loss_and_grads(
            self.model, self.adapter, self.ids, self.ids, method=self.method,
            checkpoints=self.checkpoints, on_gradients=take, workers=self.workers,
        )  # fmt: skip
        return loss, grads

    def _update(self, layer: int, grads: dict[str, Any]) -> None:
        self.optimiser.step(self.adapter.weights, grads, LEARNING_RATE)

    def step(self) -> float:
        return self._run(self._update)[0]

    def gradients(self) -> tuple[float, dict[str, Any]]:
        return self._run(None)

    def traced(self) -> int:
        import tracemalloc

        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        self.step()
        peak = tracemalloc.get_traced_memory()[1] - before
        tracemalloc.stop()
        return peak

    def generate(self, prompts: list[list[int]]) -> list[list[int]]:
        from mesp_ref.engine.generate import generate

        return generate(self.model, prompts, self.adapter, NEW, eos_token_id=None)

    def gemm(self) -> Callable[[], object]:
        x, w = (self.np.full(shape, 0.5, self.np.float32) for shape in ((M, K), (N, K)))
        return lambda: x @ w.T

    def versions(self) -> list[str]:
        return [f"numpy {self.np.__version__}"]


class Torch:
    """transformers' Qwen2 with a peft adapter on the same mapped weights; sdpa attention."""

    def __init__(self, system: str, files: Files, stages: Stages):
        import numpy as np
        import peft
        import torch
        import transformers

        tune: Any = transformers.logging  # untyped
        torch.set_num_threads(files.threads)
        tune.set_verbosity_error()
        self.torch, self.peft, self.files = torch, peft, files
        stages["NumPy, torch, transformers, peft"] = anonymous_mib()
        model = _qwen2_on_mapped_weights(files.model)
        self._versions = [f"{m.__name__} {m.__version__}" for m in (torch, transformers, peft)]
        self.ids = torch.from_numpy(np.load(files.ids))
        settings = peft.LoraConfig.from_pretrained(str(files.adapter))
        settings.inference_mode = False
        self.model = peft.get_peft_model(model, settings)
        if "checkpointed" in system:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.model.train()  # without dropout; transformers checkpoints in training mode only
        self.call: Any = torch.compile(self.model) if "compiled" in system else self.model
        self.reset()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimiser = torch.optim.SGD(trained, lr=LEARNING_RATE)
        stages["model, mapped; LoRA parameters"] = anonymous_mib()
        self.compiling = 0.0
        if "compiled" in system:
            begin = time.perf_counter()
            self._backward()
            self.model.zero_grad(set_to_none=True)
            self.compiling = time.perf_counter() - begin
            stages["compiled"] = anonymous_mib()

    def reset(self) -> None:
        state = self.peft.load_peft_weights(str(self.files.adapter), device="cpu")
        found: Any = self.peft.set_peft_model_state_dict(self.model, state)
        assert not found.unexpected_keys, found.unexpected_keys
        self.model.zero_grad(set_to_none=True)

    def _backward(self) -> float:
        loss = self.call(input_ids=self.ids, labels=self.ids, use_cache=False).loss
        loss.backward()
        return float(loss.detach())

    def step(self) -> float:
        loss = self._backward()
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        return loss

    def gradients(self) -> tuple[float, dict[str, Any]]:
        loss = self._backward()
        named = {
            name.replace(".default", ""): p.grad.numpy()
            for name, p in self.model.named_parameters()
            if p.grad is not None
        }
        self.model.zero_grad(set_to_none=True)
        return loss, named

    def generate(self, prompts: list[list[int]]) -> list[list[int]]:
        ids = self.torch.tensor(prompts)
        self.model.eval()
        with self.torch.no_grad():
            out = self.model.generate(
                input_ids=ids, attention_mask=self.torch.ones_like(ids), max_new_tokens=NEW,
                min_new_tokens=NEW, do_sample=False, use_cache=True, pad_token_id=0,
            )  # fmt: skip
        self.model.train()
        found: list[list[int]] = out[:, ids.shape[1] :].tolist()
        return found

    def gemm(self) -> Callable[[], object]:
        x, w = self.torch.full((M, K), 0.5), self.torch.full((N, K), 0.5)
        return lambda: x @ w.T

    def versions(self) -> list[str]:
        return self._versions


def _qwen2_on_mapped_weights(folder: Path) -> Any:
    """Qwen2ForCausalLM whose parameters are torch.from_numpy of mesp_ref's mapped arrays."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

    from mesp_ref.files.safetensors import MappedFile

    config = Qwen2Config.from_pretrained(folder, attn_implementation="sdpa")
    with torch.device("meta"):
        model = Qwen2ForCausalLM(config)
    file = MappedFile(folder / FILE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the arrays are read-only, and stay frozen
        state = {name: torch.from_numpy(file.raw(name)) for name in file}
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    assert not unexpected, unexpected
    assert set(missing) <= {"lm_head.weight"}, missing
    model.tie_weights()
    model.model.rotary_emb = Qwen2RotaryEmbedding(config)
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    return model


class Jax:
    """The step of jax_step.py, compiled as one function; weights lie in buffers of JAX's own."""

    def __init__(self, system: str, files: Files, stages: Stages):
        if files.threads == 1:  # XLA takes as many threads as the process may use cores
            os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        import jax
        import numpy as np
        from jax_step import step

        from mesp_ref.files.safetensors import MappedFile

        self.jax, self.np, self.mapped, self.files = jax, np, MappedFile, files
        stages["NumPy, JAX"] = anonymous_mib()
        self.weights = self._put(files.model / FILE)
        self.ids = jax.device_put(np.load(files.ids).astype(np.int32))
        self.reset()
        self.gemm()()
        stages["model; LoRA parameters"] = anonymous_mib()
        begin, scale = time.process_time(), _scale(files.adapter)
        run = jax.jit(step(_config(files.model), scale, LEARNING_RATE), donate_argnums=0)
        self.run = run.lower(self.lora, self.weights, self.ids).compile()
        self.compiling = time.process_time() - begin
        stages["compiled"] = anonymous_mib()

    def _put(self, path: Path) -> dict[str, Any]:
        """A file's tensors as arrays of JAX."""
        file = self.mapped(path)
        return {name: self.jax.device_put(file.raw(name)) for name in file}

    def reset(self) -> None:
        self.lora = self._put(self.files.adapter / "adapter_model.safetensors")

    def step(self) -> float:
        loss, _, self.lora = self.run(self.lora, self.weights, self.ids)
        self.jax.block_until_ready(self.lora)
        return float(loss)

    def gradients(self) -> tuple[float, dict[str, Any]]:
        loss, grads, self.lora = self.run(self.lora, self.weights, self.ids)
        return float(loss), {name: self.np.asarray(g) for name, g in grads.items()}

    def gemm(self) -> Callable[[], object]:
        x, w = (self.jax.numpy.full(shape, 0.5) for shape in ((M, K), (N, K)))
        product = self.jax.jit(lambda x, w: x @ w.T)
        return lambda: product(x, w).block_until_ready()

    def versions(self) -> list[str]:
        return [f"jax {self.jax.__version__}"]


class Mlx:
    """mlx-lm's Qwen2 with its LoRA layers, on whatever device this build of MLX has."""

    def __init__(self, system: str, files: Files, stages: Stages):
        import mlx.core as mx
        import mlx.nn as nn
        import mlx_lm
        import numpy as np
        from mlx.optimizers import SGD

        self.mx, self.files = mx, files
        self.model = self._load(files.model)
        self.ids = mx.array(np.load(files.ids))
        self._versions = [f"mlx {mx.__version__}", f"mlx-lm {mlx_lm.__version__}"]
        self.optimiser, self.device = SGD(LEARNING_RATE), str(mx.default_device())
        self.value_and_grad = nn.value_and_grad(self.model, self._loss)
        self.cross_entropy = nn.losses.cross_entropy
        self.reset()

    def _load(self, folder: Path) -> Any:
        from mlx_lm.models.qwen2 import Model, ModelArgs
        from mlx_lm.tuner.utils import linear_to_lora_layers

        config = _config(folder)
        model = Model(ModelArgs.from_dict(config))
        model.load_weights(str(folder / FILE), strict=True)
        model.freeze()
        settings = json.loads((self.files.adapter / "adapter_config.json").read_text("utf-8"))
        parameters = {"rank": settings["r"], "scale": _scale(self.files.adapter)}
        layers = config["num_hidden_layers"]
        linear_to_lora_layers(model, layers, parameters | {"dropout": 0.0})
        model.train()
        return model

    def reset(self) -> None:
        """PEFT's A [R, in] and B [out, R] as mlx-lm's lora_a [in, R] and lora_b [R, out]."""
        held = self.mx.load(str(self.files.adapter / "adapter_model.safetensors"))
        named = []
        for name, value in held.items():
            short = name.removeprefix("base_model.model.").removesuffix(".weight")
            short = short.replace("lora_A", "lora_a").replace("lora_B", "lora_b")
            named.append((short, value.T))
        self.model.load_weights(named, strict=False)

    def _loss(self, model: Any, ids: Any) -> Any:
        return self.cross_entropy(model(ids[:, :-1]), ids[:, 1:]).mean()

    def step(self) -> float:
        loss, grads = self.value_and_grad(self.model, self.ids)
        self.optimiser.update(self.model, grads)
        self.mx.eval(loss, self.model.parameters())
        return float(loss.item())

    def gemm(self) -> Callable[[], object]:
        x, w = self.mx.full((M, K), 0.5), self.mx.full((N, K), 0.5)
        self.mx.eval(x, w)
        return lambda: self.mx.eval(x @ w.T)

    def versions(self) -> list[str]:
        return [*self._versions, self.device]


def _config(folder: Path) -> dict[str, Any]:
    """A checkpoint's config.json."""
    held: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return held


def _scale(adapter: Path) -> float:
    """alpha ÷ rank of a PEFT directory."""
    settings = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    return float(settings["lora_alpha"] / settings["r"])


def _rate(gemm: Callable[[], object]) -> float:
    """FLOP/s, the best of several calls in half a second."""
    best, end = float("inf"), time.perf_counter() + 0.5
    while time.perf_counter() < end:
        begin = time.perf_counter()
        gemm()
        best = min(best, time.perf_counter() - begin)
    return 2 * M * K * N / best


def _major_faults() -> int:
    """Pages of mapped files that this process had to wait for."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt


def _answer(contender: Any, command: str, *argument: str) -> dict[str, Any]:
    if command == "step":
        before = _major_faults()
        loss = contender.step()
        return {"loss": loss, "read": _major_faults() - before}
    if command == "gradients":
        import numpy as np

        loss, grads = contender.gradients()
        np.savez(argument[0], **grads)
        return {"loss": loss}
    if command == "reset":
        contender.reset()
        return {}
    if command == "generate":
        rows = contender.ids[0, : PROMPT * int(argument[0])].reshape(-1, PROMPT).tolist()
        begin = time.process_time(), time.perf_counter()
        tokens = contender.generate(rows)
        end = time.process_time(), time.perf_counter()
        return {"tokens": tokens, "cpu": end[0] - begin[0], "wall": end[1] - begin[1]}
    if command == "traced":
        return {"bytes": contender.traced()}
    if command == "gemm":
        return {"rate": _rate(contender.gemm())}
    raise ValueError(command)


def main() -> int:
    """Answer until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints does not mix with the answers
    system, *paths, threads = sys.argv[1:]
    model, adapter, ids = map(Path, paths)
    files = Files(model, adapter, ids, int(threads))
    stages: Stages = {"Python": anonymous_mib()}
    if system != "mlx":  # which has an environment of its own, without mesp_ref
        from mesp_ref.lean.allocator import (
            keep_freed_memory,  # now: its imports are a stage of ours
        )

        keep_freed_memory()  # as the command line does; for torch too
    kinds: dict[str, Any] = {"torch": Torch, "jax": Jax, "mlx": Mlx}
    contender = kinds.get(system.split()[0], Ours)(system, files, stages)
    ready = {"stages": stages, "versions": contender.versions()}
    ready["compiling"] = getattr(contender, "compiling", 0.0)
    print(json.dumps(ready), file=answers, flush=True)
    for line in sys.stdin:
        answer = _answer(contender, *line.rstrip("\n").split(maxsplit=1))
        print(json.dumps(answer), file=answers, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
