"""From a checkpoint directory, and from an adapter, to GGUF files for llama.cpp and Ollama."""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mesp_ref.engine.adapter import Adapter
from mesp_ref.engine.config import Qwen2Config
from mesp_ref.errors import MespRefError
from mesp_ref.files.checkpoint import check_unchanged, open_checkpoint
from mesp_ref.files.end_tokens import end_tokens
from mesp_ref.files.gguf import gguf_name
from mesp_ref.files.gguf_export import add_sizes, check_export, divisors, rows_of
from mesp_ref.files.gguf_families import OF_FAMILY
from mesp_ref.files.gguf_vocabulary import Vocabulary, add_vocabulary, read_vocabulary
from mesp_ref.files.gguf_writer import TYPES, Outgoing, new_gguf, stored_kind, write_tensors
from mesp_ref.files.modelfile import Render, modelfile
from mesp_ref.files.names import model_name
from mesp_ref.files.output import check_file, write_aside
from mesp_ref.files.peft import load_adapter
from mesp_ref.files.safetensors import Stored
from mesp_ref.ops import Array

# llama.cpp's numbers for what most of a file is stored in (LlamaFileType).
_FILE_TYPES = {"F32": 0, "F16": 1, "Q8_0": 7, "BF16": 32}
_LOSSLESS = {"float16": "f16", "bfloat16": "bf16"}


class Written(NamedTuple):
    """What was written: the GGUF file, the Modelfile beside it, the type of its matrices."""

    file: Path
    modelfile: Path
    kind: str
    tensors: int


def write_gguf_model(
    path: str | Path,
    out: str | Path,
    kind: str | None = None,
    overwrite: bool = False,
    render: Render | None = None,
) -> Written:
    """Write a directory as one GGUF file, and a Modelfile beside it; each whole or not at all.

    kind      f32, f16, bf16 or q8_0, of the matrices (default: the narrowest that holds every
              stored weight); vectors are float32, rows that blocks of 32 do not fill float16
    render    the model's chat template, for the Modelfile
    Memory    some rows of one tensor

    Raises MespRefError for what llama.cpp would compute otherwise (see check_export), a tokenizer that
    it has no name for; for NaN and infinity in that type; for a model that changes meanwhile, and for
    places as check_file does
    """
    directory = Path(path)
    with _outputs(out, overwrite, [directory]) as (aside, beside, target):
        config, tables = open_checkpoint(directory)
        check_export(config)
        vocabulary = read_vocabulary(directory, config, end_tokens(directory, config.eos_token_ids))
        stored = TYPES[kind or _lossless(tables)]
        tensors = [
            Outgoing(gguf_name(name, config.traits), stored_kind(stored, table.shape), table.shape,
                     rows_of(name, _rows(table), config), f"{directory}: {name}")
            for name, table in tables.items()
        ] + divisors(config)  # fmt: skip
        with new_gguf(aside, OF_FAMILY[config.traits.model_type]) as writer:
            writer.add_type("model")
            writer.add_name(model_name(directory) or target.stem)
            add_sizes(writer, config)
            writer.add_file_type(_FILE_TYPES[stored])
            if stored == "Q8_0":
                writer.add_quantization_version(2)
            add_vocabulary(writer, vocabulary)
            write_tensors(writer, tensors)
        text = modelfile(target.name, _stops(vocabulary), config.max_position_embeddings, render)
        beside.write_text(text, encoding="utf-8")
        check_unchanged(tables)
    return Written(target, _modelfile_of(target), stored.lower(), len(tensors))


