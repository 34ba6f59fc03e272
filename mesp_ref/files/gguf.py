"""GGUF files of the families that the engine computes: metadata, tensors under their Hugging Face
names.

What llama.cpp stores otherwise than a checkpoint (rows of q and k in the order of interleaved RoPE,
gains of norms whole) is put right where a tensor is read. Needs the `gguf` package.
"""

import contextlib
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mesp_ref.engine.config import FAMILIES, Qwen2Config, Traits
from mesp_ref.errors import MespRefError, shown
from mesp_ref.files.checkpoint import is_gain
from mesp_ref.files.gguf_families import (
    ARCHITECTURES,
    FREQUENCIES,
    OF_FAMILY,
    TOP,
    Architecture,
    layer_types,
    scaling_behind,
)
from mesp_ref.files.gguf_layout import check_layout
from mesp_ref.files.safetensors import identity
from mesp_ref.files.strict import inside, open_regular
from mesp_ref.ops import Array, RopeScaling

# Dense types, the first generation of blocks, and K-quants; of a row that a K-quant's 256 weights do
# not fill, llama.cpp's quantiser makes one of the first.
TYPES = (
    "F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0",
    "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K",
)  # fmt: skip

_PART_NAME, _PARTS = re.compile(r".*-(\d{5})-of-(\d{5})\.gguf"), 10_000


