"""Coverage-guided fuzzing of every reader with atheris: `make fuzz`, or this file with options.

Each target runs in a process of its own from its seeds, the kept corpus and what coverage adds;
half of the inputs come from mutate.py, which knows the formats, half from libFuzzer. A crash (any
exception but MespRefError, more than 2 GiB, more than 120 s) is written to --crashes and ends with
exit code 1. Keep it: put the file into corpus/<target>/, where the quick profile replays it.
"""

import argparse
import json
import random
import re
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
# Executions of each target: about a million in all, more where one is cheap.
RUNS = {
    "config": 180_000, "settings": 60_000, "safetensors": 350_000, "checkpoint": 15_000,
    "adapter": 60_000, "mlx_adapter": 40_000, "tokenizer": 20_000, "text": 150_000,
    "jsonl": 20_000, "golden": 30_000, "sketch": 100_000, "resume": 60_000, "gguf": 30_000,
}  # fmt: skip


def fuzz_one(name: str, runs: int, seconds: int, seed: int, crashes: Path) -> None:
    """Fuzz one target in this process, which libFuzzer ends."""
    import atheris

    with atheris.instrument_imports(include=["mesp_ref"]):
        sys.path.insert(0, str(HERE))
        import targets
        from mutate import mutate

    def custom(data: bytes, size: int, seed: int) -> bytes:
        if seed % 2:
            return mutate(data, random.Random(seed))[:size]
        return atheris.Mutate(data, size)

    with targets.fast_folder() as scratch:
        corpus, folder = Path(scratch) / "corpus", Path(scratch) / "files"
        corpus.mkdir()
        folder.mkdir()
        for i, data in enumerate(targets.TARGETS[name].seeds()):
            (corpus / f"seed{i}").write_bytes(data)
        kept = [str(d) for d in (HERE / "corpus" / name,) if d.is_dir()]
        options = {"runs": runs, "seed": seed, "max_len": 1 << 16, "timeout": 120, "verbosity": 0,
                   "max_total_time": seconds, "rss_limit_mb": 2048, "print_final_stats": 1,
                   "artifact_prefix": f"{crashes}/{name}-"}  # fmt: skip
        arguments = [f"-{key}={value}" for key, value in options.items()]
        atheris.Setup(
            [sys.argv[0], *arguments, str(corpus), *kept],
            lambda data: targets.run(name, data, folder) and None,
            custom_mutator=custom,
        )
        atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"among {', '.join(RUNS)}")
    parser.add_argument("--runs", type=int, help="executions of each (default: a million in all)")
    parser.add_argument("--seconds", type=int, default=0, help="at most, for each; 0: no limit")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--crashes", default="crashes", help="folder (default: %(default)s)")
    parser.add_argument("--counts", metavar="FILE", help="JSON lines to append the counts to")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    crashes = Path(args.crashes)
    crashes.mkdir(parents=True, exist_ok=True)
    if args.here:
        fuzz_one(args.targets[0], args.runs, args.seconds, args.seed, crashes)
    total, failed = 0, 0
    for name in args.targets or RUNS:
        begin = time.monotonic()
        command = [sys.executable, __file__, name, "--here", "--seconds", str(args.seconds),
                   "--runs", str(args.runs or RUNS[name]), "--seed", str(args.seed),
                   "--crashes", args.crashes]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        counted = re.search(r"number_of_executed_units:\s+(\d+)", done.stderr)
        executed = int(counted[1]) if counted else 0
        total, failed = total + executed, failed + (done.returncode != 0)
        row = {"target": name, "executions": executed, "crashes": int(done.returncode != 0),
               "seconds": round(time.monotonic() - begin, 1), "seed": args.seed}  # fmt: skip
        print(json.dumps(row), flush=True)
        if args.counts:
            with Path(args.counts).open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        if done.returncode:
            print(done.stderr[-4000:], file=sys.stderr)
    print(f"{total} executions, {failed} targets with a crash")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
