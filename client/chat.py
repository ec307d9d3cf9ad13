"""A conversation: history, and one streamed answer a turn."""

import dataclasses
from collections.abc import Generator

from client.answer import Answer
from client.request import Message, Piece, Request
from client.transport import Transport


class Conversation:
    """Turns so far; the whole of them is sent each time, since the server keeps none."""

    def __init__(self, transport: Transport, settings: Request) -> None:
        """`settings` is a request without a prompt."""
        self._transport = transport
        self._settings = settings
        self._messages: tuple[Message, ...] = ()

    def reset(self) -> None:
        """Forget all turns."""
        self._messages = ()

    def say(self, text: str, answer: Answer) -> Generator[Piece]:
        """Send a user's turn; the pieces of the reply, which `answer` adds up.

        What was received is kept as the assistant's turn, also where the caller stops early. A turn
        without any reply is forgotten, so that it can be said again.
        """
        asked = (*self._messages, Message(role="user", content=text))
        request = dataclasses.replace(self._settings, messages=asked)
        try:
            yield from answer.follow(self._transport.generate(request))
        finally:
            if answer.output_tokens:
                self._messages = (*asked, Message(role="assistant", content=answer.text))
