"""A fault at each call of a replacement: `python tests/replacing.py` (see SECURITY.md).

A child replaces version 1 by version 2. Before its n-th call into the system (counted by Python's
profiler: every function of posix, io, fcntl and ctypes) it is killed, told that the disk is full,
finds from there on that no file can grow, or gets Ctrl-C; for every n. Then version 1 or 2 must lie
there, whole. Prints what was found as JSON.

Without an exchange of names (tried too) a kill between two renames
leaves the name empty until the next start: then `recover` has to put it back.
"""

import argparse
import errno
import json
import os
import resource
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import mesp_ref as mr
from mesp_ref.files import aside, output
from mesp_ref.job.directory import RunDirectory, write_json
from mesp_ref.job.state import load_state, save_state
from mesp_ref.verify.samples import small_config

CONFIG = small_config(hidden_size=16, intermediate_size=16)
KINDS = ("kill", "no space", "full from there", "Ctrl-C")
_FAST = "/dev/shm" if Path("/dev/shm").is_dir() else None  # where a sync takes no time
_MODULES = {"posix", "_io", "fcntl", "_ctypes", "nt"}


def _adapter(version: int, alpha: float) -> mr.Adapter:
    adapter = mr.init_lora(CONFIG, rank=2, alpha=alpha)
    for array in adapter.weights.values():
        array[...] = version
    return adapter


def _version(place: Path, alpha: Callable[[int], float]) -> int:
    """The version of an adapter, read twice: by our reader, and file by file as others do."""
    found = mr.load_adapter(place)
    [value] = {float(v) for array in found.weights.values() for v in array.flat}
    stated = json.loads((place / "adapter_config.json").read_text())["lora_alpha"]
    assert stated == found.alpha == alpha(int(value)), (stated, found.alpha, value)
    return int(value)


# Each subject: how version v comes to lie at a place, and which version lies there, whole.


def _write_folder(place: Path, version: int) -> None:
    with output.new_directory(place, overwrite=True) as folder:
        (folder / "sub").mkdir()
        for name in ("a", "b", f"only {version}", "sub/c"):
            (folder / name).write_text(f"version {version}")


def _read_folder(place: Path) -> int:
    files = {p.relative_to(place).as_posix(): p.read_text() for p in place.rglob("*")
             if p.is_file() and p.name != ".mesp-ref.json"}  # fmt: skip
    [text] = set(files.values())
    version = int(text.split()[1])
    assert set(files) == {"a", "b", f"only {version}", "sub/c"}, files
    return version


def _event(step: int) -> dict[str, Any]:
    names = ("loss", "lr", "grad_norm", "tokens", "computed_tokens", "seconds",
             "tokens_per_second", "memory_mb")  # fmt: skip
    return {"event": "step", "step": step, **dict.fromkeys(names, 1)}


def _write_run(place: Path, version: int) -> None:
    directory = RunDirectory(place, overwrite=True)
    try:
        directory.create({"version": version})
        directory.metrics.log(_event(version))
        save_state(directory.file("state.safetensors"), {"w": np.full(4, version)}, {})
        mr.save_adapter(_adapter(version, 8.0 * version), directory.adapter)
        write_json(directory.file("summary.json"), {"version": version})
        directory.complete()
    finally:
        directory.release()


def _read_run(place: Path) -> int:
    version = json.loads((place / "summary.json").read_text())["version"]
    assert json.loads((place / "run.json").read_text())["version"] == version
    assert json.loads((place / "metrics.jsonl").read_text())["step"] == version
    assert set(load_state(place / "state.safetensors")[0]["w"]) == {version}
    assert _version(place / "adapter", lambda v: 8.0 * v) == version
    return int(version)


def _write_file(place: Path, version: int) -> None:
    with output.write_aside(place) as file:
        file.write_text(f"version {version}")


SUBJECTS: dict[str, tuple[Callable[[Path, int], None], Callable[[Path], int]]] = {
    "folder": (_write_folder, _read_folder),
    "run": (_write_run, _read_run),
    "adapter of the same scale": (
        lambda place, v: mr.save_adapter(_adapter(v, 8.0), place),
        lambda place: _version(place, lambda v: 8.0),
    ),
    "adapter of another scale": (
        lambda place, v: mr.save_adapter(_adapter(v, 8.0 * v), place, overwrite=True),
        lambda place: _version(place, lambda v: 8.0 * v),
    ),
    "file": (_write_file, lambda place: int(place.read_text().split()[1])),
}


def _is_call(function: Any) -> bool:
    owner = type(getattr(function, "__self__", None)).__module__
    return (getattr(function, "__module__", None) or owner) in _MODULES or owner == "_io"


def _strike(kind: str) -> None:
    if kind == "kill":
        os._exit(9)
    if kind == "no space":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if kind == "Ctrl-C":
        raise KeyboardInterrupt
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))


