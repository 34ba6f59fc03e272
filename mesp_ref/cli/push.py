"""mesp-ref push: an adapter or a model to the Hugging Face hub."""

import argparse
from typing import Any

from mesp_ref.cli.options import add_command, add_json, print_json, say
from mesp_ref.files.push import push

_HELP = """\
Upload an adapter (a run's folder stands for its adapter/) or a checkpoint directory to user/name on
the Hugging Face hub, as one commit. A repository that is not there is made, public unless --private,
as hf upload does; one that is there keeps what it is. State, metrics and text of the data stay here,
and no file says where a thing lay on this machine. Needs huggingface_hub (pip install
'mesp-ref[hub]') and an account: hf auth login, or HF_TOKEN.

examples:
  mesp-ref push runs/001 mila/stories-lora --private
  mesp-ref push merged mila/stories-merged --message "First version" --json
"""


def add(commands: Any) -> None:
    parser = add_command(commands, "push", run, "an adapter or a model to the hub", _HELP)
    parser.add_argument("folder", metavar="FOLDER", help="a run's, an adapter's or a model's")
    parser.add_argument("name", metavar="USER/NAME", help="repository on the hub")
    parser.add_argument("--private", action="store_true", help="if it is made, for yourself alone")
    parser.add_argument("--message", metavar="TEXT", help="of the commit")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    pushed = push(args.folder, args.name, args.private, args.message)
    if args.json:
        print_json({"url": pushed.url, "files": pushed.files, "bytes": pushed.size})
    else:
        say(f"pushed {', '.join(pushed.files)}: {pushed.size / 1e6:.1f} MB to {pushed.url}")
    return 0
