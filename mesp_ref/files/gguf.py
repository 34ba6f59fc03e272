"""GGUF files of llama and qwen2 models: metadata, tensors under their Hugging Face names.

Two things differ from a Qwen2 checkpoint in a llama file: it has no q/k/v biases, and llama.cpp
stores the rows of q and k in the order of interleaved RoPE. Needs the `gguf` package.
"""

import contextlib
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mesp_ref.engine.config import PROJECTIONS, Qwen2Config
from mesp_ref.errors import MespRefError, shown
from mesp_ref.files.gguf_layout import check_layout
from mesp_ref.files.safetensors import identity
from mesp_ref.files.strict import inside, open_regular
from mesp_ref.ops import Array

ARCHITECTURES = ("llama", "qwen2")
# Dense types, the first generation of blocks, and K-quants; of a row that a K-quant's 256 weights do
# not fill, llama.cpp's quantiser makes one of the first.
TYPES = (
    "F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0",
    "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K",
)  # fmt: skip

# What is known of the keys under the architecture's name; vocab_size is that of the embedding.
_KEYS = (
    "context_length", "embedding_length", "block_count", "feed_forward_length", "vocab_size",
    "attention.head_count", "attention.head_count_kv", "attention.layer_norm_rms_epsilon",
    "attention.key_length", "attention.value_length", "rope.freq_base", "rope.dimension_count",
    "rope.scaling.type",
)  # fmt: skip

# GGUF name of a module -> Hugging Face name; those of a block stand under model.layers.N.
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": PROJECTIONS["q_proj"],
    "attn_k": PROJECTIONS["k_proj"],
    "attn_v": PROJECTIONS["v_proj"],
    "attn_output": PROJECTIONS["o_proj"],
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": PROJECTIONS["gate_proj"],
    "ffn_up": PROJECTIONS["up_proj"],
    "ffn_down": PROJECTIONS["down_proj"],
}
_BLOCK_NAMES = {path: gguf for gguf, path in _BLOCK.items()}

_PART_NAME, _PARTS = re.compile(r".*-(\d{5})-of-(\d{5})\.gguf"), 10_000


class Tensor(NamedTuple):
    """A tensor in its file's blocks, one row of bytes (or numbers) per row of the matrix."""

    data: Array
    kind: str  # one of TYPES
    shape: tuple[int, ...]

    def dequantize(self, a: int, b: int) -> Array:
        """Rows a … b−1 in float32, as ggml computes them: Q4_1 is d·q + m, Q8_0 is d·q."""
        from gguf import GGMLQuantizationType, dequantize

        vector = len(self.shape) == 1  # lies in the file as one row
        data = self.data.reshape(1, -1) if vector else self.data[a:b]
        w: Array = dequantize(data, GGMLQuantizationType[self.kind])
        return (w[0, a:b] if vector else w).astype(np.float32, copy=False)


class Part:
    """One GGUF file: a whole model, or a part of one that was split."""

    def __init__(self, path: Path):
        self.path = path
        self.reader, self._identity = _open(path)

    def check_unchanged(self) -> None:
        """Raise MespRefError when the file is no longer the one that was opened."""
        now: object = "nothing"
        with contextlib.suppress(OSError):
            now = identity(self.path.stat())
        if now != self._identity:
            raise MespRefError(
                f"{self.path}: changed while in use (found inode, size and time {now}, expected "
                f"{self._identity}); start again"
            )

    def get(self, key: str, default: Any = None) -> Any:
        """A value of the metadata, `default` where the file has none."""
        field = self.reader.get_field(key)
        try:
            return default if field is None else field.contents()
        except Exception as error:  # the package trusts the file
            raise MespRefError(
                f"{self.path}: {key}: not readable ({shown(str(error))}); damaged, fetch the file again"
            ) from None


