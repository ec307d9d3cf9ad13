"""The tasks of the demo checkpoint: prompts, right answers, and the check of an output.

| task    | prompt                                           | answer               |
| ------- | ------------------------------------------------ | -------------------- |
| add     | `17+25=`                                         | `42`                 |
| recall  | `recall: river=417, apple=082, stone=553; apple=` | `082`               |
| copy    | `copy: apple river stone =>`                     | ` apple river stone` |
| reverse | `reverse: apple river stone =>`                  | ` stone river apple` |
| story   | `Once upon a time, there was a girl named Mia.`  | a grammatical rest   |

After its answer the model emits an end-of-text token (`<|im_end|>` in a chat turn), so an output
that is stopped by the model equals the answer. The same prompts work as the user's turn of a chat.

Everything is a pure function of a seed, and the standard library is all that is imported: tests
and benchmarks of a running server use this module without the packages that training needs.
"""

from __future__ import annotations

import string
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal, get_args

Task = Literal["add", "recall", "copy", "reverse", "story"]
TASKS: tuple[Task, ...] = get_args(Task)

_WORDS = """
    acorn actor alarm album alley amber angel ankle apple april apron arch arena arm arrow ash atlas
    aunt baby back bacon badge bag baker ball band bank bar bark base basil bat bath bay beach bead
    beak beam bean bear beard beast bed bee beef beet bell belt bench berry bike bird blade block
    blue board boat body bolt bone book boot bowl box boy brass bread brick brook broom brown brush
    bug bulb bull bunny bus bush cabin cable cage cake calf camel camp can canal candy canoe cap
    cape car card cart cat cave cedar chain chair chalk cheek chess chest chin city clam claw clay
    cliff clock cloth cloud club coal coast coat cobra coin color comb comet cook coral cord cork
    corn couch cow crab crane cream creek crew crow crown cube cup dad daisy dance dawn day deck
    deer desk dial dice dish dock dog doll dome door dot dream dress drum duck dune dust eagle ear
    earth east echo edge egg elbow elf eye face fair fan farm fence fern ferry field fig fire fish
    flag flame flash flock floor flour flute fly foam fog food foot fork fort fox frame frog frost
    fruit fur game gate gem ghost giant gift girl glass globe glove glue goat gold goose grain grape
    grass green grove guest hail hall hand harp hat hawk hay hazel head heart hedge hen herb hero
    hill home honey hood hook horn horse hotel hour house hut ice inch iron ivory ivy jam jar jaw
    jeans jelly jewel jug juice keel key king kite knee knife knot lace lady lake lamb lamp land
    lawn leaf leg lemon lens lid light lily lime line lion lip lock log lotus lunch mail mango map
    maple march mask mast mat meal medal melon metal mile milk mill mint mist moat mole month moon
    moose moss moth motor mouse mouth mud mug music nail neck needle nest net night noodle north
    nose nut oak oar oasis oat ocean olive onion opal orange orchid otter oven owl oyster page paint
    palace palm pan panda paper park parrot path paw pea peach peak pear pearl pebble pen pencil
    penny pepper piano pig pigeon pillow pin pine pink pipe pirate pizza planet plant plate plum
    pocket poem pond pony pool poppy port pot potato prince puppy purple quail quartz queen quilt
    rabbit radio raft rail rain raven red reef ribbon rice ring river road robin robot rock roof
    room root rope rose ruby rug sail salad salmon salt sand sauce school sea seal seed shark sheep
    shell ship shirt shoe shore silk silver sink sister sky smoke snail snake snow soap sock sofa
    soil soup spice spider spoon spring squid star steam steel stem step stone storm stove straw
    street sugar suit summer sun swan table tail tea tent thread throne thumb tide tiger toast tooth
    torch towel tower town toy trail train tree tulip tuna turkey turtle valley vase vest vine
    violin wagon wall walnut water wave whale wheat wheel window wing winter wolf wood wool yard
    yarn zebra
"""
WORDS: tuple[str, ...] = tuple(_WORDS.split())
"""Each is one token when a space precedes it; the tokenizer's builder checks that."""

MAX_OPERAND = 99
"""The largest number that `add` adds."""

HELD_OUT_SHARE = 10
"""One in this many unordered pairs of operands is held out of training."""

MAX_WORDS = 12
"""The most words that copy and reverse are trained on."""

MAX_ANSWER_TOKENS = 96
"""Enough new tokens for the longest answer of any task, its end token included."""


@dataclass(frozen=True)
class Example:
    """A prompt and its answer; for a story the answer is one of many right ones."""

    task: Task
    prompt: str
    answer: str


def chat_text(prompt: str) -> str:
    """Render one user turn as the checkpoint's chat template does, ready to be answered."""
    return f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"


# --- addition ---------------------------------------------------------------------------------


def is_held_out(a: int, b: int) -> bool:
    """Whether training never sees a+b nor b+a."""
    pair = f"{min(a, b)}+{max(a, b)}".encode()
    return zlib.crc32(pair) % HELD_OUT_SHARE == 0