def _child(write: Callable[[Path, int], None], place: Path, kind: str, n: int, tell: int) -> None:
    """Write version 2 with a fault at call `n`; tells how many calls there were."""
    calls = 0

    def profile(frame: object, event: str, function: object) -> None:
        nonlocal calls
        if event == "c_call" and _is_call(function):
            calls += 1
            if calls == n:
                _strike(kind)

    outcome = "done"
    sys.setprofile(profile)
    try:
        write(place, 2)
    except (mr.MespRefError, KeyboardInterrupt, OSError) as error:
        outcome = type(error).__name__
    finally:
        sys.setprofile(None)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        os.write(tell, f"{calls} {outcome}".encode())
        os._exit(0)


def _one(subject: str, place: Path, kind: str, n: int) -> tuple[str, str]:
    """What the child came to, and what lies at the place: "1" or "2", else what is wrong."""
    write, read = SUBJECTS[subject]
    reads, writes = os.pipe()
    child = os.fork()
    if not child:
        _child(write, place, kind, n, writes)
    os.close(writes)
    with os.fdopen(reads, "rb") as told:
        outcome = told.read().decode()
    os.waitpid(child, 0)
    late = ""
    if not place.exists() and kind == "kill":
        output.recover(place)
        late = " after recovery"
    try:
        return outcome, f"{read(place)}{late}"
    except Exception as error:
        return outcome, f"LOST: {error!r}"


def _next_start(subject: str, place: Path) -> str:
    """The same command once more: it must work, and leave nothing beside what it wrote."""
    try:
        SUBJECTS[subject][0](place, 3)
    except mr.MespRefError as error:
        return f"refused: {str(error).partition(': ')[2]}"
    beside = sorted(p.name for p in place.parent.iterdir() if p != place)
    inside = [p.name for p in place.rglob("*") if aside.is_aside(p.name)] if place.is_dir() else []
    whole = SUBJECTS[subject][1](place) == 3
    return "" if whole and not beside and not inside else f"left: {beside} {inside}"


def try_all(subject: str, kind: str, every: int, exchange: bool) -> Counter[str]:
    """Faults at calls 1, 1 + every, …, until the replacement ends before the fault."""
    usual, found, n = aside.exchange, Counter[str](), 1
    if not exchange:
        aside.exchange = lambda a, b: False
    try:
        while True:
            with tempfile.TemporaryDirectory(dir=_FAST) as folder:
                place = Path(folder) / "place"
                SUBJECTS[subject][0](place, 1)
                outcome, version = _one(subject, place, kind, n)
                found[version] += 1
                if left := _next_start(subject, place):
                    found[f"NEXT START {left}"] += 1
            if outcome and int(outcome.split()[0]) < n:
                return found
            n += every
    finally:
        aside.exchange = usual


def torn(reads: int, exchange: bool) -> dict[str, int]:
    """Adapters of two scales, saved in turn over one another, as a reader finds them meanwhile."""
    found, pairs = Counter[str](), {8.0: 1.0, 16.0: 2.0}
    with tempfile.TemporaryDirectory(dir=_FAST) as folder:
        place = Path(folder) / "place"
        mr.save_adapter(_adapter(1, 8.0), place)
        child = os.fork()
        if not child:
            try:
                if not exchange:
                    aside.exchange = lambda a, b: False
                while True:
                    for alpha, version in ((16.0, 2), (8.0, 1)):
                        mr.save_adapter(_adapter(version, alpha), place, overwrite=True)
            finally:
                os._exit(1)
        try:
            for _ in range(reads):
                try:
                    adapter = mr.load_adapter(place)
                except mr.MespRefError as error:
                    found["absent" if "not found" in str(error) else str(error)] += 1
                    continue
                values = {float(v) for array in adapter.weights.values() for v in array.flat}
                found["torn" if values != {pairs[adapter.alpha]} else f"{adapter.alpha}"] += 1
        finally:
            alive = os.waitpid(child, os.WNOHANG) == (0, 0)
            if alive:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
    found["the writer ended"] += not alive
    return dict(found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--every", type=int, default=1, help="take every n-th call")
    parser.add_argument("--torn", type=int, metavar="READS", help="read adapters during saves")
    parser.add_argument("--only", choices=SUBJECTS, action="append", help="default: all")
    options = parser.parse_args()
    if options.torn:
        table = {how: torn(options.torn, how == "exchange") for how in ("exchange", "two renames")}
        print(json.dumps(table, indent=1))
        good = {"8.0", "16.0", "absent", "the writer ended"}
        return int(any(t.keys() - good or t["the writer ended"] for t in table.values()))
    table, lost = {}, 0
    for subject in options.only or SUBJECTS:
        for exchange in (True, False):
            for kind in KINDS:
                found = try_all(subject, kind, options.every, exchange)
                how = "exchange" if exchange else "two renames"
                print(subject, how, kind, dict(found), file=sys.stderr, flush=True)
                table[f"{subject}, {how}, {kind}"] = dict(found)
                allowed = {"1", "2"}
                if not exchange:
                    allowed |= {f"{version} after recovery" for version in (1, 2)}
                lost += sum(count for version, count in found.items() if version not in allowed)
    print(json.dumps({"lost": lost, "found": table}, indent=1))
    return int(lost > 0)


if __name__ == "__main__":
    sys.exit(main())
