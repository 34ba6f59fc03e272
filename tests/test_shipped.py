"""What is shipped: exactly the files that git tracks for it, whatever else lies in the folders."""

import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
AT_HOME = {".ci/run"}  # tracked, but of no use outside the repository
MADE = "mesp_ref-{}.dist-info"
METADATA = ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE",
            "sboms/mesp-ref.cdx.json")  # fmt: skip


def tracked() -> set[str]:
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("no repository: what is tracked is not known")
    found = subprocess.run([git, "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True)
    names = {name for name in found.stdout.decode().split("\0") if (ROOT / name).is_file()}
    return names


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wheel and sdist of a copy of the repository with secrets in every folder."""
    pytest.importorskip("hatchling")
    copy, out = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("out")
    for name in tracked():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, copy / name)
    for folder in [copy, *(path for path in copy.rglob("*") if path.is_dir())]:
        for secret in (".env", "notes.txt", "id_rsa", "credentials.json", "__pycache__/x.pyc"):
            (folder / secret).parent.mkdir(exist_ok=True)
            (folder / secret).write_text("SECRET=1\n")
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(out)]
    subprocess.run(command, cwd=copy, check=True, capture_output=True)
    return out


def version() -> str:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return str(settings["project"]["version"])


def test_the_wheel_holds_the_package_and_its_checkpoint(built: Path) -> None:
    [wheel] = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        found = set(archive.namelist())
    expected = {name for name in tracked() if name.startswith("mesp_ref/")}
    expected |= {
        name.replace("weights/", "mesp_ref/default_checkpoint/")
        for name in tracked()
        if name.startswith("weights/")
    }
    expected |= {f"{MADE.format(version())}/{name}" for name in METADATA}
    assert found == expected


def test_the_source_archive_holds_what_is_tracked(built: Path) -> None:
    [archive] = built.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        found = {name.partition("/")[2] for name in opened.getnames()}
    assert found == tracked() - AT_HOME | {"PKG-INFO"}


def test_nothing_planted_lies_in_either(built: Path) -> None:
    [wheel], [archive] = built.glob("*.whl"), built.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as opened:
        assert not [n for n in opened.namelist() if b"SECRET=1" in opened.read(n)[:20]]
    with tarfile.open(archive) as members:
        parts = {part for name in members.getnames() for part in name.split("/")}
    assert not parts & {".env", "notes.txt", "id_rsa", "credentials.json", "__pycache__"}


def test_the_wheel_says_what_it_holds_and_needs(built: Path) -> None:
    """The SBOM lists every dependency of pyproject.toml, and its hashes are those of the wheel."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    [wheel] = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        listed = json.loads(archive.read(f"{MADE.format(version())}/sboms/mesp-ref.cdx.json"))
        weights = archive.read("mesp_ref/default_checkpoint/model.safetensors")
    parts = listed["components"]
    required = {p["properties"][0]["value"] for p in parts if p["type"] == "library"}
    assert {line.replace("_", "-") for line in required} == {
        line.replace("_", "-") for line in settings["project"]["dependencies"]
    }
    [model] = [p for p in parts if p["type"] == "machine-learning-model"]
    assert model["hashes"][0]["content"] == hashlib.sha256(weights).hexdigest()
    references = {part["bom-ref"] for part in parts}
    assert set(listed["dependencies"][0]["dependsOn"]) == references
