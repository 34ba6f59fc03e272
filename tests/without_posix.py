"""Run the command line where nothing is that Windows lacks: `python without_posix.py COMMAND…`.

The libraries are imported first, as they are their own authors' to carry elsewhere. Then every name
of os and signal that Python's documentation gives to Unix alone is taken away, and fcntl, resource
and the like are no modules any more; folders cannot be opened, and what is open cannot be renamed.
"""

import importlib
import os
import pathlib
import pkgutil
import shutil
import signal
import sys
from typing import Any

OS = (
    "O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_DIRECTORY", "O_SYNC", "O_DSYNC", "pread", "pwrite",
    "preadv", "pwritev", "fork", "forkpty", "getuid", "geteuid", "getgid", "getpgid", "killpg",
    "mkfifo", "mknod", "nice", "posix_fadvise", "posix_fallocate", "posix_spawn", "register_at_fork",
    "sched_getaffinity", "sched_setaffinity", "sched_yield", "setsid", "statvfs", "fstatvfs", "sync",
    "fdatasync", "fchmod", "fchown", "chown", "lchown", "getloadavg", "uname", "sendfile", "sysconf",
    "memfd_create", "pidfd_open", "wait", "wait3", "wait4", "WNOHANG", "openpty", "ttyname",
)  # fmt: skip
SIGNALS = (
    "SIGKILL", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGPIPE", "SIGALRM", "SIGCHLD", "SIGSTOP",
    "SIGCONT", "SIGTSTP", "alarm", "setitimer", "pause", "pthread_sigmask", "pthread_kill", "sigwait",
    "pidfd_send_signal",
)  # fmt: skip
MODULES = ("fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "syslog", "readline")
LIBRARIES = (
    "asyncio", "concurrent.futures", "csv", "ctypes", "datetime", "difflib", "filelock", "html",
    "jinja2", "jinja2.sandbox", "matplotlib.pyplot", "matplotlib.backends.backend_agg", "ml_dtypes",
    "multiprocessing", "numpy", "psutil", "safetensors.numpy", "scipy.special", "scipy.stats",
    "subprocess", "tempfile", "threadpoolctl", "tokenizers", "tokenizers.decoders", "tqdm",
    "hypothesis", "mpmath", "hypothesis.extra.numpy", "pytest", "huggingface_hub", "gguf",
)  # fmt: skip


def hide() -> None:
    """From here on this process is poorer."""
    for name in LIBRARIES:
        try:
            importlib.import_module(name)
        except ImportError:
            assert name in ("hypothesis", "mpmath", "huggingface_hub", "gguf", "pytest"), name
    room = shutil.disk_usage(".")
    for module, names in ((os, OS), (signal, SIGNALS)):
        for name in names:
            if hasattr(module, name):
                delattr(module, name)
    for name in MODULES:
        sys.modules[name] = None  # type: ignore[assignment]
    shutil._use_fd_functions = shutil._USE_CP_SENDFILE = False  # type: ignore[attr-defined]
    shutil.disk_usage = lambda path: room  # type: ignore[assignment]  # a call of Windows's own
    opened, replace, rename = os.open, pathlib.Path.replace, pathlib.Path.rename

    def open_file(path: Any, *more: Any, **settings: Any) -> int:
        if isinstance(path, str | pathlib.Path) and pathlib.Path(path).is_dir():
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *more, **settings)

    def in_use(path: pathlib.Path) -> None:
        """As Windows answers where a handle of this process is on the file."""
        real = os.path.realpath(path)
        for handle in sorted(pathlib.Path("/proc/self/fd").glob("*")):  # elsewhere there is none
            try:
                held = str(handle.readlink())
            except OSError:
                continue
            if held == real:
                raise PermissionError(13, "in use", str(path))

    def moved(move: Any, onto: bool) -> Any:
        def do(path: pathlib.Path, target: Any) -> Any:
            in_use(path)
            in_use(pathlib.Path(target))
            if not onto and os.path.lexists(target):
                raise FileExistsError(17, "File exists", str(target))
            return move(path, target)

        return do

    os.open = open_file  # type: ignore[assignment]
    pathlib.Path.replace = moved(replace, onto=True)  # type: ignore[method-assign]
    pathlib.Path.rename = moved(rename, onto=False)  # type: ignore[method-assign]


def import_all() -> None:
    """Every module of the package but those of MPI and of the frameworks."""
    import mesp_ref

    for found in pkgutil.walk_packages(mesp_ref.__path__, "mesp_ref."):
        if not found.name.startswith(("mesp_ref.spread", "mesp_ref.verify.adapters")):
            if ".backends." in found.name or found.name.endswith("__main__"):
                continue
            importlib.import_module(found.name)


if __name__ == "__main__":
    hide()
    import_all()
    from mesp_ref.cli import main

    for line in sys.argv[1:]:
        print(">", line, flush=True)
        code = main(line.split())
        if code:
            sys.exit(f"{line}: {code}")