def addition_pairs(*, held_out: bool) -> list[tuple[int, int]]:
    """All ordered pairs of operands on one side of the split."""
    numbers = range(MAX_OPERAND + 1)
    return [(a, b) for a in numbers for b in numbers if is_held_out(a, b) == held_out]


def addition(a: int, b: int) -> Example:
    """`17+25=` -> `42`."""
    return Example("add", f"{a}+{b}=", str(a + b))


# --- recall -----------------------------------------------------------------------------------


def recall_entries(tokens: int) -> int:
    """How many entries fill a recall prompt of at most `tokens` tokens.

    `recall:` is 2 tokens, the question `key=` is 2, an entry ` key=417,` is 6.
    """
    entries = (tokens - 4) // 6
    if not 1 <= entries <= len(WORDS):
        raise ValueError(
            f"a recall prompt of {tokens} tokens has {entries} entries; "
            f"1 to {len(WORDS)} are possible, that is 10 to {4 + 6 * len(WORDS)} tokens"
        )
    return entries


def recall(rng: Random, tokens: int) -> Example:
    """`recall: river=417, apple=082; apple=` -> `082`, with a list that fills `tokens` tokens."""
    keys = rng.sample(WORDS, recall_entries(tokens))
    values = [f"{rng.randrange(1000):03d}" for _ in keys]
    asked = rng.randrange(len(keys))
    entries = ", ".join(f"{key}={value}" for key, value in zip(keys, values, strict=True))
    return Example("recall", f"recall: {entries}; {keys[asked]}=", values[asked])


# --- copy and reverse -------------------------------------------------------------------------


def copy(rng: Random, words: int) -> Example:
    """`copy: apple river =>` -> ` apple river`."""
    chosen = " ".join(rng.sample(WORDS, words))
    return Example("copy", f"copy: {chosen} =>", f" {chosen}")


def reverse(rng: Random, words: int) -> Example:
    """`reverse: apple river =>` -> ` river apple`."""
    chosen = rng.sample(WORDS, words)
    return Example("reverse", f"reverse: {' '.join(chosen)} =>", f" {' '.join(reversed(chosen))}")


# --- story ------------------------------------------------------------------------------------

# $name is the hero's form and fixed by the opening; {slot} is chosen once and then repeated.
_STORY = (
    "Once upon a time, $opening.",
    " $She lived {home} with $her {pet}.",
    " One {time}, $she went to the {place} and found {thing.found}.",
    " The {thing.name} {thing.was} {quality}, so $she took {thing.it} home.",
    " $Her {pet} was {mood} and {reaction}.",
    " The {neighbor} said that $name $was very {virtue}.",
    " In the end, $she $was {feeling} and {ending}.",
)

_HEROES: tuple[dict[str, str], ...] = (
    {
        "opening": "there was {trait} girl named {girl}",
        "name": "{girl}",
        "she": "she",
        "She": "She",
        "her": "her",
        "Her": "Her",
        "was": "was",
    },
    {
        "opening": "there was {trait} boy named {boy}",
        "name": "{boy}",
        "she": "he",
        "She": "He",
        "her": "his",
        "Her": "His",
        "was": "was",
    },
    {
        "opening": "there were {traits} friends named {girl} and {boy}",
        "name": "{girl} and {boy}",
        "she": "they",
        "She": "They",
        "her": "their",
        "Her": "Their",
        "was": "were",
    },
)


def _thing(found: str, *, plural: bool = False) -> dict[str, str]:
    verb, pronoun = ("were", "them") if plural else ("was", "it")
    return {"found": found, "name": found.split()[-1], "was": verb, "it": pronoun}


def _plain(*texts: str) -> tuple[dict[str, str], ...]:
    return tuple({"": text} for text in texts)


_SLOTS: dict[str, tuple[dict[str, str], ...]] = {
    "girl": _plain("Mia", "Anna", "Lily", "Emma", "Rosa", "Nora", "Ella", "Zoe", "Ida", "Clara"),
    "boy": _plain("Tom", "Ben", "Max", "Leo", "Sam", "Noah", "Oscar", "Paul", "Finn", "Hugo"),
    "trait": _plain("a", "a kind", "a brave", "a clever", "a quiet", "an honest", "an eager"),
    "traits": _plain("two", "two kind", "two brave", "two clever", "two quiet", "two honest"),
    "home": _plain(
        *("in a small house", "on an old farm", "near the river", "by the sea", "in a tall tower"),
        *("in the mountains", "at the edge of the forest", "in an old mill"),
    ),
    "pet": _plain("dog", "cat", "goat", "horse", "duck", "rabbit", "owl", "mouse"),
    "time": _plain("morning", "day", "evening", "summer", "winter", "afternoon"),
    "place": _plain("market", "forest", "beach", "lake", "garden", "school", "harbor", "hill"),
    "thing": (
        *map(_thing, ("a red ball", "an old map", "a silver bell", "an empty basket")),
        *map(_thing, ("a golden key", "an orange kite", "a warm blanket", "a wooden boat")),
        _thing("three green apples", plural=True),
        _thing("two blue feathers", plural=True),
        _thing("some white shells", plural=True),
        _thing("four shiny coins", plural=True),
    ),
    "quality": _plain(
        "pretty", "very light", "wonderful", "very clean", "lovely", "as good as new"
    ),
    "mood": _plain("happy", "curious", "excited", "surprised", "glad", "proud"),
    "reaction": _plain(
        *("ran around the garden", "jumped up and down", "slept by the fire", "began to sing"),
        *("danced in the kitchen", "followed everyone around"),
    ),
    "neighbor": _plain("baker", "farmer", "teacher", "doctor", "painter", "sailor"),
    "virtue": _plain("kind", "lucky", "clever", "brave", "generous", "careful"),
    "feeling": _plain("happy", "tired", "hungry", "thankful", "calm", "sleepy"),
    "ending": _plain(
        *("went to bed", "ate some warm soup", "sat under the stars", "told everyone the story"),
        *("wrote a long letter", "slept very well"),
    ),
}


