"""A report as continuous integration reads it: JUnit XML, and annotations of GitHub."""

from xml.etree import ElementTree

from mesp_ref.errors import escaped
from mesp_ref.golden.check import CaseReport, Report
from mesp_ref.golden.report import line


def as_junit(report: Report, name: str = "mesp-ref golden") -> str:
    """JUnit XML: a test case for each case of the suite, a failure with its tensors and its name."""
    failed = [case for case in report.cases if not case.passed]
    root = ElementTree.Element("testsuites")
    suite = ElementTree.SubElement(
        root, "testsuite", name=_clean(name), tests=str(report.asked), errors="0",
        failures=str(len(failed)), skipped=str(len(report.uncovered)),
    )  # fmt: skip
    for case in report.cases:
        entry = _entry(suite, case.case, case.dtype)
        if not case.passed:
            first = _summary(case)
            ElementTree.SubElement(entry, "failure", message=_clean(first)).text = _clean(
                _all(case)
            )
    for uncovered in report.uncovered:
        entry = _entry(suite, uncovered, "")
        ElementTree.SubElement(entry, "skipped", message="not covered in this precision")
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _entry(suite: ElementTree.Element, case: str, dtype: str) -> ElementTree.Element:
    folder, _, last = case.rpartition("/")
    name = f"{last} ({dtype})" if dtype else last
    return ElementTree.SubElement(
        suite, "testcase", classname=_clean(folder.replace("/", ".")), name=_clean(name)
    )


def _summary(case: CaseReport) -> str:
    wrong = sum(not v.passed for v in case.verdicts)
    like = f"; {case.like[0]}" if case.like else ""
    return f"{wrong} of {len(case.verdicts)} tensors{like}"


def _all(case: CaseReport) -> str:
    return "\n".join([line(v) for v in case.verdicts if not v.passed] + case.like)


def _clean(text: str) -> str:
    """Without what XML 1.0 does not allow: control characters and half surrogate pairs."""
    return "".join(c for c in text if c in "\n\t" or (c >= " " and not "\ud800" <= c <= "\udfff"))


def as_annotations(report: Report) -> list[str]:
    """A workflow command of GitHub for each case that failed."""

    def data(text: str) -> str:
        text = escaped(text)
        for character, code in (("%", "%25"), ("\r", "%0D"), ("\n", "%0A")):
            text = text.replace(character, code)
        return text

    def title(text: str) -> str:
        return data(text).replace(":", "%3A").replace(",", "%2C")

    return [
        f"::error title={title(f'{case.case} ({case.dtype})')}::{data(_summary(case))}"
        for case in report.cases
        if not case.passed
    ]