class Gguf:
    """An open GGUF model; `file[key]` is a value of its metadata.

    Of a model that was split `path` is the first part, which has the metadata; the others, NAME-
    00002-of-00003.gguf and so on, are found beside it.
    Raises MespRefError for a file that is missing, truncated, not GGUF or of another architecture,
    for parts that do not belong together, and, key by key, for metadata that is missing.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.parts = _open_parts(self.path)
        self._reader = self.parts[0].reader
        self.architecture = self.expect("general.architecture", *ARCHITECTURES)

    def check_unchanged(self) -> None:
        """Raise MespRefError when a file is no longer the one that was opened."""
        for part in self.parts:
            part.check_unchanged()

    def get(self, key: str, default: Any = None) -> Any:
        """A value of the metadata, `default` where the file has none."""
        return self.parts[0].get(key, default)

    def stored(self) -> Iterator[tuple[Path, Any]]:
        """Every tensor as the gguf package describes it, and the file it lies in."""
        for part in self.parts:
            for tensor in part.reader.tensors:
                yield part.path, tensor

    def __getitem__(self, key: str) -> Any:
        if self._reader.get_field(key) is None:
            raise MespRefError(f"{self.path}: {key}: missing, expected in the GGUF metadata")
        return self.get(key)

    def expect(self, key: str, *allowed: str) -> str:
        """The value of `key`, one of those allowed."""
        found: str = self[key]
        if found not in allowed:
            expected = " or ".join(map(repr, allowed))
            raise MespRefError(f"{self.path}: {key}: found {shown(found)}, expected {expected}")
        return found

    def list_of(self, key: str, kind: type) -> list[Any]:
        """The list at `key`, all of whose elements are of one type."""
        found = self[key]
        if not isinstance(found, list) or not all(type(item) is kind for item in found):
            raise MespRefError(
                f"{self.path}: {key}: found {shown(found)}, expected a list of {kind.__name__}"
            )
        return found

    def config(self) -> Qwen2Config:
        """The config of the Qwen2 model that computes what the file describes.

        Raises MespRefError for scaled RoPE, which the engine does not compute, and for keys of the
        architecture that are unknown: experts, soft caps, windows, scales.
        """
        self._check_keys()

        def read(key: str, most: float = 2**31) -> Any:
            value = self[f"{self.architecture}.{key}"]
            if not isinstance(value, (int, float)) or not 0 < value <= most:
                raise MespRefError(
                    f"{self.path}: {self.architecture}.{key}: found {shown(value)}, expected a "
                    f"number between 0 and {most}"
                )
            return value

        hidden, heads = read("embedding_length"), read("attention.head_count")
        head_dim = self.get(f"{self.architecture}.attention.key_length", hidden // heads)
        self._check_heads(head_dim)
        theta = self.get(f"{self.architecture}.rope.freq_base", 10_000.0)
        if isinstance(theta, int | float):
            theta = _shortest(theta)
        return Qwen2Config(
            vocab_size=len(self.list_of("tokenizer.ggml.tokens", str)),
            hidden_size=hidden,
            intermediate_size=read("feed_forward_length"),
            num_hidden_layers=read("block_count", len(list(self.stored()))),
            num_attention_heads=heads,
            num_key_value_heads=self.get(f"{self.architecture}.attention.head_count_kv", heads),
            head_dim=head_dim,
            rms_norm_eps=_shortest(read("attention.layer_norm_rms_epsilon")),
            rope_theta=theta,
            max_position_embeddings=read("context_length"),
            tie_word_embeddings=all(t.name != "output.weight" for _, t in self.stored()),
            bos_token_id=self.get("tokenizer.ggml.bos_token_id"),
            eos_token_id=self._ends(),
            source=str(self.path),
        )

    def _ends(self) -> int | tuple[int, ...] | None:
        """The tokens that end a text, a turn or a message; llama.cpp stops at each."""
        found = [self.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
        ends = tuple(dict.fromkeys(end for end in found if end is not None))
        return ends if len(ends) > 1 else next(iter(ends), None)

    def _check_keys(self) -> None:
        prefix = f"{self.architecture}."
        for key in self._reader.fields:
            if key.startswith(prefix) and key.removeprefix(prefix) not in _KEYS:
                raise MespRefError(
                    f"{self.path}: {shown(key)}: found {shown(self.get(key))}, expected no such key "
                    "(it might change what is computed)"
                )

    def _check_heads(self, head_dim: int) -> None:
        """RoPE, unscaled, turns whole heads, and values are as wide as keys."""
        for key, expected, why in (
            ("rope.scaling.type", "none", "scaled RoPE is not computed"),
            ("rope.dimension_count", head_dim, "RoPE turns whole heads here"),
            ("attention.value_length", head_dim, "values are as wide as keys here"),
        ):
            found = self.get(f"{self.architecture}.{key}", expected)
            if found != expected:
                raise MespRefError(
                    f"{self.path}: {self.architecture}.{key}: found {shown(found)}, expected "
                    f"{expected!r}; {why}"
                )

    def tensors(self, config: Qwen2Config) -> dict[str, Tensor]:
        """Every tensor of the Qwen2 checkpoint that the file has, rows of q and k in Qwen2's order.

        Raises MespRefError naming the tensor for one of an unsupported type, of another shape or
        without a counterpart in Qwen2, and for one that is missing.
        """
        shapes, tensors = config.weight_shapes(), dict[str, Tensor]()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        for path, stored in self.stored():
            name, kind = _hugging_face_name(stored.name), stored.tensor_type.name
            shape = tuple(int(n) for n in reversed(stored.shape))
            where = f"{path}: {stored.name}"
            if name not in shapes:
                raise MespRefError(f"{where}: found, expected no such tensor in a Qwen2 model")
            if name in tensors:
                raise MespRefError(f"{where}: found twice, expected once")
            if kind not in TYPES:
                raise MespRefError(f"{where}: type: found {kind}, expected {', '.join(TYPES)}")
            if shape != shapes[name]:
                raise MespRefError(
                    f"{where}: shape: found {list(shape)}, expected {list(shapes[name])}"
                )
            data, projection = stored.data, name.split(".")[-2]
            if self.architecture == "llama" and projection in heads:
                data = halves_from_interleaved(data, heads[projection])
            tensors[name] = Tensor(data, kind, shape)
        for name in shapes:
            optional = self.architecture == "llama" and name.endswith(".bias")
            if name not in tensors and not optional:
                raise MespRefError(f"{self.path}: {name}: missing, expected {list(shapes[name])}")
        return tensors


def _open(path: Path) -> tuple[Any, tuple[int, int, int]]:
    """A GGUFReader and the file's identity, or the reason why there is none in one line."""
    try:
        from gguf import GGUFReader
    except ImportError:
        raise MespRefError(
            "GGUF files need the gguf package: pip install 'mesp-ref[convert]'"
        ) from None
    if not path.is_file():
        raise MespRefError(f"{path}: not found, expected a GGUF file")
    with open_regular(path) as file:
        magic, opened = file.read(4), identity(os.fstat(file.fileno()))
    if magic != b"GGUF":
        raise MespRefError(f"{path}: starts with {magic!r}, expected a GGUF file (b'GGUF')")
    check_layout(path)
    try:
        with warnings.catch_warnings(action="ignore"):  # sizes that overflow are refused by name
            return GGUFReader(path), opened
    except Exception as error:  # the package trusts the file
        raise MespRefError(
            f"{path}: not readable as GGUF ({shown(str(error))}); truncated or damaged, fetch it again"
        ) from None