@dataclass(frozen=True)
class _Piece:
    """A literal text (no slot), or a field of what a slot is bound to."""

    text: str
    slot: str = ""


def _parse(template: str) -> Iterator[_Piece]:
    for literal, name, _, _ in string.Formatter().parse(template):
        if literal:
            yield _Piece(literal)
        if name:
            slot, _, field = name.partition(".")
            yield _Piece(field, slot)


def _hero_template(sentences: Sequence[str], hero: Mapping[str, str]) -> tuple[_Piece, ...]:
    return tuple(_parse(string.Template("".join(sentences)).substitute(hero)))


_TEMPLATES = tuple(_hero_template(_STORY, hero) for hero in _HEROES)


def story(rng: Random) -> str:
    """Tell a whole story of seven sentences."""
    bound: dict[str, dict[str, str]] = {}
    texts: list[str] = []
    for piece in rng.choice(_TEMPLATES):
        if piece.slot and piece.slot not in bound:
            bound[piece.slot] = rng.choice(_SLOTS[piece.slot])
        texts.append(bound[piece.slot][piece.text] if piece.slot else piece.text)
    return "".join(texts)


def split_story(text: str, sentences: int) -> Example:
    """Ask for what follows the first `sentences` sentences of a story."""
    end = -1
    for _ in range(sentences):
        end = text.index(".", end + 1)
    return Example("story", text[: end + 1], text[end + 1 :])


def is_grammatical(text: str, *, complete: bool = False) -> bool:
    """Whether `text` is the beginning of a story (a whole one if `complete`).

    It accepts exactly what the templates produce: pronouns, verbs and repeated names must agree.
    """
    return any(_matches(pieces, text, {}, complete) for pieces in _TEMPLATES)


def _matches(
    pieces: Sequence[_Piece], text: str, bound: Mapping[str, dict[str, str]], complete: bool
) -> bool:
    if not text:
        return not (complete and pieces)
    if not pieces:
        return False
    piece, rest = pieces[0], pieces[1:]
    if not piece.slot:
        return _continues(piece.text, rest, text, bound, complete)
    options = (bound[piece.slot],) if piece.slot in bound else _SLOTS[piece.slot]
    return any(
        _continues(option[piece.text], rest, text, {**bound, piece.slot: option}, complete)
        for option in options
    )


def _continues(
    expected: str,
    rest: Sequence[_Piece],
    text: str,
    bound: Mapping[str, dict[str, str]],
    complete: bool,
) -> bool:
    if text.startswith(expected):
        return _matches(rest, text[len(expected) :], bound, complete)
    return not complete and expected.startswith(text)


# --- evaluation -------------------------------------------------------------------------------


def evaluation_set(task: Task, count: int, seed: int = 0, *, tokens: int = 256) -> list[Example]:
    """`count` examples that training has not seen; `tokens` is the length of recall prompts."""
    rng = Random(f"evaluation/{task}/{seed}")
    if task == "add":
        return [addition(a, b) for a, b in _sample_held_out(rng, count)]
    if task == "recall":
        return [recall(rng, tokens) for _ in range(count)]
    if task == "copy":
        return [copy(rng, rng.randint(3, 10)) for _ in range(count)]
    if task == "reverse":
        return [reverse(rng, rng.randint(3, 10)) for _ in range(count)]
    if task == "story":
        return [split_story(story(rng), rng.randint(1, 3)) for _ in range(count)]
    raise ValueError(f"task {task!r} is none of {', '.join(TASKS)}")


def _sample_held_out(rng: Random, count: int) -> list[tuple[int, int]]:
    pairs = addition_pairs(held_out=True)
    if count > len(pairs):
        raise ValueError(f"{count} sums asked for; {len(pairs)} pairs are held out of training")
    return rng.sample(pairs, count)


def is_correct(example: Example, output: str, *, truncated: bool = False) -> bool:
    """Whether `output`, without special tokens, answers the example's prompt.

    With `truncated` (a token limit cut the output) the beginning of an answer is enough.
    """
    if example.task == "story":
        return bool(output) and is_grammatical(example.prompt + output, complete=not truncated)
    if truncated:
        return bool(output) and example.answer.startswith(output)
    return output == example.answer