def write_gguf_adapter(
    path: str | Path,
    base: str | Path,
    out: str | Path,
    overwrite: bool = False,
    render: Render | None = None,
) -> Written:
    """Write a PEFT adapter of the model in `base` as a GGUF file in float32, a Modelfile beside it.

    Forward   llama.cpp adds alpha/R·B·A, R being the rank of B: alpha is our scale times R, which
              with rsLoRA is another than lora_alpha

    Raises MespRefError for an adapter of another model, for an alpha of zero, which llama.cpp takes
    for none and scales by 1, and as write_gguf_model does
    """
    directory = Path(base)
    with _outputs(out, overwrite, [path, directory]) as (aside, beside, target):
        config, tables = open_checkpoint(directory)
        check_export(config)
        adapter = load_adapter(path, config=config)
        vocabulary = read_vocabulary(directory, config, end_tokens(directory, config.eos_token_ids))
        tensors = _matrices(adapter, config, str(path))
        with new_gguf(aside, OF_FAMILY[config.traits.model_type]) as writer:
            writer.add_type("adapter")
            writer.add_string("adapter.type", "lora")
            writer.add_float32("adapter.lora.alpha", _alpha(adapter, str(path)))
            writer.add_name(target.stem)
            write_tensors(writer, tensors)
        name = re.sub(r"[^\w.-]", "-", model_name(directory) or "base")
        text = modelfile(
            f"{name}.gguf", _stops(vocabulary), config.max_position_embeddings, render, target.name
        )
        beside.write_text(text, encoding="utf-8")
        check_unchanged(tables)
    return Written(target, _modelfile_of(target), "f32", len(tensors))


@contextmanager
def _outputs(
    out: str | Path, overwrite: bool, inputs: list[str | Path]
) -> Iterator[tuple[Path, Path, Path]]:
    """Temporary paths of the GGUF file and its Modelfile, and where the file will be."""
    target = Path(out)
    if target.suffix != ".gguf":
        raise MespRefError(f"{target}: expected a name that ends in .gguf")
    for place in (target, _modelfile_of(target)):
        check_file(place, overwrite, inputs)
    with (
        write_aside(_modelfile_of(target), overwrite=overwrite) as beside,
        write_aside(target, overwrite=overwrite) as aside,
    ):
        yield aside, beside, target


def _modelfile_of(target: Path) -> Path:
    return target.with_suffix(".Modelfile")


def _lossless(tables: Mapping[str, Any]) -> str:
    """The narrowest type that holds every stored matrix: packed ones have that of their scales."""
    kinds = {
        _LOSSLESS.get((table.raw if isinstance(table, Stored) else table.scales).dtype.name, "f32")
        for table in tables.values()
        if len(table.shape) == 2
    }
    return kinds.pop() if len(kinds) == 1 else "f32"


def _stops(vocabulary: Vocabulary) -> list[str]:
    """The end tokens as text."""
    return [vocabulary.tokens[end] for end in vocabulary.ends]


def _matrices(adapter: Adapter, config: Qwen2Config, where: str) -> list[Outgoing]:
    """A and B of every adapted projection under llama.cpp's names."""
    found = []
    for name, array in adapter.weights.items():
        module, matrix = name.removeprefix("base_model.model.").split(".lora_")
        gguf = f"{gguf_name(f'{module}.weight', config.traits)}.lora_{matrix[0].lower()}"
        rows = _rows(array)
        if matrix[0] == "B":  # whose rows are those of the weight
            rows = rows_of(f"{module}.weight", rows, config)
        found.append(Outgoing(gguf, "F32", array.shape, rows, f"{where}: {name}"))
    return found


def _rows(table: Any) -> Callable[[int, int], Array]:
    """How to get rows: of a dense file they are read, not mapped, so that a cut is an error."""
    if isinstance(table, Stored):
        return table.read
    return lambda a, b: table[a:b]


def _alpha(adapter: Adapter, where: str) -> float:
    alpha = np.float32(adapter.scale * adapter.rank)
    if alpha == 0 or not np.isfinite(alpha):
        raise MespRefError(
            f"{where}: lora_alpha: found {adapter.alpha}, expected a number that float32 holds and "
            "that is not 0, which llama.cpp takes for no alpha and scales by 1"
        )
    return float(alpha)
