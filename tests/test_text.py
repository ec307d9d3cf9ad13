"""Text that comes in pieces must be the text that comes whole."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from fi_runtime.frontend.text import StopStrings, TextStream


def byte_tokenizer() -> Tokenizer:
    """A token for every byte, so that every character beyond ASCII is cut."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def metaspace_tokenizer() -> Tokenizer:
    """As Llama 2's: its decoder drops the leading space of whatever it is given first."""
    words = ["▁", "▁the", "▁cat", "s", "▁sat", "▁on", "▁mat", ".", "<unk>"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def byte_fallback_tokenizer() -> Tokenizer:
    """As Llama 2's for what its vocabulary lacks: a run of bytes is text only as a whole."""
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"<unk>": 256, "▁": 257}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer


BYTES = byte_tokenizer()
FALLBACK = byte_fallback_tokenizer()


@settings(max_examples=500, deadline=None)
@given(
    tokenizer=st.sampled_from([BYTES, FALLBACK]),
    prompt=st.text(max_size=12),
    answer=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=40),
)
def test_pieces_join_to_the_whole_and_none_is_half_a_character(
    tokenizer: Tokenizer, prompt: str, answer: str
) -> None:
    stream = TextStream(tokenizer, tokenizer.encode(prompt).ids)
    pieces = [stream.feed(token) for token in tokenizer.encode(answer).ids]
    assert "".join(pieces) + stream.flush() == answer
    if "\N{REPLACEMENT CHARACTER}" not in answer:
        assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in pieces)


@settings(max_examples=500, deadline=None)
@given(
    tokenizer=st.sampled_from([BYTES, FALLBACK]),
    prompt=st.text(max_size=6),
    answer=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=40),
    sizes=st.lists(st.integers(1, 20), min_size=1),
)
def test_many_tokens_at_once_say_what_they_say_one_by_one(
    tokenizer: Tokenizer, prompt: str, answer: str, sizes: list[int]
) -> None:
    one, many = (TextStream(tokenizer, tokenizer.encode(prompt).ids) for _ in range(2))
    left = tokenizer.encode(answer).ids
    for size in itertools.cycle(sizes):
        group, left = left[:size], left[size:]
        assert many.feed_all(group) == "".join(one.feed(token) for token in group)
        if not left:
            break
    assert many.flush() == one.flush()


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 255), max_size=30))
def test_bytes_that_are_no_text_come_out_all_the_same(tokens: list[int]) -> None:
    stream = TextStream(BYTES, [])
    text = "".join(stream.feed(token) for token in tokens) + stream.flush()
    plain = "\N{REPLACEMENT CHARACTER}"
    # How many replacement characters stand for broken bytes is nobody's business.
    assert [c for c in text if c != plain] == [c for c in BYTES.decode(tokens) if c != plain]


def test_no_space_is_lost_where_the_answer_begins() -> None:
    tokenizer = metaspace_tokenizer()
    tokens = [1, 2, 3, 4, 5, 1, 6, 7]
    whole = tokenizer.decode(tokens)
    assert whole == "the cats sat on the mat."
    for cut in range(1, len(tokens)):
        stream = TextStream(tokenizer, tokens[:cut])
        pieces = "".join(stream.feed(token) for token in tokens[cut:])
        assert tokenizer.decode(tokens[:cut]) + pieces == whole


def test_no_space_is_lost_after_a_special_token() -> None:
    tokenizer = metaspace_tokenizer()
    tokenizer.add_special_tokens(["<s>"])
    special = tokenizer.token_to_id("<s>")
    stream = TextStream(tokenizer, [1])
    tokens = [2, special, special, 5, 6]
    assert "".join(stream.feed(token) for token in tokens) == " cat on mat"
    for cut in range(len(tokens)):
        stream = TextStream(tokenizer, [1])
        assert stream.feed_all(tokens[:cut]) + stream.feed_all(tokens[cut:]) == " cat on mat"


@settings(max_examples=500, deadline=None)
@given(
    pieces=st.lists(st.text("ab", max_size=4), max_size=12),
    stops=st.lists(st.text("ab", min_size=1, max_size=5), max_size=3),
)
def test_a_stop_string_cuts_wherever_the_pieces_are_cut(
    pieces: list[str], stops: list[str]
) -> None:
    whole = "".join(pieces)
    checker = StopStrings(stops)
    said, stopped = "", False
    for piece in pieces:
        new, stopped = checker.feed(piece)
        said += new
        if stopped:
            break
    if not stopped:
        said += checker.flush()
    # When the first stop string completes, the text ends before the one that begins first.
    ends = [whole.find(stop) + len(stop) for stop in stops if stop in whole]
    assert stopped == bool(ends)
    if not stopped:
        assert said == whole
    else:
        assert whole.startswith(said)
        assert not any(stop in said for stop in stops)
        assert any(whole.startswith(said + stop) for stop in stops)


@pytest.mark.parametrize("stops", [[], [""]])
def test_without_stop_strings_nothing_is_held_back(stops: list[str]) -> None:
    assert StopStrings(stops).feed("abc") == ("abc", False)


@given(
    text=st.text(alphabet="abc", max_size=24),
    stops=st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=3),
    skipped=st.integers(0, 10),
    cuts=st.lists(st.integers(1, 4), min_size=1),
    include=st.booleans(),
)
def test_stop_strings_count_from_where_they_are_looked_for(
    text: str, stops: list[str], skipped: int, cuts: list[int], include: bool
) -> None:
    """One that ends in what was skipped is none; one that ends after it is, wherever it began."""
    skipped = min(skipped, len(text))
    ends = {
        (text.find(stop, start), stop)
        for stop in stops
        for start in [max(0, skipped - len(stop) + 1)]
        if text.find(stop, start) >= 0
    }
    searching = StopStrings(stops, include)
    said = "".join(searching.skip(character) for character in text[:skipped])
    at, turn, stopped = skipped, 0, False
    while at < len(text) and not stopped:
        piece = text[at : at + cuts[turn % len(cuts)]]
        at, turn = at + len(piece), turn + 1
        new, stopped = searching.feed(piece)
        said += new
    if not stopped:
        said += searching.flush()
    assert stopped == bool(ends)
    if ends and len({len(stop) for stop in stops}) == 1:  # else pieces decide which is found first
        place, stop = min(ends)
        expected = text[: place + len(stop) * include]
        assert said == max(expected, text[:skipped], key=len)
    elif not ends:
        assert said == text
