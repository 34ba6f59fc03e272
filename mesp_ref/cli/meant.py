"""What a person meant by a command or an option that other programs have."""

import difflib
import re

_COMMANDS = {
    "train": "finetune", "fine-tune": "finetune", "sft": "finetune", "fit": "finetune",
    "lora": "finetune", "tune": "finetune", "resume": "finetune --resume", "chat": "generate",
    "run": "generate", "infer": "generate", "evaluate": "eval", "test": "eval", "fuse": "merge",
    "export": "merge", "benchmark": "compare", "check": "gradcheck", "inference": "generate",
    "predict": "generate", "sample": "generate", "complete": "generate", "finetuning": "finetune",
    "help": "--help", "version": "--version",
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

_ALONE = {"--model": "DIR", "--data": "FILE", "--out": "OUT"}  # as usage has what needs no option


def meant_command(found: str, commands: list[str]) -> str:
    """ "; did you mean …?", or nothing where there is no guess."""
    known = {name: c for name, c in _COMMANDS.items() if c[0] == "-" or c.split(" ")[0] in commands}
    names = known | {name: name for name in commands}
    guess = _nearest(found.lower(), names, 0.6)
    return f"; did you mean {guess}?" if guess else ""


def meant_option(found: str, help_text: str) -> str:
    """The same for an option, among those that a command's help names; a bare word is a file's."""
    options = sorted(set(re.findall(r"(?<![\w-])--[a-z][\w-]*", help_text)))
    if not found.startswith("-"):
        return f"; did you mean --data {found}?" if "--data" in options else ""
    usage = re.sub(r"\[-[^]]*]", "", help_text.partition("\n\n")[0])
    if _ALONE.get(found, found) in usage:
        return f"; give what stands behind {found} alone"
    elsewhere = {name: o for name, o in _OPTIONS.items() if o.split(" ")[0] in options}
    names = {option.lstrip("-"): option for option in options} | elsewhere
    guess = _nearest(found.partition("=")[0].lower().replace("_", "-").lstrip("-"), names, 0.7)
    return f"; did you mean {guess}?" if guess else ""


def _nearest(found: str, names: dict[str, str], cutoff: float) -> str:
    close = difflib.get_close_matches(found, names, 1, cutoff)
    return names[close[0]] if close else ""
