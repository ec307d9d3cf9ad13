"""The demo checkpoint's tokenizer: a small byte-level BPE, trained on the tasks' own text.

Any UTF-8 text can be encoded (256 byte tokens), a digit is always one token, every word of
`tasks.WORDS` is one token when a space precedes it, and characters outside ASCII take several.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from random import Random

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tools.demo import tasks

END_OF_TEXT = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, TURN_START, TURN_END)

VOCABULARY_LIMIT = 2048
VOCABULARY_MULTIPLE = 32

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def build_tokenizer(seed: int = 0) -> Tokenizer:
    """Train the tokenizer; the same seed gives the same vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_LIMIT,
        min_frequency=2,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(seed), trainer)
    # Every id that the model can emit has a text, and its rows fill the matrix kernels' tiles.
    spare = -tokenizer.get_vocab_size() % VOCABULARY_MULTIPLE
    tokenizer.add_special_tokens([f"<|reserved_{index}|>" for index in range(spare)])
    _check(tokenizer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, out: Path, context: int) -> None:
    """Write tokenizer.json and the tokenizer_config.json that transformers reads beside it."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "additional_special_tokens": [TURN_START, TURN_END],
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _corpus(seed: int) -> Iterator[str]:
    """Texts in which every word of the tasks occurs often enough to become one token."""
    rng = Random(f"tokenizer/{seed}")
    for word in tasks.WORDS:
        yield f" {word}" * 10
    for _ in range(500):
        yield tasks.story(rng)
        yield from ("recall:", "copy:", "reverse:", " =>", "system", "user", "assistant")


def _check(tokenizer: Tokenizer) -> None:
    """Refuse a vocabulary that splits what `tasks` and `data` count as one token."""
    singles = [f" {word}" for word in tasks.WORDS] + list("0123456789=,;:+\n")
    singles += ["recall", "copy", "reverse", "user", "assistant", " =>", *SPECIAL_TOKENS]
    split = [text for text in singles if len(tokenizer.encode(text).ids) != 1]
    if split:
        raise ValueError(f"{len(split)} texts are not one token each, such as {split[:5]}")
