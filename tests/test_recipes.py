"""What others run or read of the repository, held against their own schemas: workflows, forms, recipes.

Nothing is fetched: the schemas come with check-jsonschema, and rattler-build reads the recipe itself.
"""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FORMS = ROOT / ".github" / "ISSUE_TEMPLATE"
if not FORMS.is_dir():
    pytest.skip("not in a source archive", allow_module_level=True)


def checked(schema: str, *files: Path) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("check_jsonschema")
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}"]
    return subprocess.run([*command, *files], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("schema", "files"),
    [
        ("github-workflows", sorted((ROOT / ".github" / "workflows").glob("*.yml"))),
        ("github-issue-config", [FORMS / "config.yml"]),
        ("github-issue-forms", sorted(set(FORMS.glob("*.yml")) - {FORMS / "config.yml"})),
        ("citation-file-format", [ROOT / "CITATION.cff"]),
    ],
)  # fmt: skip
def test_files_fit_the_schema_of_who_reads_them(schema: str, files: list[Path]) -> None:
    assert files
    found = checked(schema, *files)
    assert found.returncode == 0, found.stdout


def test_a_wrong_workflow_is_found(tmp_path: Path) -> None:
    text = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    (tmp_path / "ci.yml").write_text(text.replace("runs-on:", "runs_on:"), encoding="utf-8")
    assert checked("github-workflows", tmp_path / "ci.yml").returncode == 1


def test_the_conda_recipe_is_read_and_rendered(monkeypatch: pytest.MonkeyPatch) -> None:
    """By rattler-build itself: every field is known, and the version and the digest are put in."""
    rattler = pytest.importorskip("rattler_build")
    monkeypatch.setenv("MESP_REF_SHA256", "ab" * 32)
    text = (ROOT / "conda" / "recipe.yaml").read_text(encoding="utf-8")
    [variant] = rattler.Stage0Recipe.from_yaml(text).render()
    assert variant.recipe.package.name == "mesp-ref"
    assert f"version: {variant.recipe.package.version}\n" in text
    with pytest.raises(rattler.RattlerBuildError, match="unknown field"):
        rattler.Stage0Recipe.from_yaml(text.replace("  number: 0", "  nmber: 0"))
