"""mesp-ref mutants: can the checks fail?"""

import argparse
from typing import Any

from mesp_ref.cli.options import add_command, add_ranks, on_ranks
from mesp_ref.errors import MespRefError
from mesp_ref.train.ranks import Ranks

_HELP = """\
Plant every seeded bug, and every automatic mutant of every function that a gradient passes through,
and see which oracle rejects it; beside the bugs, whether a falling training loss would have. A table
in Markdown. Takes some ten minutes, with --seeded two; needs mpmath and hypothesis:
pip install 'mesp-ref[test]'.
Exit code 0: every wrong gradient was found; 1: one survived; 2: misuse.

examples:
  mesp-ref mutants
  mesp-ref mutants --seeded
  mpiexec -n 2 mesp-ref mutants --mpi
"""


def add(commands: Any) -> None:
    parser = add_command(commands, "mutants", run, "can the checks fail? the kill table", _HELP)
    parser.add_argument("--seeded", action="store_true", help="only the seeded bugs")
    add_ranks(parser, "bugs and mutants")


def run(args: argparse.Namespace) -> int:
    try:
        from mesp_ref.verify import mutants
    except ModuleNotFoundError as error:
        raise MespRefError(
            f"{error.name}: not installed, expected for mutants; pip install 'mesp-ref[test]'"
        ) from None

    def command(ranks: Ranks) -> int:
        ranks.alike({})
        return mutants.main(not args.seeded, ranks)

    return on_ranks(args, command)
