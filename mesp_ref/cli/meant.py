"""What a person meant by a command or an option that other programs have."""

import difflib
import re

_COMMANDS = {
    "train": "finetune", "fine-tune": "finetune", "sft": "finetune", "fit": "finetune",
    "lora": "finetune", "tune": "finetune", "resume": "finetune --resume", "chat": "generate",
    "run": "generate", "infer": "generate", "evaluate": "eval", "test": "eval", "fuse": "merge",
    "export": "merge", "benchmark": "compare", "check": "gradcheck",
}  # fmt: skip
_STEPS = "--steps (an epoch is the rows of the data / (--batch-size x --accumulate) steps)"
_OPTIONS = {
    "epochs": _STEPS, "num-epochs": _STEPS, "num-train-epochs": _STEPS, "iters": "--steps",
    "max-steps": "--steps", "iterations": "--steps", "learning-rate": "--lr", "batch": "--batch-size",
    "per-device-train-batch-size": "--batch-size", "bs": "--batch-size", "max-length": "--seq-len",
    "max-seq-length": "--seq-len", "max-seq-len": "--seq-len", "context": "--seq-len",
    "gradient-accumulation-steps": "--accumulate", "grad-accum": "--accumulate", "r": "--rank",
    "lora-rank": "--rank", "lora-r": "--rank", "lora-alpha": "--alpha", "output": "--out",
    "output-dir": "--out", "o": "--out", "dataset": "--data", "train-file": "--data",
    "train": "--data", "file": "--data", "target-modules": "--targets", "lora-layers": "--targets",
    "max-tokens": "--max-new-tokens", "max-new": "--max-new-tokens", "n-predict": "--max-new-tokens",
    "temp": "--temperature", "p": "--prompt", "adapter-path": "--adapter", "lora": "--adapter",
    "model-name": "--model", "base": "--model", "m": "--model", "warmup-steps": "--warmup",
    "eval-steps": "--eval-every", "save-steps": "--save-every", "max-grad-norm": "--clip",
    "grad-clip": "--clip", "threads": "--workers", "resume-from-checkpoint": "--resume",
    "lr-scheduler-type": "--schedule", "optim": "--optimizer", "verbose": "",
}  # fmt: skip


def meant_command(found: str, commands: list[str]) -> str:
    """ "; did you mean …?", or nothing where there is no guess."""
    close = difflib.get_close_matches(found, commands, 1)
    guess = _COMMANDS.get(found.lower()) or (close[0] if close else "")
    return f"; did you mean {guess}?" if guess else ""


def meant_option(found: str, help_text: str) -> str:
    """The same for an option, among those that a command's help names."""
    options = sorted(set(re.findall(r"(?<![\w-])--[a-z][\w-]*", help_text)))
    name = found.partition("=")[0].lower().replace("_", "-")
    guess = _OPTIONS.get(name.lstrip("-"), "")
    if guess.split(" ")[0] not in options:
        guess = next(iter(difflib.get_close_matches(name, options, 1, 0.7)), "")
    return f"; did you mean {guess}?" if guess else ""
