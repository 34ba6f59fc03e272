"""The whole job beside peft + transformers' Trainer: SmolLM2-135M, from the command to the adapter.

    python benchmarks/job.py                    writes docs/benchmarks/job.md; ten minutes
    python benchmarks/job.py --cpu              CPU seconds, where others use the machine
    python benchmarks/job.py --steps 4 --rounds 1 --out look

Each job is a process of its own that reads the model, starts from the same adapter, trains on the same
rows in the same order with AdamW, and writes the adapter: imports and loading are part of it. The losses
of every step are compared. The model is that of convert_smollm2.py, kept in mesp_ref's cache.
job.json keeps the figures for the table of all pages (index.py).
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from common import machine, markdown_table, median, write_report
from frameworks import threads_of_blas

from mesp_ref.engine.init import init_lora
from mesp_ref.errors import MespRefError
from mesp_ref.files.models import cache_directory, load_model
from mesp_ref.files.peft import save_adapter
from mesp_ref.files.tokenizer import load_tokenizer
from mesp_ref.train.opening import open_stream

SEQ, BATCH, RANK, RATE = 256, 4, 8, 2e-4
TRAINER, CHECKPOINTED = "peft + Trainer", "peft + Trainer, gradient checkpointing"
OURS = {
    "mesp-ref finetune": [],
    "mesp-ref finetune --method store_all": ["--method", "store_all"],
    "mesp-ref finetune --method mesp_tiled --checkpoints offload": [
        "--method", "mesp_tiled", "--checkpoints", "offload",
    ],
    "mesp-ref finetune --method mesp_streamed": ["--method", "mesp_streamed"],
}  # fmt: skip
SAME, GOAL = 2e-3, 1.3  # of a step's loss, relative: later steps carry what was rounded before
HERE = Path(__file__).resolve().parent
OUT = HERE.parent / "docs/benchmarks"


class Job(NamedTuple):
    """One run."""

    seconds: float
    losses: list[float]
    resident: float  # MiB, its highest


class Inputs(NamedTuple):
    """What every job is given."""

    model: Path
    adapter: Path
    data: Path  # records of tokens
    rows: Path  # the same rows in the order in which mesp-ref takes them


def smollm2() -> Path:
    """The converted model, converted first where it is missing."""
    path = cache_directory() / "smollm2-135m-instruct-llama"
    if not path.exists():
        done = subprocess.run(
            [sys.executable, str(HERE / "convert_smollm2.py"), str(path)], check=False
        )
        if done.returncode:
            raise MespRefError(f"{path}: missing, and it cannot be made, see above")
    return path


def prepare(folder: Path, model: Path, steps: int) -> Inputs:
    """An adapter, and rows of the pages of this repository; as a file of records, and in their order."""
    opened = load_model(model)
    save_adapter(init_lora(opened.config, RANK), folder / "adapter")
    pages = sorted(HERE.parent.joinpath("docs").glob("*.md"))
    text = "\n\n".join(page.read_text(encoding="utf-8") for page in pages)
    ids = load_tokenizer(model).encode(text).ids[: steps * BATCH * SEQ]
    if len(ids) < steps * BATCH * SEQ:
        raise MespRefError(f"--steps: found {steps}, expected at most {len(ids) // (BATCH * SEQ)}")
    rows = np.reshape(ids, (-1, SEQ))
    data = folder / "rows.jsonl"
    data.write_text(
        "".join(json.dumps({"tokens": r}) + "\n" for r in rows.tolist()), encoding="utf-8"
    )
    stream = open_stream(opened, data, seq_len=SEQ, packing="pad", seed=0)
    taken = [np.asarray(row.ids, np.int64) for row in stream.take(len(rows))]
    np.save(folder / "rows.npy", np.stack(taken))
    return Inputs(model, folder / "adapter", data, folder / "rows.npy")


def command(name: str, given: Inputs, out: Path, steps: int, threads: int) -> list[str]:
    """What is run for a job."""
    if name in OURS:
        return [
            sys.executable, "-m", "mesp_ref", "finetune", "--model", str(given.model),
            "--adapter", str(given.adapter), "--data", str(given.data), "--packing", "pad",
            "--seq-len", str(SEQ), "--val-fraction", "0", "--batch-size", str(BATCH),
            "--accumulate", "1", "--steps", str(steps), "--lr", str(RATE), "--schedule", "constant",
            "--warmup", "0", "--no-sample", "--quiet", "--workers", str(threads), "--out", str(out),
            *OURS[name],
        ]  # fmt: skip
    more = ["checkpointed"] if name == CHECKPOINTED else []
    script = HERE / "job_trainer.py"
    files = (given.model, given.adapter, given.rows, BATCH, RATE, out, *more)
    return [sys.executable, str(script), *map(str, files)]


def run(name: str, given: Inputs, out: Path, steps: int, threads: int, cpu: bool) -> Job:
    """One job: its seconds, and the loss of each step.

    Raises MespRefError when the process fails
    """
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONWARNINGS": "ignore"}
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    process = subprocess.Popen(
        command(name, given, out, steps, threads), env=environment,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - begin
    if process.returncode:
        raise MespRefError(f"{name}: {(said.strip().splitlines() or ['it gave no reason'])[-1]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Job(spent if cpu else seconds, _losses(out), used.ru_maxrss / 1024)


def _losses(out: Path) -> list[float]:
    held = out / "losses.json"
    if held.exists():
        found: list[float] = json.loads(held.read_text(encoding="utf-8"))
        return found
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    events = [json.loads(line) for line in lines]
    return [event["loss"] for event in events if event["event"] == "step"]


def compare(jobs: dict[str, list[Job]]) -> dict[str, float]:
    """The largest relative difference of any step's loss from the Trainer's.

    Raises MespRefError where it is more than SAME, or the number of steps differs
    """
    want = jobs[TRAINER][0].losses
    found = {}
    for name, runs in jobs.items():
        losses = runs[0].losses
        if len(losses) != len(want):
            raise MespRefError(f"{name}: {len(losses)} losses, expected the Trainer's {len(want)}")
        off = [abs(a - b) / abs(b) for a, b in zip(losses, want, strict=True)]
        found[name] = float(np.max(off))  # NaN stays NaN, which the built-in max may lose
        if not found[name] <= SAME:
            raise MespRefError(f"{name}: losses differ from the Trainer's by {found[name]:.1e}")
    return found


def measure(steps: int, rounds: int, threads: int, cpu: bool) -> dict[str, list[Job]]:
    """All jobs in turns."""
    jobs: dict[str, list[Job]] = {name: [] for name in (TRAINER, CHECKPOINTED, *OURS)}
    with tempfile.TemporaryDirectory(prefix="job-") as scratch:
        given = prepare(Path(scratch), smollm2(), steps)
        for turn in range(rounds):
            for name, runs in jobs.items():
                out = Path(scratch) / f"{turn}-{list(jobs).index(name)}"
                runs.append(run(name, given, out, steps, threads, cpu))
                rate = steps * BATCH * SEQ / runs[-1].seconds
                print(f"{name}: {rate:.0f} tokens a second", file=sys.stderr, flush=True)
    return jobs


def figures(jobs: dict[str, list[Job]], steps: int) -> dict[str, dict[str, Any]]:
    """Tokens a second and what else is known of each."""
    off, tokens = compare(jobs), steps * BATCH * SEQ
    found = {}
    for name, runs in jobs.items():
        seconds = median([job.seconds for job in runs])
        resident = median([job.resident for job in runs])
        first, *_, last = runs[0].losses
        found[name] = {
            "tokens a second": tokens / seconds, "seconds": seconds, "resident": resident,
            "first": first, "last": last, "off": off[name],
        }  # fmt: skip
    return found


def report(
    found: dict[str, dict[str, Any]], steps: int, rounds: int, cpu: bool, threads: int
) -> str:
    """The page."""
    peer = max(found[name]["tokens a second"] for name in (TRAINER, CHECKPOINTED))
    rows = [
        (
            f"`{name}`" if name in OURS else name, f"{x['tokens a second']:.0f}",
            f"{x['tokens a second'] / peer:.2f}", f"{x['seconds']:.1f}", f"{x['resident']:,.0f}",
            f"{x['first']:.4f} → {x['last']:.4f}", f"{x['off']:.0e}",
        )
        for name, x in found.items()
    ]  # fmt: skip
    best = max(found[name]["tokens a second"] for name in OURS) / peer
    head = (
        "job",
        "tokens a second",
        "÷ the faster peer",
        "seconds",
        "resident, MiB",
        "loss",
        "off",
    )
    clock = "CPU seconds" if cpu else "Seconds of the clock"
    return "\n\n".join((
        "# The whole job beside peft and transformers' Trainer",
        "Written by `benchmarks/job.py`. " + "; ".join(machine()) + ".",
        f"SmolLM2-135M-Instruct in float32, LoRA of rank {RANK} on the seven projections from one "
        f"adapter, {steps} steps of {BATCH} rows of {SEQ} tokens of this repository's pages, the same "
        f"rows in the same order, AdamW at {RATE:g}. {clock}, {threads} thread{'s' * (threads > 1)}, "
        f"from the start of the process to the adapter on disk, medians of {rounds} "
        f"round{'s' * (rounds > 1)} in turns. Resident is all of the process, the mapped weights "
        "included. *off* is the largest difference of a step's loss from the Trainer's.",
        markdown_table(head, rows),
        f"Goal: {GOAL} times the tokens of the faster peer; the fastest of ours reaches **{best:.2f}**.",
    ))  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write; a user's mistake is one line and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--cpu", action="store_true", help="CPU seconds in place of the clock's")
    parser.add_argument(
        "--out", type=Path, default=OUT, help="directory (default: docs/benchmarks)"
    )
    args = parser.parse_args(arguments)
    threads = threads_of_blas()
    try:
        jobs = measure(args.steps, args.rounds, threads, args.cpu)
        found = figures(jobs, args.steps)
    except MespRefError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    text = report(found, args.steps, args.rounds, args.cpu, threads)
    write_report(args.out / "job.md", text)
    held = {"jobs": found, "machine": machine(), "cpu": args.cpu}
    write_report(args.out / "job.json", json.dumps(held, indent=1))
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
