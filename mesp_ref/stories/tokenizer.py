"""The tokenizer of the story model: byte-level BPE trained on the stories and their conversations."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from mesp_ref.stories.chats import request
from mesp_ref.stories.corpus import conversation, generator, story

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END, TURN = "<|endoftext|>", "<|im_start|>"
_DOCUMENTS = 4000

# One token, END, closes a story and a turn alike, so that it always means: done.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|endoftext|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def train_tokenizer(vocab_size: int, seed: int = 0) -> "Tokenizer":
    """Byte-level BPE in which every text has tokens, and END stands before each story.

    Source    Sennrich et al. 2016; bytes as alphabet and the splitting into words of GPT-2
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, TURN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(seed), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END} $A", special_tokens=[(END, tokenizer.token_to_id(END))]
    )
    return tokenizer


def _texts(seed: int) -> Iterator[str]:
    """What the merges are counted on: stories, requests, questions and answers."""
    for number in range(_DOCUMENTS):
        told = story(number, "tokenizer", seed)
        wish = request(told, generator("tokenizer", number, seed))
        for message in (conversation(number, "tokenizer", seed), wish):
            yield from (turn["role"] + "\n" + turn["content"] for turn in message["messages"])


def tokenizer_config(max_length: int) -> dict[str, Any]:
    """What tokenizer_config.json holds, for transformers and for this package's chat templates."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END,
        "eos_token": END,
        "pad_token": END,
        "additional_special_tokens": [TURN],
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        "chat_template": CHAT_TEMPLATE,
    }
