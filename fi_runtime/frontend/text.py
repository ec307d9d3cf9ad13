"""Tokens to text while they come, and the stop strings that end it."""

from collections.abc import Callable, Sequence

from tokenizers import Tokenizer

# Tokens of the prompt that are decoded along, at least, since a token's text depends on those
# before it: some decoders drop the first one's leading space.
CONTEXT_TOKENS = 6
# A character has at most four bytes and a token at least one, so that the last of four tokens
# either completes a character begun in the first or breaks it.
CHARACTER_TOKENS = 4
# Broken characters in a row after which no decoder can still make whole ones of them.
MAX_BROKEN = 16
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """Decodes a growing list of tokens piece by piece, never half a character.

    Decoders write a replacement character for what is no character (yet): text is said up to the
    replacement characters that it ends with, and those once something whole follows or the text
    is over. Tokens whose text is said are decoded along only as far back as the last place where
    the text was whole.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt: Sequence[int], skip_special_tokens: bool = True
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._context: list[int] = []
        self._pending: list[int] = []
        """tokens after the last place where the text was whole"""
        self._said = 0
        """characters of the text of both lists that are said"""
        self._move_on(_whole_end(prompt, self._decode), [])

    def feed(self, token: int) -> str:
        """The text that this token completes; empty while a character is partial."""
        self._pending.append(token)
        text = self._decode(self._context + self._pending)
        whole = len(text.rstrip(REPLACEMENT))
        if len(text) - whole > MAX_BROKEN:
            keep = CHARACTER_TOKENS - 1
            return self._say(self._pending[:-keep], self._pending[-keep:])
        new = text[self._said : whole]
        if whole == len(text):
            self._move_on(self._pending, [])
        else:
            self._said = max(self._said, whole)
        return new

    def feed_all(self, tokens: list[int]) -> str:
        """The text that these tokens complete: what ``feed`` says of one after another."""
        if len(tokens) > 1:
            pending = self._pending + tokens
            text = self._decode(self._context + pending)
            if REPLACEMENT not in text:
                new = text[self._said :]
                self._move_on(self._last_whole(pending), [])
                return new
        return "".join([self.feed(token) for token in tokens])

    def flush(self) -> str:
        """What is left of a text that ended within a character."""
        return self._say(self._pending, [])

    def _say(self, tokens: list[int], rest: list[int]) -> str:
        """The text of ``tokens``, the first ones pending; ``rest`` are those that still are."""
        new = self._decode(self._context + tokens)[self._said :]
        self._move_on(tokens, rest)
        return new

    def _last_whole(self, tokens: list[int]) -> list[int]:
        """The fewest last tokens of a whole text that are whole themselves and have text."""
        for start in range(len(tokens) - 1, 0, -1):
            text = self._decode(tokens[start:])
            if text and REPLACEMENT not in text:
                return tokens[start:]
        return tokens

    def _move_on(self, context: list[int], pending: list[int]) -> None:
        # What has no text, as a special token, is no context: a decoder that drops the leading
        # space of what it is given would drop the next token's.
        text = self._decode(context)
        if not text:
            context = self._context + context
            text = self._decode(context)
        self._context = context
        self._pending = pending
        self._said = len(text)

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=self._skip_special_tokens))


def _whole_end(prompt: Sequence[int], decode: Callable[[list[int]], str]) -> list[int]:
    """The prompt's last tokens, from one that begins a character."""
    for count in range(CONTEXT_TOKENS, CONTEXT_TOKENS + CHARACTER_TOKENS):
        tokens = list(prompt[-count:])
        if not decode(tokens).startswith(REPLACEMENT):
            return tokens
    return list(prompt[-CONTEXT_TOKENS:])


class StopStrings:
    """Cuts a text at the first of some strings, wherever it is cut into pieces.

    Args:
        include: whether the string itself is kept.
    """

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        self._stops = [stop for stop in stops if stop]
        self._include = include
        self._longest = max(map(len, self._stops), default=1)
        self._said = ""
        """the end of what was said, in which a stop string may have begun"""
        self._held = ""
        """what follows it and may be the beginning of a stop string"""

    def skip(self, text: str) -> str:
        """Text that is said whatever it holds; a stop string may begin in it and end later."""
        self._said = (self._said + text)[-self._longest :]
        return text

    def feed(self, text: str) -> tuple[str, bool]:
        """The text that is safe to send, and whether a stop string has been found after it."""
        said = len(self._said)
        whole = self._said + self._held + text
        # Those that end in what was said were there before anybody looked for them.
        places = ((whole.find(stop, max(0, said - len(stop) + 1)), stop) for stop in self._stops)
        found = [(at, stop) for at, stop in places if at >= 0]
        if found:
            self._held = ""
            at, stop = min(found)
            return whole[said : at + len(stop) * self._include], True
        held = max((_overlap(whole, stop) for stop in self._stops), default=0)
        end = max(said, len(whole) - held)
        self._said, self._held = whole[:end][-self._longest :], whole[end:]
        return whole[said:end], False

    def flush(self) -> str:
        """What was held back of a text that has ended."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that a stop string begins with, short of all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
