"""llama.cpp, from the xllamacpp wheel, as the judge of GGUF files that are written here.

A probability is allowed four times the error of an emulation of llama.cpp's arithmetic, written out
below: weights in the type of the file, and the input of every product rounded to that type, too.
Nothing here needs torch: `pytest --noconftest tests/parity/test_gguf.py`.
"""

import json
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from helpers import CHATML, GPT2, QWEN, STOP, byte_level_tokenizer
from safetensors.numpy import load_file
from smollm2 import smollm2_directory

import mesp_ref as mr
from mesp_ref.cli import main
from mesp_ref.engine.init import init_lora, random_arrays
from mesp_ref.files.checkpoint import save_checkpoint
from mesp_ref.files.default import default_checkpoint
from mesp_ref.files.peft import save_adapter

llama = pytest.importorskip("xllamacpp")

TEXTS = (
    "Once upon a time", "It's 12:45,  they'll say <|im_start|>user\nno\t\n\n", "naïve 日本語 🙂 1234",
)  # fmt: skip
PROMPTS = ([3, 1, 4, 1, 5, 9, 2, 6], [271, 33], list(range(40, 90)))
Cast = Callable[[np.ndarray], np.ndarray]


# ----------------------------------------------------------------------------------------- llama.cpp


class Llama:
    """A loaded model, on one thread, with keys and values in float32 as ours are."""

    def __init__(self, model: Path, adapter: Path | None = None):
        params = llama.CommonParams()
        params.model.path = str(model)
        params.n_ctx, params.n_gpu_layers, params.warmup, params.ui = 256, 0, False, False
        params.fit_params, params.verbosity = False, 0
        params.cache_type_k = params.cache_type_v = llama.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        if adapter is not None:
            params.lora_adapters = [llama.CommonAdapterLoraInfo(str(adapter), 1.0)]
        self.server = llama.Server(params)

    def ask(self, route: str, question: dict[str, Any]) -> dict[str, Any]:
        """What the model's server answers, on this machine, past any proxy."""
        request = urllib.request.Request(
            f"{self.server.listening_address}/{route}", json.dumps(question).encode(),
            {"Content-Type": "application/json"},
        )  # fmt: skip
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=60) as answer:
            found: dict[str, Any] = json.loads(answer.read())
        return found

    def complete(self, prompt: Sequence[int], count: int, top: int = 0) -> dict[str, Any]:
        """The next tokens, the likeliest one each time, with the probabilities of the `top`."""
        return self.ask("completion", {
            "prompt": list(prompt), "n_predict": count, "temperature": 0, "n_probs": top,
            "cache_prompt": False, "return_tokens": True,
        })  # fmt: skip

    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        tokens: list[int] = self.complete(prompt, count)["tokens"]
        return tokens

    def logprobs(self, prompt: Sequence[int], size: int) -> np.ndarray:
        """Logarithms of the probabilities of every next token."""
        [token] = self.complete(prompt, 1, size)["completion_probabilities"]
        found = np.full(size, np.nan)
        for each in token["top_logprobs"]:
            found[each["id"]] = each["logprob"]
        return found

    def tokenize(self, text: str) -> list[int]:
        question = {"content": text, "add_special": True, "parse_special": True}
        tokens: list[int] = self.ask("tokenize", question)["tokens"]
        return tokens


# ----------------------------------------------------------------------------------------- emulation


def blocks_of_32(x: np.ndarray) -> np.ndarray:
    """Rounded as Q8_0: d = max|x|/127 in float16, and whole multiples of it."""
    if x.shape[-1] % 32:
        return x.astype(np.float16).astype(np.float32)
    parts = x.astype(np.float32).reshape(*x.shape[:-1], -1, 32)
    d = np.abs(parts).max(axis=-1, keepdims=True) / np.float32(127)
    q = np.rint(parts / np.where(d == 0, 1, d))
    return (q * d.astype(np.float16).astype(np.float32)).reshape(x.shape)


def through(dtype: Any) -> Cast:
    return lambda x: x.astype(dtype).astype(np.float32)


CASTS: dict[str, Cast] = {
    "f32": through(np.float32), "f16": through(np.float16), "bf16": through(ml_dtypes.bfloat16),
    "q8_0": blocks_of_32,
}  # fmt: skip


