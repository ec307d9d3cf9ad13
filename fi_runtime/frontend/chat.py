"""Conversations to prompts, by the checkpoint's own chat template."""

from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta
from tokenizers import Tokenizer

from fi_runtime.frontend.errors import RequestError, short


class Message(msgspec.Struct, forbid_unknown_fields=True):
    """One turn of one side."""

    role: Annotated[str, Meta(min_length=1)]
    content: str


class ChatTemplate:
    """The template in a checkpoint's chat_template.jinja or tokenizer_config.json, if any.

    transformers renders it, in jinja2's immutable sandbox: a template sees the messages and special
    tokens as plain data, cannot change them or reach anything else, and ``range`` is bounded.
    """

    def __init__(self, checkpoint: Path, tokenizer: Tokenizer) -> None:
        self._checkpoint = checkpoint
        self._tokenizer = tokenizer

    def render(self, messages: list[Message]) -> str:
        """The conversation, and the start of the assistant's turn, with all special tokens in it.

        Raises:
            RequestError: there is no template, or it does not take such a conversation.
        """
        if not self._loaded.chat_template:
            raise RequestError(
                "INVALID_ARG",
                "messages: the checkpoint has no chat template, in chat_template.jinja or "
                "tokenizer_config.json; give text_input or input_ids",
            )
        try:
            return str(
                self._loaded.apply_chat_template(
                    msgspec.to_builtins(messages), tokenize=False, add_generation_prompt=True
                )
            )
        except Exception as error:  # templates raise as they like
            raise RequestError(
                "INVALID_ARG", f"messages: the checkpoint's chat template refuses them: {error}"
            ) from None

    @cached_property
    def _loaded(self) -> Any:
        # Half a second to import and half a second for a large vocabulary, which only a front end
        # that is asked to chat waits for, once. Of transformers' tokenizers this one alone does
        # without torch, which takes seconds and 350 MB.
        from transformers import PreTrainedTokenizerFast

        try:
            return PreTrainedTokenizerFast.from_pretrained(
                self._checkpoint, tokenizer_object=self._tokenizer, local_files_only=True
            )
        except Exception as error:  # whatever a malformed file makes transformers raise
            raise RequestError(
                "INVALID_ARG", f"messages: the checkpoint's chat template cannot be read: {error}"
            ) from None


def read_messages(text: str, max_bytes: int, max_messages: int) -> list[Message]:
    """Messages from JSON.

    Raises:
        RequestError: no such JSON, or more of it than fits any prompt.
    """
    try:
        messages = msgspec.json.decode(text, type=list[Message])
        size = sum(len(one.role.encode()) + len(one.content.encode()) for one in messages)
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError) as error:
        raise RequestError(
            "INVALID_ARG",
            f"messages={short(text)}: expected a JSON array of "
            f'{{"role": "...", "content": "..."}} objects: {error}',
        ) from None
    # Before a template spends time on them, which other requests wait for.
    if len(messages) > max_messages or size > max_bytes:
        raise RequestError(
            "INVALID_ARG",
            f"messages has {len(messages)} messages of {size} bytes; more than {max_messages} "
            f"messages or {max_bytes} bytes do not fit the context, whatever their tokens",
        )
    return messages