class Tensor(NamedTuple):
    """A tensor in its file's blocks, one row of bytes (or numbers) per row of the matrix."""

    data: Array
    kind: str  # one of TYPES
    shape: tuple[int, ...]
    less: float = 0.0  # what the checkpoint's file leaves out of each number: 1 of a gain

    def dequantize(self, a: int, b: int) -> Array:
        """Rows a … b−1 in float32, as ggml computes them: Q4_1 is d·q + m, Q8_0 is d·q."""
        from gguf import GGMLQuantizationType, dequantize

        vector = len(self.shape) == 1  # lies in the file as one row
        data = self.data.reshape(1, -1) if vector else self.data[a:b]
        w: Array = dequantize(data, GGMLQuantizationType[self.kind])
        w = (w[0, a:b] if vector else w).astype(np.float32, copy=False)
        return w - np.float32(self.less) if self.less else w


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
        self.family: Architecture = ARCHITECTURES[self.architecture]

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
        """The config of the model that the file describes.

        Raises MespRefError for RoPE scaled as the engine does not compute it, and for keys of the
        architecture that are unknown: experts, soft caps, scales.
        """
        self._check_keys()
        hidden, heads = self._number("embedding_length"), self._number("attention.head_count")
        head_dim = self._own("attention.key_length", hidden // heads)
        self._check_heads(head_dim)
        theta = self._own("rope.freq_base", 10_000.0)
        theta = _shortest(theta) if isinstance(theta, int | float) else theta
        names = {tensor.name for _, tensor in self.stored()}
        layers = self._number("block_count", len(names))
        types = layer_types(self.architecture, layers)
        gemma = self.architecture == "gemma3"
        return Qwen2Config(
            vocab_size=len(self.list_of("tokenizer.ggml.tokens", str)),
            hidden_size=hidden,
            intermediate_size=self._number("feed_forward_length"),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=self._own("attention.head_count_kv", heads),
            head_dim=head_dim,
            rms_norm_eps=_shortest(self._number("attention.layer_norm_rms_epsilon")),
            rope_theta=theta,
            max_position_embeddings=self._number("context_length"),
            tie_word_embeddings="output.weight" not in names,
            bos_token_id=self.get("tokenizer.ggml.bos_token_id"),
            eos_token_id=self._ends(),
            traits=self.family.traits,
            attention_bias=self.architecture != "qwen2" and "blk.0.attn_q.bias" in names,
            rope_scaling=self._scaling(theta),
            layer_types=types if set(types) != {"full_attention"} else (),
            sliding_window=self._number("attention.sliding_window") if gemma else None,
            source=str(self.path),
        )

    def _own(self, key: str, default: Any = None) -> Any:
        """A value under the architecture's name."""
        return self.get(f"{self.architecture}.{key}", default)

    def _number(self, key: str, most: float = 2**31) -> Any:
        """A positive number under the architecture's name."""
        value = self[f"{self.architecture}.{key}"]
        if not isinstance(value, (int, float)) or not 0 < value <= most:
            raise MespRefError(
                f"{self.path}: {self.architecture}.{key}: found {shown(value)}, expected a "
                f"number between 0 and {most}"
            )
        return value

    def _scaling(self, theta: float) -> RopeScaling | None:
        """Linear scaling by its key, llama3's by its divisors of frequencies."""
        if self._own("rope.scaling.type", "none") == "linear":
            return RopeScaling(_shortest(self._number("rope.scaling.factor")))
        stored = [tensor for _, tensor in self.stored() if tensor.name == FREQUENCIES]
        if not stored:
            return None
        divisors = np.asarray(stored[0].data, np.float64).reshape(-1)
        found = scaling_behind(divisors, theta) if len(divisors) else None
        if found is None:
            raise MespRefError(
                f"{self.path}: {FREQUENCIES}: found divisors up to {divisors.max(initial=0):g}, "
                "expected those of Llama 3 (low_freq_factor 1, high_freq_factor 4)"
            )
        return found

    def _ends(self) -> int | tuple[int, ...] | None:
        """The tokens that end a text, a turn or a message; llama.cpp stops at each."""
        found = [self.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
        ends = tuple(dict.fromkeys(end for end in found if end is not None))
        return ends if len(ends) > 1 else next(iter(ends), None)

    def _check_keys(self) -> None:
        prefix = f"{self.architecture}."
        for key in self._reader.fields:
            if key.startswith(prefix) and key.removeprefix(prefix) not in self.family.keys:
                raise MespRefError(
                    f"{self.path}: {shown(key)}: found {shown(self.get(key))}, expected no such key "
                    "(it might change what is computed)"
                )

    def _check_heads(self, head_dim: int) -> None:
        """RoPE turns whole heads, scaled linearly at most, and values are as wide as keys."""
        scaling = self._own("rope.scaling.type", "none")
        linear = "linear" if "rope.scaling.factor" in self.family.keys else "none"
        for key, expected, why in (
            (
                "rope.scaling.type",
                scaling if scaling == linear else "none",
                "scaled RoPE is not computed",
            ),
            ("rope.dimension_count", head_dim, "RoPE turns whole heads here"),
            ("attention.value_length", head_dim, "values are as wide as keys here"),
        ):
            found = self._own(key, expected)
            if found != expected:
                raise MespRefError(
                    f"{self.path}: {self.architecture}.{key}: found {shown(found)}, expected "
                    f"{expected!r}; {why}"
                )

    def tensors(self, config: Qwen2Config) -> dict[str, Tensor]:
        """Every tensor of the checkpoint, as a Hugging Face directory has it.

        Raises MespRefError naming the tensor for one of an unsupported type, of another shape or
        without a counterpart in the family, and for one that is missing.
        """
        shapes, tensors = config.weight_shapes(), dict[str, Tensor]()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        for path, stored in self.stored():
            if stored.name == FREQUENCIES and config.rope_scaling is not None:
                continue
            name, kind = _hugging_face_name(stored.name, self.family), stored.tensor_type.name
            shape = tuple(int(n) for n in reversed(stored.shape))
            where = f"{path}: {stored.name}"
            if name not in shapes:
                raise MespRefError(
                    f"{where}: found, expected no such tensor in a {config.traits.model_type} model"
                )
            if name in tensors:
                raise MespRefError(f"{where}: found twice, expected once")
            if kind not in TYPES:
                raise MespRefError(f"{where}: type: found {kind}, expected {', '.join(TYPES)}")
            if shape != shapes[name]:
                raise MespRefError(
                    f"{where}: shape: found {list(shape)}, expected {list(shapes[name])}"
                )
            data, projection = stored.data, name.split(".")[-2]
            if self.family.interleaved and projection in heads:
                data = halves_from_interleaved(data, heads[projection])
            less = config.traits.gain if is_gain(name, config) else 0.0
            tensors[name] = Tensor(data, kind, shape, less)
        for name in shapes:
            if name not in tensors:
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
    try:
        with open_regular(path) as file:
            magic, opened = file.read(4), identity(os.fstat(file.fileno()))
    except OSError as error:
        raise MespRefError(f"{path}: cannot be read: {error.strerror}") from None
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


def gguf_name(name: str, traits: Traits = FAMILIES["qwen2"]) -> str:
    """The GGUF name of a tensor of a checkpoint: model.norm.weight is output_norm.weight."""
    module, _, kind = name.rpartition(".")
    return f"{ARCHITECTURES[OF_FAMILY[traits.model_type]].name(module)}.{kind}"


def _hugging_face_name(name: str, family: Architecture) -> str:
    """The Hugging Face name of a tensor; the name itself where the family has no such tensor."""
    block = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if block and block[2] in family.block:
        return f"model.layers.{block[1]}.{family.block[block[2]]}.{block[3]}"
    module, _, kind = name.rpartition(".")
    return f"{TOP[module]}.{kind}" if module in TOP else name


def halves_from_interleaved(w: Array, heads: int) -> Array:
    """Reorder rows of a q or k projection from interleaved to half-split RoPE.

    Within each head, row 2j of the file is component j and row 2j + 1 is component j + D/2.
    Shapes    w [heads·D, …] -> [heads·D, …]; the rows may be packed
    """
    half = w.shape[0] // heads // 2
    return w.reshape(heads, half, 2, -1).swapaxes(1, 2).reshape(w.shape)