def emulated(weights: dict[str, np.ndarray], config: mr.Qwen2Config, ids: list[int], cast: Cast,
             updates: dict[str, np.ndarray]) -> np.ndarray:  # fmt: skip
    """Logits of the last token in float32, inputs of products cast; Qwen2 from its equations."""
    H, G, D, T = (
        config.num_attention_heads, config.num_key_value_heads, config.head_dim, len(ids),
    )  # fmt: skip
    weights = {n: cast(w) if w.ndim == 2 else w.astype(np.float32) for n, w in weights.items()}

    def linear(x: np.ndarray, module: str) -> np.ndarray:
        y = cast(x) @ weights[f"{module}.weight"].T + weights.get(f"{module}.bias", np.float32(0))
        return y + x @ updates[module].T.astype(np.float32) if module in updates else y

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        size = np.sqrt((x * x).mean(axis=-1, keepdims=True) + np.float32(config.rms_norm_eps))
        return x / size * weights[f"{name}.weight"]

    angle = np.arange(T)[:, None] * config.rope_theta ** (-np.arange(0, D, 2) / D)
    cos, sin = (f(angle)[:, None].astype(np.float32) for f in (np.cos, np.sin))

    def turned(x: np.ndarray) -> np.ndarray:
        a, b = x[..., : D // 2], x[..., D // 2 :]
        return np.concatenate((a * cos - b * sin, b * cos + a * sin), axis=-1)

    x = weights["model.embed_tokens.weight"][ids]
    for i in range(config.num_hidden_layers):
        at = f"model.layers.{i}"
        n = norm(x, f"{at}.input_layernorm")
        q = turned(linear(n, f"{at}.self_attn.q_proj").reshape(T, H, D))
        k = turned(linear(n, f"{at}.self_attn.k_proj").reshape(T, G, D))
        v = linear(n, f"{at}.self_attn.v_proj").reshape(T, G, D)
        k, v = np.repeat(k, H // G, axis=1), np.repeat(v, H // G, axis=1)
        scores = np.einsum("thd,shd->hts", q, k) / np.float32(np.sqrt(D))
        scores = np.where(np.tri(T, dtype=bool), scores, -np.inf)
        p = np.exp(scores - scores.max(axis=-1, keepdims=True))
        mixed = np.einsum("hts,shd->thd", p / p.sum(axis=-1, keepdims=True), v)
        x = x + linear(mixed.reshape(T, H * D), f"{at}.self_attn.o_proj")
        n = norm(x, f"{at}.post_attention_layernorm")
        gate = linear(n, f"{at}.mlp.gate_proj")
        hidden = gate / (1 + np.exp(-gate)) * linear(n, f"{at}.mlp.up_proj")
        x = x + linear(hidden, f"{at}.mlp.down_proj")
    head = "model.embed_tokens" if config.tie_word_embeddings else "lm_head"
    logits: np.ndarray = linear(norm(x[-1:], "model.norm"), head)[0]
    return logits


def log_softmax(z: np.ndarray) -> np.ndarray:
    z = z.astype(np.float64) - z.max()
    return z - np.log(np.exp(z).sum())


# ------------------------------------------------------------------------------------------ fixtures


def random_directory(path: Path, pattern: str, tied: bool) -> Path:
    """A random model with biases, more rows than tokens, and rows that blocks of 32 do not fill."""
    tokenizer = byte_level_tokenizer(pattern)
    config = mr.Qwen2Config(
        vocab_size=320, hidden_size=80, intermediate_size=96, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=20, rms_norm_eps=1e-5,
        rope_theta=5000.0, max_position_embeddings=256, tie_word_embeddings=tied,
        eos_token_id=(0, tokenizer.token_to_id(STOP)),
    )  # fmt: skip
    rng = np.random.default_rng(11)
    arrays = {
        n: w + rng.standard_normal(w.shape).astype("f4") * 0.3 if w.ndim == 1 else w
        for n, w in random_arrays(config, seed=12, std=0.2).items()
    }
    path.mkdir()
    save_checkpoint(config, arrays, path)
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {"chat_template": CHATML, "eos_token": STOP}
    (path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return path


@pytest.fixture(scope="module", params=["story", "gpt-2", "qwen2"])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "story":
        return default_checkpoint()
    pattern = {"gpt-2": GPT2, "qwen2": QWEN}[request.param]
    return random_directory(
        tmp_path_factory.mktemp("m") / "model", pattern, request.param == "gpt-2"
    )


@pytest.fixture(scope="module", params=list(CASTS))
def pair(
    request: pytest.FixtureRequest, directory: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, Path]:
    """A type, and the model's file in it."""
    out = tmp_path_factory.mktemp("gguf") / "model.gguf"
    assert main(["convert", "gguf-model", str(directory), str(out), "--type", request.param]) == 0
    return request.param, directory, out


def adapter_of(directory: Path, out: Path, rslora: bool) -> tuple[Any, Path]:
    """An adapter with a B of its own, as PEFT and as GGUF."""
    config = mr.load_model(directory).config
    adapter = init_lora(
        config, rank=4, alpha=6.0, targets="q_proj,v_proj,o_proj,down_proj" if rslora else "all",
        seed=3, b_std=0.05, use_rslora=rslora,
    )  # fmt: skip
    save_adapter(adapter, out / "peft")
    file = out / "adapter.gguf"
    command = ["convert", "gguf-adapter", str(out / "peft"), str(file), "--base", str(directory)]
    assert main(command) == 0
    return adapter, file


def ours(directory: Path, prompt: list[int], adapter: Any = None) -> np.ndarray:
    model = mr.load_model(directory, "float64")
    adapter = None if adapter is None else adapter.astype(np.float64)
    return log_softmax(mr.logits(model, [prompt], adapter)[0, -1])


def emulation(directory: Path, kind: str, prompt: list[int], adapter: Any = None) -> np.ndarray:
    model = mr.load_model(directory)
    weights = {name: np.array(table[...]) for name, table in model.weights.items()}
    updates = {} if adapter is None else {
        m: adapter.scale * (p[1] @ p[0])
        for m in {name.rpartition(".")[0] for name in weights} if (p := adapter.pair(m))
    }  # fmt: skip
    return log_softmax(emulated(weights, model.config, prompt, CASTS[kind], updates))


def agree(judge: Llama, directory: Path, kind: str, adapter: Any = None) -> None:
    for prompt in PROMPTS:
        want = ours(directory, prompt, adapter)
        allowed = 4 * np.abs(emulation(directory, kind, prompt, adapter) - want).max()
        error = np.abs(judge.logprobs(prompt, len(want)) - want).max()
        assert 0 < allowed < {"f32": 1e-4}.get(kind, 2)
        print(f"{directory.name} {kind} {len(prompt)}: {error:.1e} of {allowed:.1e}")
        assert np.isfinite(error)
        assert error <= allowed


def own_greedy(directory: Path, prompt: list[int], count: int, adapter: Any = None) -> list[int]:
    model = mr.load_model(directory)
    [tokens] = mr.generate(
        model, [prompt], max_new_tokens=count, temperature=0, adapter=adapter
    )  # fmt: skip
    return [int(t) for t in tokens][-count:]


def same_next_tokens(judge: Llama, directory: Path, prompts: list[list[int]]) -> list[bool]:
    """Whether llama.cpp's next token is ours, along 64 tokens of our own greedy text."""
    same = list[bool]()
    for prompt in prompts:
        text = own_greedy(directory, prompt, 64)
        same += [judge.greedy(prompt + text[:i], 1) == [text[i]] for i in range(len(text))]
    return same


# --------------------------------------------------------------------------------------------- tests


def test_probabilities(pair: tuple[str, Path, Path]) -> None:
    kind, directory, file = pair
    agree(Llama(file), directory, kind)


@pytest.mark.parametrize("rslora", [False, True])
def test_probabilities_with_an_adapter(
    pair: tuple[str, Path, Path], rslora: bool, tmp_path: Path
) -> None:
    kind, directory, file = pair
    adapter, lora = adapter_of(directory, tmp_path, rslora)
    judge = Llama(file, lora)
    agree(judge, directory, kind, adapter)
    plain = ours(directory, PROMPTS[0])
    far = np.abs(judge.logprobs(PROMPTS[0], len(plain)) - plain).max()
    assert far > 0.05  # the adapter is no ornament


def test_greedy_text(directory: Path, tmp_path: Path) -> None:
    """In float32 the same 64 tokens, without an adapter, with it, and merged."""
    base, merged = tmp_path / "base.gguf", tmp_path / "merged.gguf"
    adapter, lora = adapter_of(directory, tmp_path, rslora=True)
    model, peft = str(directory), str(tmp_path / "peft")
    assert main(["convert", "gguf-model", model, str(base), "--type", "f32"]) == 0
    assert (
        main(["merge", "--model", model, "--adapter", peft, "--out", str(tmp_path / "whole")]) == 0
    )
    assert main(["convert", "gguf-model", str(tmp_path / "whole"), str(merged)]) == 0
    plain, adapted, whole = Llama(base), Llama(base, lora), Llama(merged)
    compared = 0
    for prompt in PROMPTS:
        want = own_greedy(directory, prompt, 64)
        assert plain.greedy(prompt, 64)[: len(want)] == want
        changed = own_greedy(directory, prompt, 64, adapter)
        assert adapted.greedy(prompt, 64)[: len(changed)] == changed
        assert whole.greedy(prompt, 64)[: len(changed)] == changed
        compared += len(want) + len(changed)
    assert compared > 3 * 64


def test_next_tokens_of_q8_0(tmp_path: Path) -> None:
    """Along the story model's own greedy text 95 % of the next tokens stay as they are."""
    directory, file = default_checkpoint(), tmp_path / "story.gguf"
    assert main(["convert", "gguf-model", str(directory), str(file), "--type", "q8_0"]) == 0
    same = same_next_tokens(Llama(file), directory, [[0], [0, 602], [0, 587]])
    print(f"{sum(same)} of {len(same)}")
    assert sum(same) >= 0.95 * len(same)


def test_tokens(directory: Path, tmp_path: Path) -> None:
    file, tokenizer = tmp_path / "m.gguf", mr.load_tokenizer(directory)
    assert main(["convert", "gguf-model", str(directory), str(file)]) == 0
    judge = Llama(file)
    for text in TEXTS:
        assert judge.tokenize(text) == tokenizer.encode(text).ids


def test_every_end_ends(tmp_path: Path) -> None:
    """Three ends that llama.cpp does not know by their names, each preferred by a head of its own;
    another token that is preferred so ends nothing."""
    directory = random_directory(tmp_path / "model", QWEN, tied=False)
    model, settings = mr.load_model(directory), {"chat_template": CHATML}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    arrays = {name: np.array(table[...]) for name, table in model.weights.items()}
    config, ends = replace(model.config, eos_token_id=(90, 200, 7)), (90, 200, 7)
    for preferred in (*ends, 150):
        row = np.random.default_rng(0).standard_normal(config.hidden_size).astype("f4")
        head = np.zeros_like(arrays["lm_head.weight"])
        head[preferred], head[151] = row, -row
        save_checkpoint(config, arrays | {"lm_head.weight": head}, directory)
        if ours(directory, PROMPTS[0])[preferred] < ours(directory, PROMPTS[0])[151]:
            save_checkpoint(config, arrays | {"lm_head.weight": -head}, directory)
        file = tmp_path / f"{preferred}.gguf"
        assert main(["convert", "gguf-model", str(directory), str(file)]) == 0
        written = Llama(file).greedy(PROMPTS[0], 5)
        assert written[:1] == [preferred] or not written
        assert len(written) == (5 if preferred == 150 else len(written[:1]))


@pytest.mark.slow
def test_a_real_model(tmp_path: Path) -> None:
    """SmolLM2-135M: the same bytes there and back, the same 64 tokens in float32, and in q8_0 95 %
    of the next tokens along them."""
    directory = smollm2_directory()
    judges = {}
    for kind in ("f32", "q8_0"):
        file = tmp_path / f"{kind}.gguf"
        assert main(["convert", "gguf-model", str(directory), str(file), "--type", kind]) == 0
        judges[kind] = Llama(file)
    assert main(["convert", "gguf", str(tmp_path / "f32.gguf"), str(tmp_path / "back")]) == 0
    old, new = (load_file(path / "model.safetensors") for path in (directory, tmp_path / "back"))
    assert old.keys() == new.keys()
    assert all(old[name].tobytes() == new[name].tobytes() for name in old)
    tokenizer, same = mr.load_tokenizer(directory), list[bool]()
    for text in ("The capital of France is", "def fibonacci(n):\n    "):
        ids = tokenizer.encode(text).ids
        assert judges["f32"].tokenize(text) == ids
        want = own_greedy(directory, ids, 64)
        assert judges["f32"].greedy(ids, 64)[: len(want)] == want
        same += [judges["q8_0"].greedy(ids + want[:i], 1) == [want[i]] for i in range(len(want))]
    print(f"{sum(same)} of {len(same)}")
    assert sum(same) >= 0.95 * len(same)
