"""mesp-ref convert: models and adapters of other programs."""

import argparse
from pathlib import Path
from typing import Any

from mesp_ref.cli.options import add_command, add_json, add_revision, print_json, say
from mesp_ref.engine.adapter import Adapter
from mesp_ref.engine.init import check_adapter
from mesp_ref.errors import MespRefError
from mesp_ref.files.config import config_fields, read_config
from mesp_ref.files.from_gguf import convert_gguf
from mesp_ref.files.gguf_writer import TYPES
from mesp_ref.files.hub import adapter_directory, model_directory
from mesp_ref.files.mlx import adapted_blocks, load_mlx_adapter, save_mlx_adapter
from mesp_ref.files.modelfile import Render
from mesp_ref.files.output import check_directory
from mesp_ref.files.peft import load_adapter, read_adapter_config, save_adapter
from mesp_ref.files.to_gguf import Written, write_gguf_adapter, write_gguf_model
from mesp_ref.train.chat import load_chat_template

_HELP = """\
Bring models and adapters from other programs, and to them.

examples:
  mesp-ref convert gguf --help
  mesp-ref convert gguf-model --help
  mesp-ref convert gguf-adapter --help
  mesp-ref convert adapter --help
"""

_GGUF_HELP = """\
Write a checkpoint directory from a GGUF file (llama, qwen2, qwen3, smollm3, gemma3): F32, F16, BF16,
Q4_0 to Q8_0 and K-quants, in one file or split (name the first part). transformers and mlx-lm load
it too. Needs the gguf package: pip install 'mesp-ref[convert]'.

examples:
  mesp-ref convert gguf SmolLM2-135M-Instruct.Q4_1.gguf smollm2
  mesp-ref convert gguf SmolLM2-135M-Instruct.Q4_1.gguf smollm2-16 --dtype bfloat16
  mesp-ref convert gguf SmolLM2-135M-Instruct.Q4_1.gguf smollm2-4bit --packed
"""

_MODEL_HELP = """\
Write a checkpoint directory as a GGUF file for llama.cpp, and an Ollama Modelfile beside it
(OUT.Modelfile). Without --type the matrices keep every stored weight. Needs the gguf package:
pip install 'mesp-ref[convert]'.

examples:
  mesp-ref convert gguf-model Qwen2.5-0.5B base.gguf
  mesp-ref convert gguf-model Qwen2.5-0.5B base.gguf --type q8_0 --json
"""

_LORA_HELP = """\
Write a PEFT adapter directory as a GGUF file, which llama.cpp adds to the base model in GGUF while
it runs (llama-cli -m base.gguf --lora OUT), and an Ollama Modelfile beside it.

examples:
  mesp-ref convert gguf-adapter runs/notes/adapter notes.gguf --base Qwen2.5-0.5B
"""

_ADAPTER_HELP = """\
Write an adapter in the other of two layouts: PEFT's, which this program and transformers read, or
mlx-lm's. Which one is given is seen from the files in it.

examples:
  mesp-ref convert adapter runs/notes/adapter notes-mlx --to mlx
  mesp-ref convert adapter notes-mlx notes-peft --to peft --json
"""


def add(commands: Any) -> None:
    parser = add_command(
        commands, "convert", run_gguf, "from and to GGUF; adapters for mlx-lm", _HELP
    )
    kinds = parser.add_subparsers(title="what to convert", metavar="KIND", required=True)

    gguf = add_command(kinds, "gguf", run_gguf, "a GGUF model", _GGUF_HELP)
    gguf.add_argument("file", metavar="FILE", help="GGUF file")
    gguf.add_argument("out", metavar="OUT", help="new checkpoint directory")
    gguf.add_argument(
        "--packed", action="store_true",
        help="keep Q4_1 as affine 4-bit and Q8_0 as affine 8-bit, without changing a weight",
    )  # fmt: skip
    gguf.add_argument(
        "--dense-embedding", action="store_true", help="with --packed: but not the embedding"
    )
    gguf.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), default="float32",
        help="of what is not kept packed (default: %(default)s)",
    )  # fmt: skip
    gguf.add_argument("--overwrite", action="store_true", help="replace what is in OUT")
    add_json(gguf)
    _add_outgoing(kinds)

    adapter = add_command(kinds, "adapter", run_adapter, "a LoRA adapter", _ADAPTER_HELP)
    adapter.add_argument("adapter", metavar="DIR", help="adapter directory")
    adapter.add_argument("out", metavar="OUT", help="directory to write to")
    adapter.add_argument(
        "--model",
        metavar="DIR",
        help="the adapter's model: needed to mlx where it adapts some blocks",
    )
    adapter.add_argument("--to", choices=("peft", "mlx"), required=True, help="layout to write")
    adapter.add_argument("--overwrite", action="store_true", help="replace what is in OUT")
    add_json(adapter)


