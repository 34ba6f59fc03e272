"""mesp-ref golden: build, check and run the vectors that prove another backend."""

import argparse
import sys
import tempfile
from collections.abc import Callable
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from mesp_ref import __version__
from mesp_ref.cli import golden_sketch
from mesp_ref.cli.options import Parser, add_command, add_json, add_ranks, on_ranks, print_json, say
from mesp_ref.files.names import shared_name
from mesp_ref.files.output import check_file, new_directory, write_aside
from mesp_ref.golden.backends import BACKENDS, run
from mesp_ref.golden.check import ROLES, check, select
from mesp_ref.golden.suite import DTYPES, SHIPPED, Suite
from mesp_ref.train.ranks import Ranks

_HELP = """\
Golden vectors for another backend (Swift, C++, CUDA, MLX, torch): inputs, cotangents and expected
outputs and gradients, with tolerances that are derived. The format is described in the suite's
README.md; a backend needs no Python to use it.

examples:
  mesp-ref golden export suite
  mesp-ref golden check my_outputs --only ops/rmsnorm
"""
_CHECK = """\
Compare the files that a backend wrote with the suite: DIR/ops/rmsnorm/usual.safetensors holds its
tensors y, dx and dw. Says which tensors differ, which one first, and what the difference looks like.
Exit code 0: all agree; 1: some differ; 2: misuse.

examples:
  mesp-ref golden check outputs
  mesp-ref golden check outputs --only ops/rmsnorm --only 'block/*:*lora*' --dtype bfloat16
  mesp-ref golden check outputs --roles result --json --html report.html
  mesp-ref golden check outputs --present --waivers golden.toml --junit golden.xml --github
"""
_RUN = """\
Run a backend over the suite and write its outputs, as golden check reads them: mesp_ref's own engine, or
a framework or kernels that you have installed. What each covers: docs/scoreboard.md.

examples:
  mesp-ref golden run engine --out outputs --only 'ops/*'
  mesp-ref golden run torch --out torch_outputs --only 'ops/*' --dtype bfloat16
"""
_BUILD = """\
Build the suite anew from the equations (a minute or two; needs mpmath and python-flint).

examples:
  mesp-ref golden build suite
  mpiexec -n 2 mesp-ref golden build suite --overwrite --mpi
"""
_CERTIFY = """\
Prove every expected value of the op cases: ball arithmetic encloses the equation and its derivatives at
400 bits, and each stored number must be the correctly rounded one. Needs python-flint. Exit code 1 where
one is refuted.

examples:
  mesp-ref golden certify
  mesp-ref golden certify --only 'ops/rmsnorm/*'
"""
_EXPORT = """\
Copy the shipped suite, every file held against its SHA-256 first.

examples:
  mesp-ref golden export suite
"""


def add(commands: Any) -> None:
    parser = add_command(commands, "golden", None, "vectors that prove another backend", _HELP)
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    _add_check(actions)
    _add_run(actions)
    built = add_command(actions, "build", run_build, "build the suite from the equations", _BUILD)
    built.add_argument("out", metavar="OUT", help="new directory")
    built.add_argument("--overwrite", action="store_true", help="replace what is there")
    add_ranks(built, "the cases")
    proven = add_command(actions, "certify", run_certify, "prove the expected values", _CERTIFY)
    _add_selection(proven)
    golden_sketch.add(actions)
    copied = add_command(actions, "export", run_export, "copy the shipped suite", _EXPORT)
    copied.add_argument("out", metavar="OUT", help="new directory")
    copied.add_argument("--overwrite", action="store_true", help="replace what is there")


def _add_selection(parser: Parser) -> None:
    parser.add_argument("--suite", default=SHIPPED, metavar="DIR", help="default: the shipped one")
    parser.add_argument(
        "--only", action="append", default=[], metavar="PATTERN",
        help="a case, a folder of cases, or case:tensor with wildcards; may be repeated",
    )  # fmt: skip


