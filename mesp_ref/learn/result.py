"""What the tutor answers: a verdict and sentences."""

from dataclasses import dataclass

from mesp_ref.errors import escaped


@dataclass(frozen=True)
class Result:
    """Prints itself, line by line.

    exercise    its name
    passed      whether the function is right
    sentences   the verdict first, then what is wrong, what it looks like, and hints that were asked for
    named       what it was explained as; empty where only facts can be told
    """

    exercise: str
    passed: bool
    sentences: tuple[str, ...]
    named: tuple[str, ...] = ()

    def __str__(self) -> str:
        mark = "right" if self.passed else "not yet"
        first, *rest = (escaped(sentence) for sentence in self.sentences)
        return "\n".join([f"{self.exercise}: {mark}. {first}", *(f"  {line}" for line in rest)])

    __repr__ = __str__

    def __bool__(self) -> bool:
        return self.passed