def _open_parts(path: Path) -> list[Part]:
    """The files of a model: one, or all into which it was split, the first of them given.

    Raises MespRefError for parts that are missing, out of order or of another model.
    Source    llama.cpp, llama_split_path and llama-gguf-split
    """
    first = Part(path)
    count = first.get("split.count", 1)
    if type(count) is not int or not 0 <= count <= _PARTS:
        raise MespRefError(f"{path}: split.count: found {shown(count)}, expected 1 to {_PARTS}")
    if count <= 1:
        return [first]
    name = _PART_NAME.fullmatch(path.name)
    if first.get("split.no") != 0 or name is None or int(name[2]) != count or int(name[1]) != 1:
        raise MespRefError(
            f"{path}: split.no: found {shown(first.get('split.no'))} of {count} in this file, expected "
            f"the first part, called NAME-00001-of-{count:05}.gguf, the others beside it"
        )
    stem = path.name[: name.start(1)]
    others = [inside(path.parent, f"{stem}{i:05}-of-{count:05}.gguf") for i in range(2, count + 1)]
    parts = [first, *map(Part, others)]
    for number, part in enumerate(parts):
        for key, expected in (("split.no", number), ("split.count", count)):
            if (found := part.get(key)) != expected:
                raise MespRefError(
                    f"{part.path}: {key}: found {shown(found)}, expected {expected}; a part of "
                    "another model, or renamed"
                )
    held, stated = sum(len(part.reader.tensors) for part in parts), first.get("split.tensors.count")
    if held != stated:
        raise MespRefError(
            f"{path}: split.tensors.count: found {shown(stated)}, expected {held}, which the "
            f"{count} parts hold; a part is of another model"
        )
    return parts


def _shortest(value: float) -> float:
    """A number that is stored in float32, as the shortest decimal that rounds to it: 1e-05."""
    return float(str(np.float32(value)))


def gguf_name(name: str) -> str:
    """The GGUF name of a tensor of a Qwen2 checkpoint: model.norm.weight is output_norm.weight."""
    module, _, kind = name.rpartition(".")
    for gguf, path in _TOP.items():
        if module == path:
            return f"{gguf}.{kind}"
    _, _, block, path = module.split(".", 3)
    return f"blk.{block}.{_BLOCK_NAMES[path]}.{kind}"


def _hugging_face_name(name: str) -> str:
    """The Hugging Face name of a tensor; the name itself where Qwen2 has no such tensor."""
    block = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if block and block[2] in _BLOCK:
        return f"model.layers.{block[1]}.{_BLOCK[block[2]]}.{block[3]}"
    module, _, kind = name.rpartition(".")
    return f"{_TOP[module]}.{kind}" if module in _TOP else name


def halves_from_interleaved(w: Array, heads: int) -> Array:
    """Reorder rows of a q or k projection from interleaved to half-split RoPE.

    Within each head, row 2j of the file is component j and row 2j + 1 is component j + D/2.
    Shapes    w [heads·D, …] -> [heads·D, …]; the rows may be packed
    """
    half = w.shape[0] // heads // 2
    return w.reshape(heads, half, 2, -1).swapaxes(1, 2).reshape(w.shape)
