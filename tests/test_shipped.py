"""What is shipped: exactly the files that git tracks for it, whatever else lies in the folders."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
AT_HOME = (".ci/", ".github/", "conda/")  # tracked, but of no use outside the repository
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
    expected |= {"mesp_ref/verify/kill-table.md"}  # of docs/, for who has the wheel alone
    assert found == expected


def test_the_source_archive_holds_what_is_tracked(built: Path) -> None:
    [archive] = built.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        found = {name.partition("/")[2] for name in opened.getnames()}
    expected = {name for name in tracked() if not name.startswith(AT_HOME)}
    assert found == expected | {"PKG-INFO"}


def test_two_builds_are_the_same_bytes(tmp_path: Path) -> None:
    """From two folders, with files of other dates and modes: nothing of the machine gets in."""
    pytest.importorskip("hatchling")
    builds = []
    for number, mode in enumerate((0o644, 0o664)):
        copy, out = tmp_path / f"copy{number}", tmp_path / f"out{number}"
        for name in sorted(tracked()):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, copy / name)
            (copy / name).chmod(mode)
            os.utime(copy / name, (number * 10**9, number * 10**9))
        command = [sys.executable, "-m", "hatchling", "build", "-d", str(out)]
        subprocess.run(command, cwd=copy, check=True, capture_output=True)
        builds.append({f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in out.iterdir()})
    assert len(builds[0]) == 2
    assert builds[0] == builds[1]


def test_what_the_project_says_of_itself_is_one_story() -> None:
    """Version, address and papers in pyproject.toml, CITATION.cff, the recipe and the templates."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    source, home = settings["urls"]["Source"], settings["urls"]["Homepage"]
    cited = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {settings['version']}\n" in cited
    assert f"\nrepository-code: {source}\n" in cited
    assert f"\nurl: {home}\n" in cited
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for paper in re.findall(r"arXiv (\d{4}\.\d{5})", readme):
        assert f"arXiv:{paper}" in cited
    recipe = ROOT / "conda" / "recipe.yaml"
    if recipe.is_file():  # not in a source archive
        text = recipe.read_text(encoding="utf-8").replace("matplotlib-base", "matplotlib")
        assert f"version: {settings['version']}\n" in text
        for line in settings["dependencies"]:
            name, _, least = line.partition(">=")
            assert f"    - {name} >={least}\n" in text, line
        assert source in (ROOT / ".github/ISSUE_TEMPLATE/config.yml").read_text(encoding="utf-8")
    python = {f"Programming Language :: Python :: 3.{minor}" for minor in range(11, 15)}
    assert python <= set(settings["classifiers"])
    assert ("Typing :: Typed" in settings["classifiers"]) == (ROOT / "mesp_ref/py.typed").is_file()


def test_the_workflows_are_yaml_and_run_what_is_there() -> None:
    yaml = pytest.importorskip("yaml")
    files = sorted((ROOT / ".github").rglob("*.yml"))
    if not files:
        pytest.skip("not in a source archive")
    targets = re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    for file in files:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
        for job in found.get("jobs", {}).values():
            for step in job["steps"]:
                for target in re.findall(r"\bmake ([a-z-]+)", step.get("run", "")):
                    assert target in targets, f"{file.name}: make {target}"


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
