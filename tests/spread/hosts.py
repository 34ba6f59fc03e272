"""Three hosts of one machine, in network namespaces: `sudo python tests/spread/hosts.py` (Linux).

Each host has an address of its own on a bridge. A run over the three leaves the bytes of one
process; then, in the middle of another run, host 2 is cut off, and the run must end in time with
a line that names its rank. Prints what was found as JSON.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import steps
from kills import prepare, steps_done
from ranks_at_hand import ENVIRONMENT, MPIEXEC

LIMIT = 30.0  # seconds after the cut
HOSTS = [f"10.77.0.1{i}" for i in range(3)]
_SHELL = """#!/bin/sh
while [ "${1#-}" != "$1" ]; do shift; done
host=${1##*.1}
shift
exec ip netns exec mesp$host /bin/sh -c "$*"
"""


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def set_up() -> None:
    """A bridge, and a namespace a host."""
    ip("link", "add", "mespbr", "type", "bridge")
    ip("link", "set", "mespbr", "up")
    for i, address in enumerate(HOSTS):
        ip("netns", "add", f"mesp{i}")
        ip("link", "add", f"mesp{i}", "type", "veth", "peer", "name", "eth0", "netns", f"mesp{i}")
        ip("link", "set", f"mesp{i}", "master", "mespbr", "up")
        ip("-n", f"mesp{i}", "addr", "add", f"{address}/24", "dev", "eth0")
        for name in ("eth0", "lo"):
            ip("-n", f"mesp{i}", "link", "set", name, "up")


def take_down() -> None:
    for i in range(3):
        subprocess.run(["ip", "netns", "del", f"mesp{i}"], check=False)
    subprocess.run(["ip", "link", "del", "mespbr"], check=False)


def launcher(place: Path) -> list[str]:
    """mpiexec of MPICH on host 0, whose remote shell enters a namespace."""
    shell = place / "shell"
    shell.write_text(_SHELL, encoding="ascii")
    shell.chmod(0o755)
    inside = ["ip", "netns", "exec", "mesp0", str(MPIEXEC), "-hosts", ",".join(HOSTS)]
    return [*inside, "-launcher", "rsh", "-launcher-exec", str(shell), "-n", "3", sys.executable]


def same_bytes(start: list[str]) -> bool:
    """Twenty steps of every method over the network against one process."""
    command = [*start, str(Path(__file__).with_name("steps.py"))]
    spread = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    return bool(json.loads(spread.stdout) == [steps.run(m, p, 3 * a) for m, p, a in steps.CASES])


def cut_off(start: list[str], place: Path) -> tuple[float, str]:
    """Seconds until the end after host 2 is cut off in the middle of a run, and what was said."""
    out = place / "run"
    options = [*prepare(place), "--steps", "1000000", "--mpi", "--out", str(out)]
    with subprocess.Popen(
        [*start, *options], env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
    ) as run:
        while steps_done(out) < 3:
            assert run.poll() is None
            time.sleep(0.1)
        ip("link", "set", "mesp2", "down")
        begin = time.monotonic()
        _, text = run.communicate(timeout=120)
    return time.monotonic() - begin, text


def main() -> int:
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    set_up()
    try:
        with tempfile.TemporaryDirectory() as folder:
            start = launcher(Path(folder))
            same = same_bytes(start)
            seconds, text = cut_off(start, Path(folder))
    finally:
        take_down()
    lines = [line for line in text.splitlines() if line.startswith("mesp-ref: error: ")]
    named = len(lines) == 1 and "error: rank 2 on " in lines[0]
    found = {"same_bytes": same, "seconds": round(seconds, 1), "named": named, "lines": lines}
    print(json.dumps(found, indent=2))
    return not (same and named and seconds < LIMIT)


if __name__ == "__main__":
    sys.exit(main())
