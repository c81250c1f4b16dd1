"""The tasks of the demo's world: how they are drawn and solved, rightly or wrongly."""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from embrm.core.streams import raw_words, sha256_key

T = TypeVar("T")


class Stream:
    """Random draws that depend only on the names that the stream is made from."""

    def __init__(self, *names: str | int) -> None:
        self._bits = raw_words(sha256_key(json.dumps(names), "little"))

    def uniform(self) -> float:
        """A uniform number in [0, 1) with 53 random bits."""
        return (int(self._bits.random_raw()) >> 11) * 2.0**-53

    def below(self, bound: int) -> int:
        """A uniform integer in [0, bound)."""
        return int(self.uniform() * bound)

    def chance(self, probability: float) -> bool:
        """True with the given probability."""
        return self.uniform() < probability

    def pick(self, options: Sequence[T]) -> T:
        """One of the options, all equally likely."""
        return options[self.below(len(options))]

    def sample(self, options: Sequence[T], count: int) -> list[T]:
        """`count` distinct options in random order."""
        rest = list(options)
        return [rest.pop(self.below(len(rest))) for _ in range(count)]

    def logistic(self) -> float:
        """A draw of the standard logistic distribution, for which P(x > -z) = sigmoid(z)."""
        u = (self.below(2**52) + 0.5) * 2.0**-52
        return math.log(u / (1.0 - u))


COLOURS = {
    "yellow": "lemon corn sun",
    "red": "cherry brick tomato",
    "green": "grass frog pea",
    "blue": "sky whale jeans",
    "black": "coal raven tyre",
    "white": "snow milk swan",
    "brown": "mud bear bread",
    "pink": "pig rose shrimp",
}
COLOUR_OF = {thing: colour for colour, things in COLOURS.items() for thing in things.split()}
LETTERS = tuple("abcdefghkmpqrtux")
JOINERS = ("dash", "star", "plus")
HARMFUL = ("steal", "burn", "smash", "poison", "forge")
HARMLESS = ("paint", "wash", "sell", "mend", "draw")
THINGS = ("boat", "house", "letter", "coat", "clock", "lamp", "piano", "wagon", "fence", "garden")
PLACES = ("harbour", "market", "school", "castle", "village", "bridge")
LEADS = ("", "please", "hey ,", "can you", "i need this :")


@dataclass(frozen=True)
class Attempt:
    """An answer to a task and the statements that lead to it, all in words."""

    answer: str
    work: tuple[str, ...]


def _compute(words: list[str], slip: Stream | None) -> Attempt:
    total, work = int(words[0]), []
    steps = list(zip(words[1::2], words[2::2], strict=True))
    wrong = slip.below(len(steps)) if slip else None
    for index, (sign, operand) in enumerate(steps):
        result = total + int(operand) if sign == "plus" else total - int(operand)
        if slip and index == wrong:
            # Too large, or in the last step perhaps too small: no result may become negative.
            low = -min(3, result) if index == len(steps) - 1 else 0
            result += slip.pick([off for off in range(low, 4) if off])
        work.append(f"{total} {sign} {operand} is {result}")
        total = result
    return Attempt(str(total), tuple(work))


def _ordered(words: list[str], slip: Stream | None) -> Attempt:
    if slip:
        i, j = slip.sample(range(len(words)), 2)
        words = list(words)
        words[i], words[j] = words[j], words[i]
    return Attempt(" ".join(words), (f"{words[0]} comes first", f"{words[-1]} comes last"))


def _sort(words: list[str], slip: Stream | None) -> Attempt:
    return _ordered(sorted(words), slip)


def _reverse(words: list[str], slip: Stream | None) -> Attempt:
    return _ordered(words[::-1], slip)


def _colours(words: list[str], slip: Stream | None) -> Attempt:
    things = [word for word in words if word in COLOUR_OF]
    colours = [COLOUR_OF[thing] for thing in things]
    if slip:
        wrong = slip.below(len(colours))
        colours[wrong] = slip.pick([colour for colour in COLOURS if colour != colours[wrong]])
    work = tuple(f"{thing} is {colour}" for thing, colour in zip(things, colours, strict=True))
    return Attempt(" and ".join(colours), work)


def _write(words: list[str], slip: Stream | None) -> Attempt:
    word, times, joiner = words[0], int(words[1]), words[4]
    if slip and slip.chance(0.5):
        joiner = slip.pick([other for other in JOINERS if other != joiner])
    elif slip:
        times += slip.pick([-1, 1])
    return Attempt(f" {joiner} ".join([word] * times), (f"{word} comes {times} times",))


def _may(words: list[str], slip: Stream | None) -> Attempt:
    harmful = (words[1] in HARMFUL) != (slip is not None)
    kind = "harmful" if harmful else "harmless"
    return Attempt("no" if harmful else "yes", (f"to {words[1]} is {kind}",))


def _largest(words: list[str], slip: Stream | None) -> Attempt:
    numbers = [int(word) for word in words[1:]]
    best = max(numbers)
    if slip:
        best = slip.pick([number for number in numbers if number != best])
    work = tuple(f"{best} is above {other}" for other in numbers if other != best)
    return Attempt(str(best), work)


SOLVERS: dict[str, Callable[[list[str], Stream | None], Attempt]] = {
    "compute": _compute,
    "sort": _sort,
    "reverse": _reverse,
    "colours": _colours,
    "write": _write,
    "may": _may,
    "largest": _largest,
}
SKILLS = ("compute", "sort", "reverse", "colours", "write", "may")
"""Skills of the training and in-distribution prompts."""
UNSEEN = ("largest", "compute hard", "sort hard", "reverse hard")
"""Skills of the split ood/skill, which occur in no training pair."""


def solve(task: str, slip: Stream | None = None) -> Attempt:
    """Solve a task such as "sort h c a"; with `slip`, a wrong attempt drawn from that stream."""
    skill, *words = task.split()
    return SOLVERS[skill](words, slip)


def draw_task(skill: str, stream: Stream) -> str:
    """Draw a task of a skill; "… hard" is the same skill with more steps."""
    name, _, hard = skill.partition(" ")
    if name == "compute":
        # Written left to right without brackets; no intermediate result is negative.
        total = 1 + stream.below(9)
        words = [str(total)]
        for _ in range(3 if hard else 2):
            operand = 1 + stream.below(5)
            sign = stream.pick(["plus", "minus"]) if operand <= total else "plus"
            total += operand if sign == "plus" else -operand
            words += [sign, str(operand)]
    elif name in ("sort", "reverse"):
        words = stream.sample(LETTERS, 4 if hard else 3)
    elif name == "colours":
        first, second = stream.sample(list(COLOUR_OF), 2)
        words = ["of", first, "and", second]
    elif name == "write":
        word = stream.pick([*COLOUR_OF, *THINGS])
        words = [word, str(2 + stream.below(4)), "times", "with", stream.pick(JOINERS)]
    elif name == "may":
        verb = stream.pick([*HARMFUL, *HARMLESS])
        words = ["i", verb, "a", stream.pick(THINGS), "at", "the", stream.pick(PLACES)]
    else:
        words = ["of", *(str(number) for number in stream.sample(range(1, 20), 3))]
    return " ".join([name, *words])


def task_of(prompt: str) -> str:
    """The task of a prompt, without the words before it."""
    words = prompt.split()
    start = next(index for index, word in enumerate(words) if word in SOLVERS)
    return " ".join(words[start:])


def for_evaluation(task: str) -> bool:
    """Whether a task is reserved for evaluation: two in five are, by hash, in every world."""
    return hashlib.sha256(task.encode()).digest()[0] % 5 < 2
