"""A seeded grammar with a memory, whose probabilities are exact.

A rule is a tuple of alternatives, one of which is drawn uniformly. Alternatives are templates:

    <rule>         expand the rule, anew each time
    {name}         the value of `name`: drawn from the rule of that name the first time, the same
                   value ever after. {name2}, {name3} draw from the rule `name` what no other
                   name, name2, … has taken
    {name.he}      something that goes with the value: attributes["he"][value]; {name.He} is
                   capitalised

So every draw is one of n equally likely ones, a text has the probability Π 1/n of its draws, and
the entropy of the whole grammar follows from the numbers n alone. The grammar is unambiguous when
no text has two derivations; then that probability is the text's.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np

Rules = Mapping[str, tuple[str, ...]]
Attributes = Mapping[str, Mapping[str, str]]
Memory = Mapping[str, str]

_SYMBOL = re.compile(r"(<\w+>|\{[\w.]+\})")


@dataclass(frozen=True)
class Story:
    """A text, the values that it fixes, and its surprisal −log P(text) in nats."""

    text: str
    facts: Memory
    nats: float


@dataclass(frozen=True)
class Grammar:
    """Rules, and the attributes of the words that they draw.

    Templates are split into literals and symbols once; a derivation is a stack of them, the next
    one last, and the memory.
    """

    rules: Rules
    attributes: Attributes
    start: str = "<story>"

    def write(self, rng: np.random.Generator) -> Story:
        """Draw a story."""
        stack, memory, text, nats = [self.start], dict[str, str](), "", 0.0
        while stack:
            symbol = stack.pop()
            options = self._options(symbol, memory)
            if options is None:
                text += self._literal(symbol, memory)
                continue
            nats += math.log(len(options))
            self._choose(symbol, options[rng.integers(len(options))], stack, memory)
        return Story(text, memory, nats)

    def read(self, text: str) -> Story | None:
        """The story that a text is, or None when the grammar cannot write it.

        Raises ValueError when the text has two derivations.
        """
        found = list(self._derivations([self.start], {}, lambda told: text.startswith(told)))
        found = [story for story in found if story.text == text]
        if len(found) > 1:
            raise ValueError(f"{len(found)} derivations of: {text}")
        return found[0] if found else None

    def all(self) -> Iterator[Story]:
        """Every derivation. For small grammars: a test can sum their probabilities."""
        return self._derivations([self.start], {}, lambda told: True)

    def entropy(self) -> float:
        """Entropy of a story in nats, exactly.

        H(rest) = log n + (1/n)·Σ_alternatives H(alternative, rest), over what is still to be told.
        Which word was drawn never changes how many draws follow, so the memory counts only by its
        names, and few different situations arise.
        """

        @cache
        def rest(stack: tuple[str, ...], known: frozenset[str]) -> float:
            if not stack:
                return 0.0
            symbol, below = stack[-1], stack[:-1]
            options = self._options(symbol, dict.fromkeys(known, ""))
            if options is None:
                return rest(below, known)
            if symbol.startswith("{"):
                taken = sum(_rule(name) == _rule(_variable(symbol)) for name in known)
                left = len(self.rules[_rule(_variable(symbol))]) - taken
                return math.log(left) + rest(below, known | {_variable(symbol)})
            total = sum(rest(below + _reversed_parts(option), known) for option in options)
            return math.log(len(options)) + total / len(options)

        return rest((self.start,), frozenset())

    def fill(self, template: str, facts: Memory) -> str:
        """A template whose values are all known, as text."""
        return "".join(self._literal(part, facts) for part in reversed(_reversed_parts(template)))

    def _options(self, symbol: str, memory: Memory) -> list[str] | None:
        """What can be drawn for a symbol; None for a literal or a value that is known."""
        if symbol.startswith("<"):
            return list(self.rules[symbol[1:-1]])
        if not symbol.startswith("{") or _variable(symbol) in memory:
            return None
        rule = _rule(_variable(symbol))
        taken = {value for name, value in memory.items() if _rule(name) == rule}
        return [value for value in self.rules[rule] if value not in taken]

    def _literal(self, symbol: str, memory: Memory) -> str:
        """The text of a symbol that leaves no choice."""
        if not symbol.startswith("{"):
            return symbol
        variable, _, attribute = symbol[1:-1].partition(".")
        if not attribute:
            return memory[variable]
        text = self.attributes[attribute.lower()][memory[variable]]
        return text if attribute.islower() else text[:1].upper() + text[1:]

    def _choose(self, symbol: str, option: str, stack: list[str], memory: dict[str, str]) -> None:
        """Go on with an option: expand a rule, or remember a value and then tell it."""
        if symbol.startswith("<"):
            stack += _reversed_parts(option)
        else:
            memory[_variable(symbol)] = option
            stack.append(symbol)

    def _derivations(
        self, stack: list[str], memory: dict[str, str], possible: Callable[[str], bool]
    ) -> Iterator[Story]:
        """All derivations whose text so far stays possible, depth first."""
        waiting = [(stack, memory, "", 0.0)]
        while waiting:
            stack, memory, text, nats = waiting.pop()
            options = None
            while stack and possible(text):
                symbol, stack = stack[-1], stack[:-1]
                options = self._options(symbol, memory)
                if options is not None:
                    break
                text += self._literal(symbol, memory)
            if options is None:
                if possible(text):
                    yield Story(text, memory, nats)
                continue
            for option in options:
                branch = list(stack), dict(memory), text, nats + math.log(len(options))
                self._choose(symbol, option, branch[0], branch[1])
                waiting.append(branch)


def _variable(symbol: str) -> str:
    """The name that a {symbol} remembers its value under."""
    return symbol[1:-1].partition(".")[0]


def _rule(variable: str) -> str:
    """The rule that a variable draws from: its name without the number."""
    return variable.rstrip("0123456789")


@cache
def _reversed_parts(template: str) -> tuple[str, ...]:
    """Literals and symbols of a template, the last one first."""
    return tuple(part for part in reversed(_SYMBOL.split(template)) if part)
