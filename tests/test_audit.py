"""Dependencies without known holes: lowest versions, installed ones, and the list that tells."""

from audit import InUse, affected, installed, lowest, read_list, requirements
from packaging.utils import canonicalize_name

KNOWN = read_list()


def test_no_version_in_use_has_a_known_hole() -> None:
    names = [requirement.name for requirement in requirements()]
    assert affected([*lowest(), *installed(names)], KNOWN["advisory"]) == []


def test_the_audit_finds_what_is_affected() -> None:
    holes = KNOWN["advisory"]
    assert len(affected([InUse("jinja2", "3.1", "here")], holes)) == 5
    [line] = affected([InUse("jinja2", "3.1.5", "here")], holes)
    assert line.startswith("jinja2 3.1.5 (here): CVE-2025-27516: ")
    assert line.endswith("; mended in 3.1.6")
    assert (
        affected([InUse("fonttools", "4.32.0", "x"), InUse("fonttools", "4.60.2", "x")], holes)
        == []
    )
    assert len(affected([InUse("fonttools", "4.33.0", "x")], holes)) == 1


def test_every_direct_dependency_was_reviewed() -> None:
    """It has advisories, or stands among those that have none; none stands in both."""
    holes = {canonicalize_name(hole["package"]) for hole in KNOWN["advisory"]}
    clean = set(KNOWN["reviewed"]["none_known"])
    direct = {canonicalize_name(requirement.name) for requirement in requirements()}
    assert direct <= holes | clean
    assert not holes & clean
    assert clean <= direct


def test_installed_versions_are_followed_to_what_they_require() -> None:
    names = {use.package for use in installed(["matplotlib"])}
    assert {"matplotlib", "numpy", "pillow", "fonttools"} <= names
