"""Build hook: the wheel says what it holds and needs, in .dist-info/sboms (PEP 770, CycloneDX 1.6)."""

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

# What comes with the package and is no code: name, kind, the file whose hash stands for it.
CARRIED = (
    ("mesp-ref story model", "machine-learning-model", "weights/model.safetensors"),
    ("mesp-ref golden suite", "data", "mesp_ref/golden/data/SHA256SUMS"),
)


def sbom(root: Path, project: Mapping[str, Any]) -> dict[str, Any]:
    """The CycloneDX document of a version: its parts by hash, its dependencies as they are declared.

    Which versions get installed is decided at installation: no version is stated, the requirement is.
    The same sources give the same bytes: no time, no random serial number.
    """
    me = {
        "type": "library",
        "bom-ref": f"pkg:pypi/{project['name']}@{project['version']}",
        "name": project["name"],
        "version": project["version"],
        "licenses": [{"license": {"id": project["license"]}}],
        "purl": f"pkg:pypi/{project['name']}@{project['version']}",
    }
    carried = [
        {
            "type": kind,
            "bom-ref": name,
            "name": name,
            "version": project["version"],
            "hashes": [
                {
                    "alg": "SHA-256",
                    "content": hashlib.sha256((root / file).read_bytes()).hexdigest(),
                }
            ],
            "licenses": me["licenses"],
        }
        for name, kind, file in CARRIED
    ]
    needed = [_needed(line) for line in project["dependencies"]]
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": me},
        "components": carried + needed,
        "dependencies": [
            {"ref": me["bom-ref"], "dependsOn": [part["bom-ref"] for part in carried + needed]}
        ],
    }


def _needed(requirement: str) -> dict[str, Any]:
    name = re.match(r"[A-Za-z0-9._-]+", requirement)[0]  # type: ignore[index]
    purl = "pkg:pypi/" + re.sub(r"[-_.]+", "-", name).lower()
    return {
        "type": "library",
        "bom-ref": purl,
        "name": name,
        "purl": purl,
        "scope": "required",
        "properties": [{"name": "mesp-ref:requirement", "value": requirement}],
    }


class Sbom(BuildHookInterface):
    """Writes the document beside the build and hands it to the wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel" or version == "editable":
            return
        self._folder = Path(tempfile.mkdtemp())
        core = self.metadata.core
        project = {
            "name": core.name,
            "version": self.metadata.version,
            "license": core.license_expression,
            "dependencies": core.dependencies,
        }
        file = self._folder / f"{core.name}.cdx.json"
        file.write_text(json.dumps(sbom(Path(self.root), project), indent=1) + "\n", "utf-8")
        build_data["sbom_files"].append(str(file))

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        if folder := getattr(self, "_folder", None):
            shutil.rmtree(folder)
