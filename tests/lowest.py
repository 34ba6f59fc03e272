"""Print the lowest version of each direct dependency, as constraints for pip: `make test-lowest`."""

import tomllib
from pathlib import Path


def lowest(requirements: list[str]) -> list[str]:
    """ "numpy>=2.1" becomes "numpy==2.1"."""
    return [requirement.split(";")[0].strip().replace(">=", "==") for requirement in requirements]


if __name__ == "__main__":
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    project = tomllib.loads(text)["project"]
    print("\n".join(lowest(project["dependencies"] + project["optional-dependencies"]["test"])))
