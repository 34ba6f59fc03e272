"""`mesp-ref`, and `python -m mesp_ref`: a process of its own around the command line.

What the process was given is made safe to write to, signals become exceptions, and the first line
of all that is imported is inside a `try`, so that Ctrl-C is one line at any time.
"""

import contextlib
import os
import signal
import sys
from types import FrameType
from typing import NoReturn

_THREADS = ("OPENBLAS_NUM_THREADS", "GOTO_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")


def main() -> NoReturn:
    """Run the command line of this process and end with its exit code."""
    try:
        _prepare()
        from mesp_ref.cli import main as run
        from mesp_ref.lean.allocator import keep_freed_memory

        keep_freed_memory()
        code = run()
    except KeyboardInterrupt as interrupt:
        with contextlib.suppress(OSError, ValueError):
            print("\nmesp-ref: interrupted", file=sys.stderr)
        code = 128 + getattr(interrupt, "signal", signal.SIGINT)
    sys.exit(_flushed(code))


def _prepare() -> None:
    """Streams that are there and take every character, signals, matplotlib without settings."""
    for handle in range(3):
        try:
            os.fstat(handle)
        except OSError:  # closed: the next file to be opened would get its number, and our output
            os.open(os.devnull, os.O_RDWR)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: PTH123, SIM115
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    for name in ("SIGTERM", "SIGHUP"):
        number: int | None = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) == signal.SIG_DFL:  # nohup ignores it
            signal.signal(number, _stop)
    os.environ |= {"MPLBACKEND": "agg", "MATPLOTLIBRC": os.devnull}
    # Several BLAS threads wait for each other by spinning: beside other work each waits for one that
    # does not run. Read when NumPy is loaded.
    if not any(os.environ.get(name) for name in _THREADS):
        os.environ["OPENBLAS_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    """SIGTERM and SIGHUP end as Ctrl-C does: what was half written is cleared away."""
    signal.signal(number, signal.SIG_IGN)  # once: nothing shall cut the clearing short
    interrupt = KeyboardInterrupt(f"stopped by {signal.Signals(number).name}")
    interrupt.signal = number  # type: ignore[attr-defined]
    raise interrupt


def _flushed(code: int) -> int:
    """Empty the streams; Python would end with a complaint about one that nobody reads, or exit 120."""
    for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    return code


if __name__ == "__main__":
    main()
