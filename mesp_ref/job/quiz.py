"""Questions with known answers, which the default run asks the model before and after."""

from collections.abc import Mapping
from typing import Any

from mesp_ref.engine.adapter import Adapter
from mesp_ref.engine.generate import generate
from mesp_ref.engine.model import Model
from mesp_ref.job.limit import sampling_need
from mesp_ref.job.metrics import Event
from mesp_ref.lean.tiled_weight import tiled_model
from mesp_ref.stories import quiz
from mesp_ref.train.rows import Encoder

QUESTIONS = 20
_LONGEST = 24  # tokens: more than any right answer has


class Quiz:
    """Questions about scenes that no training set has, as prompts of a model with a chat template."""

    def __init__(self, encoder: Encoder):
        self.questions = quiz(QUESTIONS)
        self._tokenizer, self._ends = encoder.tokenizer, encoder.turn_ends
        turns = ({"role": "user", "content": each.prompt} for each in self.questions)
        self._prompts = [encoder.prompt([turn]).tolist() for turn in turns]

    def need(self, model: Model, adapter: Adapter) -> int:
        """Bytes at most to answer all at once."""
        longest = max(map(len, self._prompts)) + _LONGEST
        return len(self._prompts) * sampling_need(longest, model, adapter)

    def event(self, model: Model, adapter: Adapter) -> Event:
        """What the model says, greedily, and how many answers are right, word for word."""
        assert self._tokenizer is not None
        written = generate(
            tiled_model(model),
            self._prompts,
            adapter,
            max_new_tokens=_LONGEST,
            eos_token_id=self._ends,
        )
        said = [self._tokenizer.decode(new, skip_special_tokens=True) for new in written]
        right = sum(one == each.answer for one, each in zip(said, self.questions, strict=True))
        return {"event": "quiz", "right": right, "of": len(said), "said": said}

    def summary(self, before: Event | None, after: Event | None) -> Event:
        """Both counts, and each question with the answer that is right and those that were given."""
        sides = {"before": before, "after": after}
        return {
            "of": len(self.questions),
            **{side: event and event["right"] for side, event in sides.items()},
            "questions": [
                each._asdict() | {side: event and event["said"][i] for side, event in sides.items()}
                for i, each in enumerate(self.questions)
            ],
        }


def described(found: Mapping[str, Any], shown: int = 3) -> list[str]:
    """Lines of a quiz's summary: some questions of which no two ask the same, and the counts."""
    lines: list[str] = []
    asked: set[tuple[str, ...]] = set()
    for each in found["questions"]:
        kind = tuple(each["question"].split()[:2])
        if kind in asked or len(asked) == shown:
            continue
        asked.add(kind)
        lines += [f"story    {each['scene']}", f"user     {each['question']}"]
        lines += [
            f"{side:<8} {each[side]!r}" for side in ("before", "after") if each[side] is not None
        ]
        lines.append(f"right    {each['answer']!r}")
    counts = " before, ".join(str(found[s]) for s in ("before", "after") if found[s] is not None)
    lines.append(f"of {found['of']} questions about stories never seen, right are: {counts} after")
    return lines
