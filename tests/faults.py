"""SIGKILL at random instants of saving: `python tests/faults.py --kills 100` (see SECURITY.md).

A child saves state and adapter again and again, version i filled with the number i, and tells each
save that is done. It is killed at a random instant; then the directory must hold a whole version,
no older than the last one told. Prints what was found as JSON.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import mesp_ref as mr
from mesp_ref.job.state import load_state, save_state
from mesp_ref.verify.samples import small_config

CONFIG = small_config(hidden_size=64, intermediate_size=128)


def _save_forever(folder: Path, version: int, told: int) -> None:
    """The child: one version after another, each told on a pipe once it is on the disk."""
    adapter = mr.init_lora(CONFIG, rank=8)
    while True:
        version += 1
        for array in adapter.weights.values():
            array[...] = version
        save_state(folder / "state.safetensors", adapter.weights, {"step": version})
        mr.save_adapter(adapter, folder / "adapter")
        os.write(told, b"%d\n" % version)


def _loaded(folder: Path) -> tuple[int, int]:
    """The versions of state and adapter; an AssertionError for a mixture."""
    arrays, facts = load_state(folder / "state.safetensors")
    values = {float(v) for array in arrays.values() for v in np.unique(array)}
    assert values == {facts["step"]}, (values, facts)
    adapter = mr.load_adapter(folder / "adapter", config=CONFIG)
    [value] = {float(v) for array in adapter.weights.values() for v in np.unique(array)}
    return facts["step"], int(value)


def kill_while_saving(folder: Path, kills: int, seed: int) -> dict[str, int]:
    """Kill `kills` children; how many, how many in the middle of a file, and saves lost (0)."""
    rng, version, torn, lost, saves = random.Random(seed), 0, 0, 0, 0
    for _ in range(kills):
        reads, writes = os.pipe()
        child = os.fork()
        if not child:
            try:
                os.close(reads)
                _save_forever(folder, version, writes)
            finally:  # not through the parent's code, which would remove the folder
                os._exit(1)
        os.close(writes)
        with os.fdopen(reads, "rb") as told:
            last = int(told.readline())  # so that there is something to lose
            time.sleep(rng.uniform(0, 0.02))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            last = int((told.readlines() or [b"%d" % last])[-1])
        asides = [f for f in folder.rglob(".*.safetensors.*") if f.is_file()]
        torn, saves = torn + bool(asides), saves + last - version
        for file in asides:
            file.unlink()
        state, adapter = _loaded(folder)
        lost += state < last or adapter < last
        version = state
    return {"kills": kills, "saves": saves, "in_the_middle_of_a_file": torn, "lost": lost}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        found = kill_while_saving(Path(place), options.kills, options.seed)
    print(json.dumps(found))
    sys.exit(found["lost"] > 0)
