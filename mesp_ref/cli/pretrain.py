"""mesp-ref pretrain: the default checkpoint, trained again from nothing."""

import argparse
from typing import Any

from mesp_ref.cli.options import add_command, add_fields, add_json, print_json, say
from mesp_ref.cli.progress import Progress
from mesp_ref.job.metrics import Event
from mesp_ref.job.pretrain import PretrainOptions, pretrain

_HELP = """\
Train a small Qwen2 model from random weights on stories of a seeded grammar, all parameters by this
package's own backward pass, and write a checkpoint directory with tokenizer and model card. The
defaults give the checkpoint that comes with the package, in about 30 minutes on one core; the
same seed, NumPy and number of threads give the same bits.

At the end the model is held against the grammar: its loss on held-out stories beside the exact
entropy bound, and the share of its own stories that the grammar could have written.

examples:
  mesp-ref pretrain --out runs/stories
  mesp-ref pretrain --out runs/tiny --steps 10 --layers 2 --hidden-size 64 --heldout 4 --samples 2
"""


def add(commands: Any) -> None:
    parser = add_command(commands, "pretrain", run, "train the default checkpoint", _HELP)
    parser.add_argument("--out", required=True, metavar="DIR", help="new checkpoint directory")
    parser.add_argument("--overwrite", action="store_true", help="replace what is in --out")
    names = [
        name for name in PretrainOptions.__dataclass_fields__ if name not in ("out", "overwrite")
    ]
    add_fields(parser, PretrainOptions, *names)
    parser.add_argument("--quiet", action="store_true", help="no progress on standard error")
    add_json(parser)


class _Progress(Progress):
    """Progress whose first line tells of a model from random weights."""

    def _ready(self, event: Event) -> None:
        self.steps = event["steps"]
        self._say(
            f"model    {event['layers']} blocks of width {event['hidden_size']}, "
            f"{event['parameters'] / 1e6:.2f} M parameters, all trained",
            f"data     {event['batch_size']} rows of {event['seq_len']} tokens a step, "
            f"new stories in each",
        )


def run(args: argparse.Namespace) -> int:
    known = PretrainOptions.__dataclass_fields__
    options = PretrainOptions(**{name: v for name, v in vars(args).items() if name in known})
    progress = _Progress(args.quiet)
    try:
        facts = pretrain(options, progress)
    finally:
        progress.close()
    if args.json:
        print_json({"out": options.out, **facts})
    else:
        say(*_describe(options, facts))
    return 0


def _describe(options: PretrainOptions, facts: Event) -> list[str]:
    return [
        f"sample   {facts['sampled']!r}",
        f"held-out loss {facts['loss']:.4f} nats per token, bound {facts['bound']:.4f}",
        f"the grammar accepts {facts['sampled_accepted']:.0%} of the stories drawn at temperature 1 "
        f"and {facts['greedy_accepted']:.0%} of the greedy ones",
        f"{options.steps} steps, {facts['tokens']} tokens in {facts['seconds']:.0f} s",
        f"checkpoint in {options.out}",
    ]
