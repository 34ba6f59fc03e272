"""Hold lowest and installed versions against the known holes of advisories.toml: `make audit`."""

import sys
import tomllib
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any, NamedTuple

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
LIST = Path(__file__).parent / "advisories.toml"


class InUse(NamedTuple):
    """A version in use: of which package, and where it comes from."""

    package: str
    version: str
    where: str


def read_list() -> dict[str, Any]:
    """The advisories, and the packages that were reviewed and have none."""
    return tomllib.loads(LIST.read_text(encoding="utf-8"))


def requirements() -> list[Requirement]:
    """Every direct dependency of pyproject.toml, of all extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    return [Requirement(line) for group in groups for line in group]


def lowest() -> Iterator[InUse]:
    """The lowest version that each direct dependency may have."""
    for requirement in requirements():
        for bound in requirement.specifier:
            if bound.operator in (">=", "=="):
                yield InUse(
                    canonicalize_name(requirement.name),
                    bound.version,
                    f"pyproject.toml: {requirement}",
                )


def installed(names: Iterable[str]) -> Iterator[InUse]:
    """What is installed of these packages and of all that they require."""
    waiting, seen = list(names), set()
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name in seen:
            continue
        seen.add(name)
        try:
            found = distribution(name)
        except PackageNotFoundError:  # of an extra, or of another system
            continue
        yield InUse(name, found.version, "installed")
        needed = [Requirement(line) for line in found.requires or ()]
        waiting += [r.name for r in needed if not r.marker or r.marker.evaluate({"extra": ""})]


def affected(versions: Iterable[InUse], advisories: Iterable[dict[str, str]]) -> list[str]:
    """A line for each version with a known hole."""
    known = list(advisories)
    return [
        f"{use.package} {use.version} ({use.where}): {hole['id']}: {hole['what']}; "
        f"mended in {hole['fixed']}"
        for use in versions
        for hole in known
        if canonicalize_name(hole["package"]) == use.package
        and Version(hole.get("since", "0")) <= Version(use.version) < Version(hole["fixed"])
    ]


def main() -> int:
    advisories = read_list()["advisory"]
    low, here = list(lowest()), list(installed(r.name for r in requirements()))
    found = affected([*low, *here], advisories)
    print(
        "\n".join(found) or f"no known hole in {len(low)} lowest and {len(here)} installed versions"
    )
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
