"""mesp_ref beside torch + transformers + peft, compiled and not, and JAX: one LoRA step, and generation.

    python benchmarks/frameworks.py                          writes docs/benchmarks/frameworks.md
    python benchmarks/frameworks.py --cpu                    CPU seconds, where others use the machine
    python benchmarks/frameworks.py --mlx path/to/python     MLX in an environment of its own
    python benchmarks/frameworks.py --seq 256 --out look --systems "torch; mesp"

Every system runs in a process of its own (contender.py) on one random Qwen2.5-0.5B, whose weights
all of them map from the same file; those that compile do so before. First losses and gradients are
compared, then the systems take turns, with a GEMM probe after each step. Takes about a quarter of an
hour on two cores. frameworks.json keeps the figures for the table of all pages (index.py).
"""

import argparse
import importlib.util
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import common
import frameworks_report
import numpy as np
from contender import Files, anonymous_mib
from frameworks_report import (
    DISK,
    FOUR_BIT,
    OFFLOAD,
    PEERS,
    STREAMED,
    Facts,
    Measured,
    Talk,
    crippled,
    is_ours,
)

from mesp_ref.errors import MespRefError
from mesp_ref.files.checkpoint import save_checkpoint
from mesp_ref.files.peft import save_adapter
from mesp_ref.files.quantize import quantize_checkpoint
from mesp_ref.memory import Shapes, at, cost