def _add_check(actions: Any) -> None:
    parser = add_command(actions, "check", run_check, "compare a backend's outputs", _CHECK)
    parser.add_argument("actual", metavar="DIR", help="what the backend wrote")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="precision it computed in (default: as stored)"
    )
    _add_selection(parser)
    parser.add_argument(
        "--roles", default=",".join(ROLES), metavar="NAMES",
        help="result: outputs, loss, gradients of inputs and LoRA; base: of base weights; inner: "
        "intermediates (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--present", action="store_true", help="cases without a file are not asked for"
    )
    parser.add_argument(
        "--waivers", metavar="FILE", help="TOML: what the backend covers, deviations it accepts"
    )
    parser.add_argument("--html", metavar="FILE", help="also write a page with a heat map")
    parser.add_argument("--junit", metavar="FILE", help="also write JUnit XML")
    parser.add_argument("--github", action="store_true", help="also print annotations of GitHub")
    parser.add_argument("--overwrite", action="store_true", help="replace --html and --junit")
    add_json(parser)


def _add_run(actions: Any) -> None:
    parser = add_command(actions, "run", run_backend, "run a backend over the suite", _RUN)
    parser.add_argument(
        "backend",
        metavar="BACKEND",
        help=", ".join(BACKENDS),
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="new directory")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="default: %(default)s")
    _add_selection(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace what is in --out")


def run_check(args: argparse.Namespace) -> int:
    from mesp_ref.golden.ci import as_annotations, as_junit
    from mesp_ref.golden.page import as_html
    from mesp_ref.golden.report import as_json, as_text
    from mesp_ref.golden.waivers import Coverage, read_coverage, waive

    name = shared_name(str(Path(args.actual).absolute())) or ""  # a page is for others
    now = f"{datetime.now():%Y-%m-%d %H:%M}, mesp_ref {__version__}"
    as_page = partial(as_html, backend=name, when=now)
    pages: dict[str, tuple[str | None, Callable[..., str]]] = {
        "--html": (args.html, as_page),
        "--junit": (args.junit, as_junit),
    }
    for option, (file, _) in pages.items():
        if file:
            check_file(file, args.overwrite, [args.actual, args.suite], option)
    coverage = read_coverage(args.waivers) if args.waivers else Coverage()
    report = check(
        args.actual, Suite(args.suite), dtype=args.dtype, only=args.only or coverage.covers,
        roles=args.roles.split(","), present=args.present,
    )  # fmt: skip
    report, waived = waive(report, coverage.waivers)
    for file, page in pages.values():
        if file:
            with write_aside(file, overwrite=args.overwrite) as aside:
                aside.write_text(page(report), encoding="utf-8")
    if args.json:
        print_json(as_json(report))
    else:
        say(*as_text(report).splitlines(), *waived)
    if args.github:
        say(*as_annotations(report))
    return 0 if report.passed else 1


def run_backend(args: argparse.Namespace) -> int:
    done = run(
        args.backend, args.out, Suite(args.suite), dtype=args.dtype, only=args.only,
        overwrite=args.overwrite,
    )  # fmt: skip
    say(f"{len(done)} cases in {args.dtype} written to {args.out}")
    return 0


def run_build(args: argparse.Namespace) -> int:
    from mesp_ref.golden.builder import build

    def command(ranks: Ranks) -> int:
        with tempfile.TemporaryDirectory() as own:  # ranks other than 0 write where nobody looks
            out = args.out if ranks.rank == 0 else Path(own) / "suite"
            log = partial(say, file=sys.stderr)
            count = build(out, log, overwrite=args.overwrite, ranks=ranks)
        say(f"{count} cases written to {args.out}")
        return 0

    return on_ranks(args, command)


def run_certify(args: argparse.Namespace) -> int:
    from mesp_ref.golden.certify import certify

    suite, refuted, proven, undecided = Suite(args.suite), 0, 0, 0
    for case, _ in select(suite, args.only or ["ops"], ROLES):
        if case.kind != "op":
            continue
        found = certify(suite, case)
        proven, refuted = proven + found.proven, refuted + len(found.refuted)
        undecided += len(found.undecided)
        for text, places in (("refuted", found.refuted), ("not decided", found.undecided)):
            if places:
                say(f"{found.case}: {text}: {', '.join(places)}")
    say(
        f"{proven} values proven to be correctly rounded, {undecided} not decided, {refuted} refuted"
    )
    return 1 if refuted else 0


def run_export(args: argparse.Namespace) -> int:
    from shutil import copyfile

    suite = Suite()
    count = suite.verify_all()
    with new_directory(args.out, overwrite=args.overwrite, inputs=[suite.root]) as aside:
        for file in filter(Path.is_file, suite.root.rglob("*")):
            target = aside / file.relative_to(suite.root)
            target.parent.mkdir(parents=True, exist_ok=True)
            copyfile(file, target)
    say(f"{count} files copied to {args.out}")
    return 0
