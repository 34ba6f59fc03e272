"""The model card of a story model: what it is, how it was made, what it reaches, what it is not."""

from collections.abc import Mapping
from typing import Any

_CARD = """\
---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
tags: [qwen2, stories, numpy]
---

# A small story model

{parameters:,} parameters in the Qwen2 architecture, float32, trained from random weights by
mesp_ref's own hand-written backward pass, in NumPy on a CPU. It writes short stories about animals
that lose things, rescue, bake, travel, wonder and race:

> {sampled}

Its purpose is to be a real model, with structure worth preserving, that is small enough to lie in a
repository: for fine-tuning, gradient checks and teaching. It knows nothing else of the world or of
English, and text unlike its stories is foreign to it.

## Use

```
mesp-ref generate --prompt "Once upon a time, there was a brave fox named Ruby."
mesp-ref generate --chat --prompt "Tell me a story about a lazy turtle."
```

```python
import mesp_ref as mr

model = mr.load_model()  # without a path: this checkpoint
tokenizer = mr.load_tokenizer(model.path)
[new] = mr.generate(model, [tokenizer.encode("").ids], max_new_tokens=200, temperature=1.0)
print(tokenizer.decode(new))
```

`transformers` loads the directory as well. `<|endoftext|>` stands before and after each story and
ends each turn of a conversation.

## Training

```
{command}
```

repeats it: {steps:,} steps of {batch_size} rows, {tokens:,} predicted tokens in {minutes:.0f}
minutes. AdamW with betas 0.9 and 0.98; learning rate {lr:g} after {warmup} steps of warm-up, then a
cosine to 0; gradients clipped at norm 1. NumPy {numpy} with {blas} and threads = {threads} gave
these bits; another library or number of threads rounds differently and gives another model, about
as good.

No story comes twice: each row is drawn afresh from the seeded grammar in `mesp_ref.stories`. A row
is one story; in a fifth of them somebody asks for it first, in the model's chat format. The
tokenizer is byte-level BPE with {vocab_size:,} tokens, trained on stories, requests, questions and
answers.

## How good it is

The grammar is unambiguous and every draw in it is uniform, so its entropy is known exactly:
{entropy:.3f} nats per story. The {stories} held-out stories have {nats_per_story:.3f} nats and
{tokens_per_story:.1f} tokens each, which bounds what any model can reach on them.

| | |
|---|---|
| loss on {stories} held-out stories | {loss:.4f} nats per token |
| bound: −log P(story) of the grammar / tokens | {bound:.4f} nats per token |
| excess | {excess:.4f} nats per token, {story_excess:.2f} nats per story |
| stories drawn at temperature 1 that the grammar accepts | {sampled_accepted:.1%} of {samples} |
| greedy stories from held-out first sentences that it accepts | {greedy_accepted:.1%} of {samples} |

The grammar accepts a story when every word of it could have been written by its rules: one wrong
pronoun, one name given to two animals, or a place that contradicts an earlier sentence, and the
story does not count.

## Limits

A story has up to about 180 tokens, and the model has seen one at a time. It cannot answer
questions about a story; that is what the default fine-tuning set teaches. Greedy text often gives a
newcomer a name that is taken: a new name is one of many equally likely ones, and one that was just
told lies a little above each of them. So draw stories with a temperature. Asked for a story about a
name or a home, it tells one; of a wish for an animal it takes no notice.
"""


def model_card(options: Mapping[str, Any], facts: Mapping[str, Any], command: str) -> str:
    """README.md of the checkpoint, from the options of the run and what it measured."""
    excess = facts["loss"] - facts["bound"]
    tokens_per_story = facts["heldout_tokens"] / facts["stories"]
    derived = {
        "excess": excess,
        "tokens_per_story": tokens_per_story,
        "story_excess": excess * tokens_per_story,
        "minutes": facts["seconds"] / 60,
        "command": command,
    }
    return _CARD.format(**dict(options) | dict(facts) | derived)
