"""The exercises, in the order in which they are best done; one row each."""

import difflib

from mesp_ref.errors import MespRefError, shown
from mesp_ref.learn.exercise import Exercise
from mesp_ref.learn.exercises import (
    adapter,
    attention,
    block,
    calculus,
    count,
    embedding,
    head,
    judging,
    linear,
    loss,
    mezo,
    norm,
    rope,
    softmax,
    swiglu,
    training,
    wiring,
    zeroth,
)

ROWS = (
    linear.LINEAR, linear.LINEAR_PARAMS, linear.LORA, norm.NORM, norm.NORM_PARAMS, rope.ROPE,
    softmax.SOFTMAX, attention.ONE_HEAD, attention.SHARED, swiglu.SWIGLU, loss.CROSS_ENTROPY,
    embedding.EMBEDDING, embedding.TIED, head.HEAD, block.BLOCK, block.MESP, mezo.MEZO, training.TRAINING,
    training.ADAMW,
)  # fmt: skip
QUESTIONS = (  # of notebooks 0 to 8, in their order
    calculus.LOGISTIC, calculus.LAYERNORM, calculus.BLIND, wiring.STAYS, wiring.BIAS, wiring.ORDER, adapter.RANK,
    adapter.GUESS, adapter.LATE, count.EQUAL_LENGTH, count.BLOCK_GRADS, count.CHECKPOINTS, count.STREAMED,
    count.NEEDS, zeroth.EPS, zeroth.STEPS, adapter.MERGED, adapter.EQUAL_RANK, judging.FORGETTING, calculus.OUTSIDE,
    calculus.NOTICED, judging.PAIR, wiring.AVERAGED, wiring.VERDICT, judging.BFLOAT16,
)  # fmt: skip
EXERCISES: dict[str, Exercise] = {row.name: row for row in (*ROWS, *QUESTIONS)}


def find(name: str) -> Exercise:
    """An exercise by its name, or by a shorter one that means it.

    Raises MespRefError, with what may have been meant
    """
    for row in EXERCISES.values():
        if name == row.name or name in row.aliases:
            return row
    near = difflib.get_close_matches(str(name), list(EXERCISES), n=3, cutoff=0.4)
    meant = f"; did you mean {' or '.join(near)}?" if near else ""
    raise MespRefError(
        f"exercise: found {shown(name)}, expected one of {', '.join(EXERCISES)}{meant}"
    )
