"""SIGKILL of a random rank, again and again: `python tests/spread/kills.py --times 30`.

One run of `--ranks` processes is killed at random instants and resumed each time. Each end must
come in time and name the rank in a line, and the run that goes on to its end must leave the very
bytes of one process that was never interrupted. Prints what was found as JSON.
"""

import argparse
import hashlib
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from ranks_at_hand import ENVIRONMENT, ranks

from mesp_ref.files.checkpoint import save_checkpoint
from mesp_ref.verify.samples import sample_model, small_config

LIMIT = 20.0  # seconds within which a killed run must have ended
_NAMED = re.compile(r"^mesp-ref: error: rank (\d+) on \S+ \(process (\d+)\): lost at", re.MULTILINE)


def prepare(place: Path) -> list[str]:
    """A model and data; the options of a run on them."""
    rng = np.random.default_rng(3)
    config = small_config(vocab_size=99, hidden_size=48, intermediate_size=64)
    save_checkpoint(config, dict(sample_model(rng, config).weights), place / "model")
    lines = [json.dumps({"tokens": rng.integers(0, 99, 90).tolist()}) for _ in range(60)]
    (place / "data.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return [
        "-m", "mesp_ref", "finetune", "--model", str(place / "model"),
        "--data", str(place / "data.jsonl"), "--seq-len", "32",
        "--schedule", "constant", "--eval-rows", "2", "--sample-tokens", "0", "--save-every", "3",
        "--quiet",
    ]  # fmt: skip


def processes(launcher: int) -> dict[int, int]:
    """The ranks' processes by rank."""
    found = {}
    for process in psutil.Process(launcher).children(recursive=True):
        environment = process.environ()
        number = environment.get("PMI_RANK", environment.get("OMPI_COMM_WORLD_RANK"))
        command = process.cmdline()
        if number is not None and "finetune" in command and "--mpi" in command:
            found[int(number)] = process.pid
    return found


def steps_done(out: Path) -> int:
    """Whole lines of steps in the metrics."""
    file = out / "metrics.jsonl"
    return file.read_text().count('"event": "step"') if file.exists() else 0


def kill_once(command: list[str], out: Path, rng: random.Random) -> dict[str, Any]:
    """Start or resume, kill one rank at a random instant; how it ended."""
    before = steps_done(out)
    again = ["--resume"] if (out / "state.safetensors").exists() else []
    with tempfile.TemporaryFile("w+") as told:
        run = subprocess.Popen([*command, *again], stdout=told, stderr=told, env=ENVIRONMENT)
        deadline = time.monotonic() + 120
        while steps_done(out) in range(before + 4) and time.monotonic() < deadline:
            assert run.poll() is None, (told.seek(0), told.read())
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 0.3))
        rank, pid = rng.choice(sorted(processes(run.pid).items()))
        psutil.Process(pid).kill()
        begin = time.monotonic()
        code = run.wait(timeout=120)
        seconds = time.monotonic() - begin
        told.seek(0)
        text = told.read()
    return {"rank": rank, "pid": pid, "seconds": seconds, "code": code, "text": text}


def sound(end: dict[str, Any]) -> bool:
    """Whether the end came in time, with an exit code and one line that names the rank."""
    named = _NAMED.findall(end["text"])
    right = named == [(str(end["rank"]), str(end["pid"]))]
    return right and end["code"] != 0 and end["seconds"] <= LIMIT


def kill_and_resume(place: Path, times: int, size: int, seed: int) -> dict[str, Any]:
    """A run killed `times` times, and its end compared with that of one process."""
    options, rng, out = prepare(place), random.Random(seed), place / "spread"
    spread = ranks(size, *options, "--out", str(out), "--accumulate", "1", "--mpi", "--steps")
    ends = [kill_once([*spread, "1000000"], out, rng) for _ in range(times)]
    steps = str(steps_done(out) + 5)
    subprocess.run([*spread, steps, "--resume"], check=True, env=ENVIRONMENT, capture_output=True)
    alone = [sys.executable, *options, "--out", str(place / "alone"), "--accumulate", str(size)]
    subprocess.run([*alone, "--steps", steps], check=True, env=ENVIRONMENT, capture_output=True)
    adapters = [folder / "adapter/adapter_model.safetensors" for folder in (out, place / "alone")]
    hashes = {hashlib.sha256(file.read_bytes()).hexdigest() for file in adapters}
    return {
        "kills": times,
        "ended_well": sum(map(sound, ends)),
        "slowest_end_seconds": round(max(end["seconds"] for end in ends), 2),
        "steps": int(steps),
        "same_bytes": len(hashes) == 1,
        "wrong": [end for end in ends if not sound(end)],
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=30)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = kill_and_resume(Path(folder), given.times, given.ranks, given.seed)
    print(json.dumps(found, indent=2))
    sys.exit(not (found["same_bytes"] and found["ended_well"] == given.times))
