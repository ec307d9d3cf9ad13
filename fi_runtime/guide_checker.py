"""Compiles guides where a bad one does no harm: a small process, ``python -m`` this module.

A guide of two kilobytes can keep llguidance busy for minutes, and a chain of rules can overflow
its stack; neither can be caught inside a process. So front ends have each guide compiled here
first. What exceeds the limits ends this process alone, and what passes costs the engine no more.

It reads a JSON line for each guide and answers with one. It ends with its standard input, so with
the front end, however that ends.
"""

import json
import resource
import signal
import sys

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper, grammar_from

CPU_S = 0.5
"""for one guide; common ones take a thousandth of a second"""
MEMORY_BYTES = 512 << 20
STACK_BYTES = 2 << 20
"""a quarter of what the engine's threads have"""
TRIAL_TOKENS = 8
"""enough for a guide that is too complex for llguidance's limits to show it, mostly"""

LIMITS = LLParserLimits(
    # With llguidance's own, a step could take most of a second and hundreds of megabytes.
    step_lexer_fuel=50_000,
    max_lexer_states=50_000,
    verbose_errors=False,  # the reason alone, without the parser's state
)
"""the checker's and the engine's"""


class _Bytes:
    """A vocabulary of the bytes and an end: what a guide means does not depend on the tokens."""

    bos_token_id = None
    eos_token_id = 256
    tokens = [bytes([byte]) for byte in range(256)] + [b"<end>"]
    special_token_ids = [256]  # noqa: RUF012

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


def serialised(kind: str, text: str, options: dict[str, object]) -> str:
    """A guide as llguidance's grammar.

    Args:
        kind: json_schema, regex, lark, or grammar, which is Lark or EBNF.
        options: llguidance's JsonCompileOptions, for a json_schema.

    Raises:
        ValueError: it cannot be read.
    """
    if kind == "json_schema":
        return LLMatcher.grammar_from_json_schema(text, overrides=options or None)  # type: ignore[arg-type]
    return grammar_from(kind, text)  # type: ignore[arg-type]


def reason_against(grammar: str, tokenizer: LLTokenizer) -> str:
    """Why nothing can be generated under a grammar; empty if something can."""
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=LIMITS)
    if matcher.is_error():
        return matcher.get_error()
    for place in range(TRIAL_TOKENS):
        mask = int.from_bytes(matcher.compute_bitmask(), "little")
        if matcher.is_error():
            error = matcher.get_error()
            return "no text matches it" if error.startswith("NoExtension") else error
        text = mask & ~(1 << tokenizer.eos_token)
        if not text:
            return "" if place else "no text but the empty one matches it"
        matcher.consume_token(text.bit_length() - 1)  # the highest, which is no whitespace
    return ""


def _answer(line: bytes, tokenizer: LLTokenizer) -> dict[str, str]:
    try:
        grammar = serialised(**json.loads(line))
        reason = reason_against(grammar, tokenizer)
    except Exception as error:  # of llguidance's own readers, which raise many kinds
        reason = str(error) or repr(error)
    return {"error": reason} if reason else {"grammar": grammar}


def main() -> None:
    for what, limit in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_STACK, STACK_BYTES),
        (resource.RLIMIT_AS, MEMORY_BYTES),
    ):
        resource.setrlimit(what, (limit, limit))
    tokenizer = LLTokenizer(TokenizerWrapper(_Bytes()))
    for line in sys.stdin.buffer:
        # Nothing handles this signal, so that it ends the process even inside llguidance.
        signal.setitimer(signal.ITIMER_PROF, CPU_S)
        answer = json.dumps(_answer(line, tokenizer))
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        print(answer, flush=True)


if __name__ == "__main__":
    main()