def _add_outgoing(kinds: Any) -> None:
    """gguf-model and gguf-adapter."""
    model = add_command(kinds, "gguf-model", run_gguf_model, "a model to GGUF", _MODEL_HELP)
    model.add_argument("model", metavar="DIR", help="checkpoint directory, or org/name of the hub")
    add_revision(model)
    model.add_argument("out", metavar="OUT", help="GGUF file to write, NAME.gguf")
    model.add_argument(
        "--type", choices=tuple(TYPES), dest="kind",
        help="of the matrices (default: the one that keeps every stored weight)",
    )  # fmt: skip
    lora = add_command(kinds, "gguf-adapter", run_gguf_adapter, "an adapter to GGUF", _LORA_HELP)
    lora.add_argument(
        "adapter", metavar="ADAPTER", help="PEFT adapter directory, or org/name of the hub"
    )
    lora.add_argument("out", metavar="OUT", help="GGUF file to write, NAME.gguf")
    lora.add_argument(
        "--base", metavar="DIR", required=True, help="the adapter's model, or org/name of the hub"
    )
    for parser in (model, lora):
        parser.add_argument(
            "--overwrite", action="store_true", help="replace OUT and its Modelfile"
        )
        add_json(parser)


def _render(directory: Path) -> Render | None:
    """The chat template of a model, as a function; None where it has none."""
    template = load_chat_template(directory)
    if template is None:
        return None
    return lambda messages, prompt: template.render(messages, add_generation_prompt=prompt)


def run_gguf_model(args: argparse.Namespace) -> int:
    model = model_directory(args.model)
    written = write_gguf_model(model, args.out, args.kind, args.overwrite, _render(model))
    return _tell(args, written)


def run_gguf_adapter(args: argparse.Namespace) -> int:
    base, adapter = model_directory(args.base), adapter_directory(args.adapter)
    written = write_gguf_adapter(adapter, base, args.out, args.overwrite, _render(base))
    return _tell(args, written)


def _tell(args: argparse.Namespace, written: Written) -> int:
    size = written.file.stat().st_size
    if args.json:
        names = {"out": str(written.file), "modelfile": str(written.modelfile)}
        print_json(names | {"bytes": size, "type": written.kind, "tensors": written.tensors})
    else:
        say(
            f"wrote {written.file}: {written.tensors} tensors, {written.kind}, {size / 1e6:.1f} MB",
            f"wrote {written.modelfile}: ollama create NAME -f {written.modelfile}",
        )
    return 0


def run_gguf(args: argparse.Namespace) -> int:
    config = convert_gguf(
        args.file, args.out, args.dtype, args.packed, args.dense_embedding, args.overwrite
    )
    size = (Path(args.out) / "model.safetensors").stat().st_size
    if args.json:
        print_json({"out": args.out, "bytes": size, "config": config_fields(config)})
    else:
        say(f"wrote {args.out}: {config.num_hidden_layers} blocks, {size / 1e6:.1f} MB")
    return 0


def _blocks(args: argparse.Namespace, adapter: Adapter, from_mlx: bool) -> int | None:
    """How many blocks the model has; None where an adapter of all its blocks needs no answer."""
    if args.model is not None:
        config = read_config(model_directory(args.model))
        check_adapter(adapter, config, args.adapter)
        return config.num_hidden_layers
    layers = None if from_mlx else read_adapter_config(args.adapter).get("layers_to_transform")
    if layers not in (None, []) or min(adapted_blocks(adapter)) > 0:
        raise MespRefError(
            f"{args.adapter}: found matrices of some blocks only ({min(adapted_blocks(adapter))} to "
            f"{max(adapted_blocks(adapter))}), expected all; mlx-lm adapts the last blocks of a "
            "model: name the model with --model to see whether these are"
        )
    return None


def run_adapter(args: argparse.Namespace) -> int:
    check_directory(args.out, args.overwrite, [args.adapter])
    args.adapter = str(adapter_directory(args.adapter))
    from_mlx = (Path(args.adapter) / "adapters.safetensors").is_file()
    adapter = load_mlx_adapter(args.adapter) if from_mlx else load_adapter(args.adapter)
    if args.to == "mlx":
        blocks = _blocks(args, adapter, from_mlx)
        save_mlx_adapter(adapter, args.out, args.overwrite, blocks=blocks)
    else:
        save_adapter(adapter, args.out, overwrite=args.overwrite)
    pairs = len(adapter.weights) // 2
    if args.json:
        print_json({"out": args.out, "rank": adapter.rank, "scale": adapter.scale, "pairs": pairs})
    else:
        say(f"wrote {args.out}: {pairs} projections of rank {adapter.rank} for {args.to}")
    return 0
