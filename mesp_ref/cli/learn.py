"""mesp-ref learn: exercises, a tutor that names mistakes, and grades."""

import argparse
import csv
import io
import sys
from pathlib import Path
from typing import Any

from mesp_ref.cli.options import add_command, say
from mesp_ref.errors import MespRefError
from mesp_ref.files.output import check_file, write_aside

_HELP = """\
Write each backward yourself, answer the notebooks' questions, and be told what is wrong. Without
arguments: the exercises and how far you are. With one: what is asked for. With a file of yours: whether
its function is right, which entry is wrong first, and which mistake it looks like.

What you have tried is kept in learn-progress.json in the working directory.
Exit code 0: right; 1: not yet; 2: misuse.

examples:
  mesp-ref learn
  mesp-ref learn rmsnorm_bwd
  mesp-ref learn rmsnorm_bwd my_file.py --hint
  mesp-ref learn --grade folder/ --csv grades.csv
  mesp-ref learn --page block.html
"""


def add(commands: Any) -> None:
    parser = add_command(commands, "learn", run, "write backwards; be told what is wrong", _HELP)
    parser.add_argument(
        "exercise", metavar="EXERCISE", nargs="?", help="its name; default: list them"
    )
    parser.add_argument("file", metavar="FILE", nargs="?", help="Python with your function")
    parser.add_argument(
        "--hint", type=int, nargs="?", const=1, default=0, metavar="N",
        help="1 (default when named): where to look; 2: how to begin; 3: the equation",
    )  # fmt: skip
    parser.add_argument(
        "--progress", metavar="FILE", default="learn-progress.json",
        help="where your progress is kept (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--grade", metavar="DIR",
        help="judge NAME.py or NAME/*.py of each student in DIR, each in a process of its own; the code "
        "is run as it is, with your rights",
    )  # fmt: skip
    parser.add_argument(
        "--csv", metavar="FILE", nargs="?", const="-",
        help="grades as CSV, a row for each student (default: on standard output)",
    )  # fmt: skip
    parser.add_argument(
        "--time-limit", type=int, default=60, metavar="N",
        help="seconds for one student (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--page", metavar="FILE", help="write the interactive page of a block")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the file of --csv or --page"
    )


def run(args: argparse.Namespace) -> int:
    asked = [name for name in ("exercise", "grade", "page") if getattr(args, name) is not None]
    if len(asked) > 1:
        raise MespRefError(f"{asked[0]} and --{asked[1]}: found both, expected one of them")
    if args.csv is not None and args.grade is None:
        raise MespRefError("--csv: found without --grade, expected beside it")
    if args.grade is not None:
        return _grade(args)
    if args.page is not None:
        return _page(args)
    if args.exercise is None:
        return _list(args)
    return _check(args) if args.file is not None else _show(args)


def _list(args: argparse.Namespace) -> int:
    """Every exercise, and how far this student is."""
    from mesp_ref.learn import EXERCISES, progress
    from mesp_ref.learn.exercises import QUESTIONS

    done = progress.read(args.progress)
    right = sum(bool(entry["passed_at"]) for entry in done.values())
    say(f"{right} of {len(EXERCISES)} exercises are right ({args.progress})")
    say("backwards and steps:")
    for name, exercise in EXERCISES.items():
        if exercise is QUESTIONS[0]:
            say("questions of notebooks 0 to 8:")
        entry = done.get(name, {"tries": 0, "passed_at": 0})
        tries = "1 try" if entry["tries"] == 1 else f"{entry['tries']} tries"
        state = "right" if entry["passed_at"] else tries if entry["tries"] else "-"
        say(f"  {name:24s}{state:10s}{exercise.title}")
    say("next: mesp-ref learn EXERCISE, then mesp-ref learn EXERCISE my_file.py")
    return 0


def _show(args: argparse.Namespace) -> int:
    from mesp_ref.learn import find, show
    from mesp_ref.learn.statement import hints

    lines = str(show(args.exercise)).splitlines()
    lines[-1] = f"Then: mesp-ref learn {find(args.exercise).name} my_file.py"
    say(*lines, *hints(find(args.exercise), args.hint))
    return 0


def _check(args: argparse.Namespace) -> int:
    """The verdict about a file's function."""
    from mesp_ref.learn import check, find, progress
    from mesp_ref.learn.student import answer_in, load, only_function

    exercise = find(args.exercise)
    progress.read(args.progress)  # a file of somebody else's is refused before anything runs
    defined = load(args.file)
    function = answer_in(defined, exercise) or only_function(defined, args.file)
    if function is None:
        raise MespRefError(f"{args.file}: found no function {exercise.name}, expected one")
    result = check(exercise.name, function, args.hint)
    say(*str(result).replace("hint=1", "--hint 1").splitlines())
    progress.note(exercise.name, result.passed, args.progress)
    return 0 if result.passed else 1


def _grade(args: argparse.Namespace) -> int:
    """A row for each student."""
    from mesp_ref.learn import EXERCISES
    from mesp_ref.learn.grade import grade

    if args.csv not in (None, "-"):
        check_file(args.csv, args.overwrite, [args.grade], "--csv")
    grades = []
    for found in grade(args.grade, args.time_limit):
        grades.append(found)
        if args.csv != "-":
            note = f"  ({found.note})" if found.note else ""
            say(f"{found.student:24s}{found.right:3d} of {len(EXERCISES)} right{note}")
    if args.csv is None:
        return 0
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["student", "right", *EXERCISES, "note"])
    for found in grades:
        cells = [found.verdicts[name] for name in EXERCISES]
        writer.writerow([_harmless(found.student), found.right, *cells, _harmless(found.note)])
    if args.csv == "-":
        sys.stdout.write(text.getvalue())
        return 0
    with write_aside(args.csv, overwrite=args.overwrite) as aside:
        aside.write_text(text.getvalue(), encoding="utf-8")
    return 0


def _harmless(text: str) -> str:
    """A cell that no spreadsheet takes for a formula, on one line."""
    line = " ".join(text.split())
    return f"'{line}" if line[:1] in ("=", "+", "-", "@") else line


def _page(args: argparse.Namespace) -> int:
    from mesp_ref.learn.page import page

    check_file(args.page, args.overwrite, [], "--page")
    with write_aside(args.page, overwrite=args.overwrite) as aside:
        aside.write_text(page(), encoding="utf-8")
    say(f"{args.page}: {Path(args.page).stat().st_size:,} bytes; open it in a browser")
    return 0
