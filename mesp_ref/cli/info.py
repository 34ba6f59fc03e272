"""mesp-ref info: what a checkpoint is, and what LoRA would add to it."""

import argparse
import math
from collections.abc import Mapping
from typing import Any

from mesp_ref.cli.options import add_command, add_json, add_revision, print_json, say
from mesp_ref.engine.config import SLIDING
from mesp_ref.engine.init import adapter_shapes, parse_targets
from mesp_ref.files.checkpoint import weight_files
from mesp_ref.files.config import config_fields
from mesp_ref.files.models import load_model

_HELP = """\
Configuration, number of parameters and size of a checkpoint directory, and how many parameters
a LoRA adapter of a given rank would add. Every tensor's name and shape is checked on the way.

examples:
  mesp-ref info
  mesp-ref info Qwen2.5-0.5B --rank 16 --targets q_proj,v_proj --json
"""


def add(commands: Any) -> None:
    parser = add_command(commands, "info", run, "what a checkpoint is, what LoRA adds", _HELP)
    parser.add_argument(
        "model", metavar="DIR", nargs="?",
        help="checkpoint directory, or org/name of the hub (default: the story model of this package)",
    )  # fmt: skip
    add_revision(parser)
    parser.add_argument("--rank", type=int, default=8, metavar="R", help="default: %(default)s")
    parser.add_argument("--targets", default="all", metavar="NAMES", help="as for finetune")
    add_json(parser)


def _facts(args: argparse.Namespace) -> dict[str, Any]:
    targets = parse_targets(args.targets)
    model = load_model(args.model)
    assert model.path is not None
    config = config_fields(model.config)
    shapes = model.config.weight_shapes()
    added = adapter_shapes(model.config, args.rank, targets)
    lora = sum(math.prod(shape) for shape in added.values())
    parameters = sum(math.prod(shape) for shape in shapes.values())
    return {
        "model": str(model.path),
        "config": config,
        "tensors": len(shapes),
        "parameters": parameters,
        "bytes": sum(file.stat().st_size for file in weight_files(model.path)),
        "lora": {
            "rank": args.rank,
            "targets": list(targets),
            "parameters": lora,
            "float32_bytes": 4 * lora,
            "share": lora / parameters,
        },
    }


def _peculiar(config: Mapping[str, Any]) -> dict[str, str]:
    """Rows for what not every model has: windows, blocks without RoPE, scaled RoPE."""
    kinds, scaling, rows = config.get("layer_types", []), config.get("rope_scaling"), {}
    if SLIDING in kinds:
        rows["windows"] = (
            f"{kinds.count(SLIDING)} of {len(kinds)} blocks see {config['sliding_window']} tokens, "
            f"RoPE theta {config['rope_local_base_freq']:g} there"
        )
    if not all(config.get("no_rope_layers", ())):
        without = config["no_rope_layers"].count(0)
        rows["without RoPE"] = f"{without} of {len(kinds)} blocks"
    if scaling:
        rows["RoPE scaling"] = f"{scaling['rope_type']}, factor {scaling['factor']:g}"
    return rows


def run(args: argparse.Namespace) -> int:
    facts = _facts(args)
    if args.json:
        print_json(facts)
        return 0
    config, lora = facts["config"], facts["lora"]
    rows = {
        "family": f"{config['model_type']}",
        "blocks": f"{config['num_hidden_layers']}",
        "hidden size": f"{config['hidden_size']}, intermediate {config['intermediate_size']}",
        "attention": f"{config['num_attention_heads']} query heads, "
        f"{config['num_key_value_heads']} key/value heads of {config['head_dim']}",
        "vocabulary": f"{config['vocab_size']}, head "
        + ("tied" if config["tie_word_embeddings"] else "of its own"),
        "RoPE theta": f"{config['rope_theta']:g}, norm eps {config['rms_norm_eps']:g}",
        **_peculiar(config),
        "end tokens": f"{config['eos_token_id']}",
        "parameters": f"{facts['parameters']:,} in {facts['tensors']} tensors, "
        f"{facts['bytes'] / 1e6:.1f} MB on disk",
        f"LoRA rank {lora['rank']}": f"{lora['parameters']:,} parameters on "
        f"{len(lora['targets'])} projections, {lora['float32_bytes'] / 1e6:.1f} MB in float32, "
        f"{lora['share']:.2%} of the model",
    }
    say(facts["model"], *(f"  {name:<14} {value}" for name, value in rows.items()))
    return 0
