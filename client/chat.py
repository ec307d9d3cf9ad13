"""A conversation: history, and one streamed answer a turn."""

import dataclasses
from collections.abc import Generator

from client.answer import Answer
from client.request import Piece, Request
from client.template import ChatTemplate, Message
from client.transport import Transport


class Conversation:
    """Turns so far; the whole of them is sent each time, since the server keeps none."""

    def __init__(self, transport: Transport, template: ChatTemplate, settings: Request) -> None:
        """`settings` is a request whose prompt does not matter."""
        self._transport = transport
        self._template = template
        self._settings = settings
        self._messages: list[Message] = []

    def reset(self) -> None:
        """Forget all turns."""
        self._messages.clear()

    def say(self, text: str, answer: Answer) -> Generator[Piece]:
        """Send a user's turn; the pieces of the reply, which `answer` adds up.

        What was received is kept as the assistant's turn, also where the caller stops early. A turn
        without any reply is forgotten, so that it can be said again.
        """
        asked: list[Message] = [*self._messages, {"role": "user", "content": text}]
        request = dataclasses.replace(self._settings, prompt=self._template.render(asked))
        try:
            yield from answer.follow(self._transport.generate(request))
        finally:
            if answer.output_tokens:
                self._messages = [*asked, {"role": "assistant", "content": answer.text}]
