"""Tokens to text while they come, and the stop strings that end it."""

from collections.abc import Sequence

from tokenizers import Tokenizer

# Tokens of the prompt that are decoded along, since a token's text depends on those before it:
# some decoders drop the first one's leading space.
CONTEXT_TOKENS = 6
# A character has at most four bytes, and a token at least one: more tokens than that without a
# whole character are no character at all.
MAX_PARTIAL_TOKENS = 4
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """Decodes a growing list of tokens piece by piece, never half a character."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._context = list(prompt[-CONTEXT_TOKENS:])
        """tokens whose text is out already"""
        self._pending: list[int] = []
        """tokens whose text is not, because it ends within a character"""
        self._said = self._decode(self._context)

    def feed(self, token: int) -> str:
        """The text that this token completes; empty while a character is partial."""
        self._pending.append(token)
        text = self._decode(self._context + self._pending)
        if text.endswith(REPLACEMENT) and len(self._pending) < MAX_PARTIAL_TOKENS:
            return ""
        return self._say(text)

    def flush(self) -> str:
        """What is left of a text that ended within a character."""
        return self._say(self._decode(self._context + self._pending)) if self._pending else ""

    def _say(self, text: str) -> str:
        new = text[len(self._said) :]
        self._context, self._pending = (self._context + self._pending)[-CONTEXT_TOKENS:], []
        self._said = self._decode(self._context)
        return new

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))


class StopStrings:
    """Cuts a text before the first of some strings, wherever it is cut into pieces."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        """text that may be the beginning of a stop string"""

    def feed(self, text: str) -> tuple[str, bool]:
        """The text that is safe to send, and whether a stop string has been found after it."""
        text = self._held + text
        found = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held], False

    def flush(self) -> str:
        """What was held back of a text that has ended."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that a stop string begins with, short of all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
