"""A conversation as the text that a checkpoint was trained to continue."""

from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict


class Message(TypedDict):
    """One turn of one side."""

    role: str
    content: str


class TemplateError(Exception):
    """A checkpoint's folder has no chat template that can be used; says why."""


class ChatTemplate:
    """The template in a checkpoint's tokenizer_config.json or chat_template.jinja."""

    def __init__(self, checkpoint: Path) -> None:
        """Read it.

        Raises:
            TemplateError: it cannot be read, or there is none.
        """
        if not checkpoint.is_dir():
            raise TemplateError(f"{checkpoint} is no folder; give that of a checkpoint")
        # Seconds to import, and only chat needs it.
        from transformers import AutoTokenizer

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(
                checkpoint, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # whatever may be wrong with files we did not write
            raise TemplateError(
                f"{checkpoint} has no tokenizer that can be read: {error}"
            ) from None
        if not self._tokenizer.chat_template:
            raise TemplateError(
                f"{checkpoint} has no chat template in tokenizer_config.json; give the folder of "
                "a checkpoint made for chat, or use generate"
            )
        self._added = self._added_prefix()

    def render(self, messages: Sequence[Message]) -> str:
        """The conversation so far and the start of the assistant's turn.

        Raises:
            TemplateError: the template does not take such a conversation.
        """
        try:
            text = self._tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # templates raise as they like
            raise TemplateError(f"the chat template failed: {error}") from None
        return str(text).removeprefix(self._added)

    def _added_prefix(self) -> str:
        """The text of the token that the server's tokenizer puts before any prompt, if any.

        A template that begins with it too would give the model two of them.
        """
        first: list[int] = self._tokenizer("").input_ids[:1]
        return str(self._tokenizer.bos_token) if first == [self._tokenizer.bos_token_id] else ""
