"""Many students' files: each in a process of its own, with a time limit.

A student's code is run as it is: under the account that grades, with its rights.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from mesp_ref.errors import MespRefError
from mesp_ref.learn.exercises import EXERCISES
from mesp_ref.learn.student import answer_in, load
from mesp_ref.learn.tutor import check

RIGHT, WRONG, MISSING, LATE = "right", "wrong", "missing", "late"


class Grade(NamedTuple):
    """One student: a verdict for every exercise, and what stopped the file, if anything did."""

    student: str
    verdicts: dict[str, str]
    note: str = ""

    @property
    def right(self) -> int:
        return sum(verdict == RIGHT for verdict in self.verdicts.values())


def grade(folder: str | Path, time_limit: int = 60) -> Iterator[Grade]:
    """A grade for every Python file in a folder, or for every folder of them in it.

    time_limit   seconds for one student; what was judged by then counts, the rest is late
    Raises MespRefError for a folder that is not there or holds no Python
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise MespRefError(f"{folder}: found no such folder, expected students' files")
    students: dict[str, list[Path]] = {}
    for file in sorted([*folder.glob("*.py"), *folder.glob("*/*.py")]):
        name = file.stem if file.parent == folder else file.parent.name
        students.setdefault(name, []).append(file)
    if not students:
        raise MespRefError(
            f"{folder}: found no Python, expected NAME.py or NAME/*.py of each student"
        )
    for name, files in students.items():
        yield _graded(name, files, time_limit)


def _graded(name: str, files: list[Path], time_limit: int) -> Grade:
    """One process for one student; verdicts come in a file, apart from what the student prints."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "verdicts"
        out.touch()
        places = [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")]
        late, code = _run(
            [
                sys.executable,
                "-m",
                "mesp_ref.learn.grade",
                str(out),
                *map(str, map(Path.resolve, files)),
            ],
            scratch,
            os.environ
            | {"OPENBLAS_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
            | {
                "PYTHONPATH": os.pathsep.join(filter(None, places))
            },  # this very package, from anywhere
            time_limit,
        )
        lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    verdicts = {line["exercise"]: line["verdict"] for line in lines if "exercise" in line}
    note = next((line["note"] for line in lines if "note" in line), "")
    if late:
        note = note or f"stopped after {time_limit} s"
    elif code and not note:
        note = f"the process ended with code {code}"
    rest = LATE if late else MISSING
    return Grade(name, {exercise: verdicts.get(exercise, rest) for exercise in EXERCISES}, note)


def _run(
    command: list[str], place: str, environment: dict[str, str], limit: int
) -> tuple[bool, int]:
    """Whether it took too long, and its exit code. Nothing it started stays behind."""
    process = subprocess.Popen(
        command, cwd=place, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        return False, process.wait(limit)
    except subprocess.TimeoutExpired:
        return True, 0
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def main(arguments: list[str]) -> None:
    """What a student's process does: judge every exercise that its files answer, a line each."""
    out, *files = arguments
    defined = dict[str, object]()
    with open(out, "a", encoding="utf-8") as lines:  # noqa: PTH123

        def tell(**line: str) -> None:
            lines.write(json.dumps(line) + "\n")
            lines.flush()

        for file in files:
            try:
                defined |= load(file)
            except MespRefError as error:
                tell(note=str(error).replace(str(Path(file).parent) + os.sep, ""))
        for exercise in EXERCISES.values():
            function = answer_in(defined, exercise)
            if function is not None:
                passed = check(exercise.name, function).passed
                tell(exercise=exercise.name, verdict=RIGHT if passed else WRONG)


if __name__ == "__main__":
    main(sys.argv[1:])