SHAPE, RANK = "qwen2.5-0.5b", 8
OURS = ("store_all", "mebp", "mesp", "mesp_tiled ram", DISK, OFFLOAD, STREAMED, FOUR_BIT, "mezo")
SYSTEMS = {
    256: (*PEERS, *OURS),
    1024: ("torch", "torch checkpointed", "mesp", DISK, OFFLOAD, STREAMED),
}
ROUNDS = {256: 5, 1024: 2}
TALKERS = ("torch", "store_all")  # those that generate; every method of ours does it alike
BATCHES = (1, 8)
# What holds the peers to AVX2. JAX's library for products has no such switch and is left out: the
# products of Eigen, which take its place, reach AVX2's peak. What torch.compile of torch 2.13 makes for
# AVX2 stops with an index out of bounds, so only its products are held.
_TORCH = {"MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
AVX2 = {
    "torch": _TORCH | {"ATEN_CPU_CAPABILITY": "avx2"},
    "torch checkpointed": _TORCH | {"ATEN_CPU_CAPABILITY": "avx2"},
    "torch compiled": _TORCH,
    "jax": {
        "XLA_FLAGS": "--xla_cpu_max_isa=AVX2 "
        "--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_INVALID"
    },
}
LOSS, GRADIENT = 1e-5, 1e-3  # relative differences above which the systems do not do the same
HERE = Path(__file__).resolve().parent
REPORTS = HERE.parent / "docs/benchmarks"


class Contender:
    """A system in its process; one command is one line, and so is its answer."""

    def __init__(self, system: str, files: Files, python: str = sys.executable):
        self.system = system
        command = [python, str(HERE / "contender.py"), system.split(",")[0], *map(str, files)]
        environment = (
            os.environ | {"PYTHONWARNINGS": "ignore::FutureWarning"} | instructions(system)
        )
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        ready, _ = self._answer()
        self.facts = Facts(system, ready["stages"], ready["versions"], ready["compiling"])

    def ask(self, command: str) -> dict[str, Any]:
        """Send a command and wait for its answer."""
        return self._send(command)[0]

    def watch(self, command: str, interval: float = 0.02) -> dict[str, Any]:
        """Ask, and look at the anonymous memory of the process until the answer."""
        answer, peak = self._send(command, interval)
        self.facts.peak = max(self.facts.peak, peak)
        return answer

    def step(self) -> None:
        """A step of a round."""
        self.facts.reads.append(self.watch("step")["read"])

    def _send(self, command: str, interval: float | None = None) -> tuple[dict[str, Any], float]:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(command + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise MespRefError(f"{self.system}: its process has ended, see above") from None
        return self._answer(interval)

    def _answer(self, interval: float | None = None) -> tuple[dict[str, Any], float]:
        assert self.process.stdout is not None
        peak = 0.0
        while interval and not select.select([self.process.stdout], [], [], interval)[0]:
            peak = max(peak, anonymous_mib(self.process.pid))
        line = self.process.stdout.readline()
        if not line:
            raise MespRefError(f"{self.system}: its process has ended, see above")
        return json.loads(line), max(peak, anonymous_mib(self.process.pid))

    def cpu(self) -> float:
        """CPU seconds of the process since its start."""
        stat = Path(f"/proc/{self.process.pid}/stat").read_text(encoding="ascii")
        ticks = stat.rpartition(")")[2].split()[11:13]  # user and system
        return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def say(line: str) -> None:
    """Progress, with the time since the start."""
    print(f"{time.perf_counter() - START:6.0f} s  {line}", file=sys.stderr, flush=True)


START = time.perf_counter()


def prepare(folder: Path) -> None:
    """Write what the contenders map: the dense model, its 4-bit forms, an adapter, the batches."""
    config = common.SHAPES[SHAPE]
    if not (folder / "dense").exists():
        say(f"drawing and writing {SHAPE}, float32")
        save_checkpoint(config, common.random_weights(config), folder / "dense")
    if not (folder / "4-bit").exists():
        say("quantising it: 4 bits, groups of 64, float16 scales")
        quantize_checkpoint(folder / "dense", folder / "4-bit", 4, 64, "float16")
    for seq in SYSTEMS:
        adapter, ids, _ = common.adapter_and_batch(config, seq, RANK)
        save_adapter(adapter, folder / "adapter")
        np.save(folder / f"{seq}.npy", ids)


@contextmanager
def contenders(
    systems: Sequence[str], folder: Path, seq: int, threads: int, mlx: str
) -> Iterator[dict[str, Contender]]:
    """The systems, loaded one after another; all end with the block."""
    with ExitStack() as stack:
        found = {}
        for system in systems:
            say(f"{seq} tokens: loading {system}")
            base = system.partition(", ")[2] or "dense"
            files = Files(folder / base, folder / "adapter", folder / f"{seq}.npy", threads)
            found[system] = Contender(system, files, mlx if system == "mlx" else sys.executable)
            stack.callback(found[system].close)
        yield found


def measure(
    systems: Sequence[str], folder: Path, seq: int, rounds: int, threads: int,
    mlx: str = sys.executable, quick: bool = False, cpu: bool = False,
) -> Measured:  # fmt: skip
    """Memory of the first steps, agreement, time in turns, NumPy's bytes, generation.

    With `cpu` time is CPU seconds: of all contenders, of which one works at a time.
    """
    with contenders(systems, folder, seq, threads, mlx) as found:
        for system, contender in found.items():
            contender.facts.loss = loss = contender.watch("step", 0.002)["loss"]
            say(f"{system}: loss {loss:.7f}, {contender.facts.above:.1f} MiB above the model")
        compare(found, folder, gradients=seq == min(SYSTEMS) and not quick)
        probes = {system: products(system, seq) for system in found if is_ours(system)}
        turns = {system: found[system].step for system in found}
        clock = (lambda: sum(c.cpu() for c in found.values())) if cpu else time.perf_counter
        timed = common.interleaved(
            turns, rounds, 0, probes, say, clock, time.process_time if cpu else None,
            before={system: found[system].step for system in found if system == "jax"},
        )  # fmt: skip
        talks = [] if quick or seq != min(SYSTEMS) else generation(found, 2, cpu)
        for system, contender in found.items():
            # last, since the operands of a GEMM and tracemalloc's notes are memory, too
            contender.facts.rate = contender.ask("gemm")["rate"]
            if system in probes and not quick:
                contender.facts.traced = contender.ask("traced")["bytes"]
                say(f"{system}: {contender.facts.traced / 1e6:.2f} MB of NumPy")
            contender.facts.file = file_of(system, seq)
        facts = {system: contender.facts for system, contender in found.items()}
    return Measured(seq, facts, timed, probes, talks)


def generation(found: dict[str, Contender], rounds: int, cpu: bool) -> list[Talk]:
    """Tokens a second of greedy generation with a cache, in turns, the tokens compared.

    Raises MespRefError where the systems do not say the same.
    """
    talks, said = [], dict[int, object]()
    for _, batch, system in product(range(rounds), BATCHES, (s for s in TALKERS if s in found)):
        answer = found[system].ask(f"generate {batch}")
        if said.setdefault(batch, answer["tokens"]) != answer["tokens"]:
            raise MespRefError(f"{system}: other tokens than {TALKERS[0]}, batch {batch}")
        tokens = sum(map(len, answer["tokens"]))
        talks.append(Talk(system, batch, tokens / answer["cpu" if cpu else "wall"]))
        say(f"{system}: batch {batch}, {talks[-1].rate:.1f} tokens a second")
    return talks


def products(system: str, seq: int) -> common.Gemms:
    """The matrix products of a step of ours."""
    method, _, checkpoints = system.partition(",")[0].partition(" ")
    config = common.SHAPES[SHAPE]
    return common.gemms(config, method, seq, RANK, checkpoints=checkpoints or "ram")


def file_of(system: str, seq: int) -> int:
    """Bytes of the temporary file of one step."""
    method, _, checkpoints = system.partition(",")[0].partition(" ")
    shapes = at(Shapes(common.SHAPES[SHAPE], tokens=seq, rank=RANK), checkpoints or "ram")
    return cost(method, shapes).file if is_ours(system) else 0


def is_exact(system: str) -> bool:
    """Whether a system computes the same numbers as torch: dense weights, exact gradients."""
    return system not in ("mezo", "mlx") and "4-bit" not in system


def compare(found: dict[str, Contender], folder: Path, gradients: bool) -> None:
    """Hold loss and gradients of every exact system against torch's.

    Raises MespRefError where they differ by more than float32 explains: LOSS and GRADIENT.
    """
    if "torch" not in found:
        return
    loss, want = found["torch"].facts.loss, None
    for system in sorted(filter(is_exact, found), key=lambda name: name != "torch"):
        contender = found[system]
        off = abs(contender.facts.loss - loss) / loss
        if not off <= LOSS:
            raise MespRefError(f"{system}: loss {contender.facts.loss}, torch's is {loss}")
        if gradients:
            got = _gradients(contender, folder)
            want = want or got
            contender.facts.difference = off = difference(got, want)
            say(f"{system}: gradients differ from torch's by {off:.1e} of a tensor's largest")
            if not off <= GRADIENT:
                raise MespRefError(f"{system}: gradients differ from torch's by {off:.1e}")


def _gradients(contender: Contender, folder: Path) -> dict[str, np.ndarray]:
    """The gradients of the first batch at the adapter as it was."""
    file = folder / "gradients.npz"
    contender.ask("reset")
    contender.ask(f"gradients {file}")
    with np.load(file) as held:
        grads = dict(held)
    file.unlink()
    return grads


def difference(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> float:
    """The largest difference of any tensor, in units of that tensor's largest entry."""
    if got.keys() != want.keys():
        raise MespRefError(f"gradients: {len(got)} tensors, expected torch's {len(want)}")
    found = [np.abs(got[n] - w).max() / np.abs(w).max() for n, w in want.items()]
    return float(np.max(found))  # NaN stays NaN, which the built-in max may lose


def try_mlx(python: str, folder: Path, threads: int) -> tuple[list[str], float] | None:
    """Versions of MLX and the rate of its matrix product; None where there is no MLX."""
    probe = [python, "-c", "import mlx.core, mlx_lm"]
    if subprocess.run(probe, capture_output=True, check=False).returncode:
        return None
    files = Files(folder / "dense", folder / "adapter", folder / f"{min(SYSTEMS)}.npy", threads)
    contender = Contender("mlx", files, python)
    try:
        return contender.facts.versions, contender.ask("gemm")["rate"]
    finally:
        contender.close()


def missing() -> set[str]:
    """Peers that cannot run here: JAX is not installed, or torch.compile finds no C++ compiler."""
    found = set() if importlib.util.find_spec("jax") else {"jax"}
    return found if shutil.which(os.environ.get("CXX", "g++")) else found | {"torch compiled"}


def instructions(system: str) -> dict[str, str]:
    """The environment that holds a peer to the instructions that OpenBLAS is held to, if it is."""
    held = os.environ.get("OPENBLAS_CORETYPE") in ("Haswell", "Zen")
    return AVX2.get(system, {}) if held else {}


def threads_of_blas() -> int:
    """Threads of NumPy's BLAS, which torch is given as well."""
    from threadpoolctl import threadpool_info

    return max((pool["num_threads"] for pool in threadpool_info()), default=1)


def main() -> int:
    """Measure and write; a user's mistake is one line and exit code 2."""
    parser = argparse.ArgumentParser(description="One LoRA step: mesp_ref beside torch and peft.")
    parser.add_argument("--seq", type=int, choices=tuple(SYSTEMS), help="default: all of them")
    parser.add_argument("--rounds", type=int, help=f"default: {ROUNDS}, by sequence length")
    parser.add_argument("--systems", help=f"separated by ';', default: {'; '.join(SYSTEMS[256])}")
    parser.add_argument("--quick", action="store_true", help="times alone, after one step")
    parser.add_argument("--cpu", action="store_true", help="CPU seconds in place of the clock's")
    parser.add_argument(
        "--mlx", metavar="PYTHON", default=sys.executable, help="interpreter with mlx and mlx-lm"
    )
    parser.add_argument("--work", type=Path, help="keep the weights here (3 GB) and use them again")
    parser.add_argument("--out", type=Path, help=f"default: {REPORTS.relative_to(HERE.parent)}")
    args = parser.parse_args()
    try:
        run(args)
    except MespRefError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def run(args: argparse.Namespace) -> None:
    """All that is asked for, then the report."""
    chosen = args.systems and [name.strip() for name in args.systems.split(";")]
    if chosen and "torch" not in chosen:
        raise MespRefError("--systems: found no torch, expected it: the report compares with it")
    if not args.out and (chosen or args.seq or args.quick):
        raise MespRefError("--out: missing, expected a directory for a report of less than all")
    out, absent = args.out or REPORTS, missing()
    with tempfile.TemporaryDirectory(prefix="frameworks-") as scratch:
        folder = args.work or Path(scratch)
        prepare(folder)
        threads = threads_of_blas()
        mlx = None if chosen else try_mlx(args.mlx, folder, threads)
        more = ("mlx",) if mlx and not crippled(mlx[1], common.gemm_rate()) else ()
        measured = [
            measure(
                [s for s in (*SYSTEMS[seq], *more) if s not in absent and s in (chosen or (s,))],
                folder, seq, args.rounds or ROUNDS[seq], threads, args.mlx, args.quick, args.cpu,
            )
            for seq in SYSTEMS if args.seq in (None, seq)
        ]  # fmt: skip
    print(frameworks_report.write(out, measured, threads, mlx, args.cpu))
    say(f"wrote {out / 'frameworks.md'}")


if __name__ == "__main__":
    sys.exit(main())
