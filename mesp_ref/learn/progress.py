"""What a student has done, in one small file of JSON in the working directory."""

import json
from pathlib import Path

from mesp_ref.errors import MespRefError
from mesp_ref.files.output import write_aside
from mesp_ref.files.strict import read_object

FILE = "learn-progress.json"
_FORMAT = "mesp_ref learn 1"


def read(path: str | Path = FILE) -> dict[str, dict[str, int]]:
    """By exercise: how many tries, and at which one it passed (0: not yet).

    Raises MespRefError for a file of this name that is not ours: it is never written over
    """
    path = Path(path)
    if not path.exists():
        return {}
    found = read_object(path, "expected what mesp-ref learn wrote")
    if found.get("format") != _FORMAT:
        raise MespRefError(
            f"{path}: found another file, expected one that mesp-ref learn wrote; name another "
            "place with --progress"
        )
    done = found.get("exercises")
    if not isinstance(done, dict) or not all(_is_entry(entry) for entry in done.values()):
        raise MespRefError(f"{path}: exercises: found something else than tries, expected numbers")
    return done


def _is_entry(entry: object) -> bool:
    return isinstance(entry, dict) and all(
        isinstance(entry.get(key), int) for key in ("tries", "passed_at")
    )


def note(exercise: str, passed: bool, path: str | Path = FILE) -> None:
    """Count a try; the first that passed is remembered."""
    done = read(path)
    entry = done.setdefault(exercise, {"tries": 0, "passed_at": 0})
    entry["tries"] += 1
    if passed and not entry["passed_at"]:
        entry["passed_at"] = entry["tries"]
    with write_aside(path) as aside:
        text = json.dumps({"format": _FORMAT, "exercises": done}, indent=2)
        aside.write_text(text + "\n", encoding="utf-8")
