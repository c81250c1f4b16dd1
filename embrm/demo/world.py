"""A synthetic preference world with known gold rewards and a known annotation error.

Prompts are short tasks in a language of about two hundred words. Six simulated response models
answer them, each with its own error rates, verbosity and politeness; two more occur only in
evaluation. The gold reward of a response is a function of prompt and response (`gold`):

    gold = 1.5·right + work + 0.75·form + 0.75·polite - 0.03·words

    right   1 if the answer equals the solution of the task, else 0
    work    (true - false statements) / max(1, statements), in [-1, 1]
    form    1 if the answer is given in one sentence "the answer is …", else 0
    polite  1 if the response has a polite sentence, else 0
    words   number of words, full stops included

The training annotator prefers response a to b with probability sigmoid(z),

    z = q·(gold_a - gold_b)/sd(gold) + b·(words_a - words_b)/sd(words),

which is the noisy annotator of arXiv 2502.04357 with an added preference for length, so that
"longer is better" is a shortcut in training. Evaluation pairs have gold labels. Results describe
this toy world, not language models in general.

All texts are functions of the seed. Random numbers are taken from the raw output of counter-based
Philox streams, one for each name, so they depend neither on the order of generation nor on the
version of numpy's distributions.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from statistics import pstdev
from typing import Any, TypeVar

from embrm.core.files import write_bytes
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


# ---- tasks -------------------------------------------------------------------------------------

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


_SOLVERS: dict[str, Callable[[list[str], Stream | None], Attempt]] = {
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
    return _SOLVERS[skill](words, slip)


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
    start = next(index for index, word in enumerate(words) if word in _SOLVERS)
    return " ".join(words[start:])


def for_evaluation(task: str) -> bool:
    """Whether a task is reserved for evaluation: two in five are, by hash, in every world."""
    return hashlib.sha256(task.encode()).digest()[0] % 5 < 2


# ---- responses ---------------------------------------------------------------------------------

POLITE = (
    "hello friend",
    "glad to help you",
    "thanks for asking",
    "i hope this helps",
    "have a lovely day",
)
FILLER = (
    "let me think about it for a moment",
    "this is a very interesting question indeed",
    "many people wonder about this",
    "there is much to say here",
    "as everyone knows we must be careful",
    "it is good to look at it twice",
    "i know a lot about such things",
    "of course this takes some time",
)


@dataclass(frozen=True)
class ResponseModel:
    """How a simulated model answers. All fields except `fillers` and `weak` are probabilities."""

    slip: float
    """Probability of a wrong answer."""
    works: float
    """Probability of stating the steps."""
    polite: float
    """Probability of a polite sentence, at the start and again at the end."""
    loose: float
    """Probability of "… i guess" instead of "the answer is …"."""
    fillers: tuple[int, int]
    """Smallest and largest number of sentences without content."""
    careless: float = 0.1
    """Probability of steps from a wrong attempt, whether or not the answer is right."""
    weak: Mapping[str, float] = field(default_factory=dict)
    """Probability of a wrong answer for single skills, in place of `slip`."""


MODELS = {
    "scholar": ResponseModel(slip=0.12, works=0.9, polite=0.4, loose=0.05, fillers=(0, 1)),
    "brief": ResponseModel(slip=0.2, works=0.1, polite=0.1, loose=0.2, fillers=(0, 0)),
    "chatty": ResponseModel(slip=0.3, works=0.6, polite=0.9, loose=0.1, fillers=(1, 3)),
    "windbag": ResponseModel(slip=0.65, works=0.5, polite=0.4, loose=0.2, fillers=(3, 5)),
    "rookie": ResponseModel(slip=0.55, works=0.4, polite=0.5, loose=0.5, fillers=(0, 1)),
    "poet": ResponseModel(
        slip=0.15,
        works=0.5,
        polite=0.6,
        loose=0.3,
        fillers=(0, 2),
        weak={"compute": 0.7, "write": 0.6, "largest": 0.6},
    ),
}
"""The models of the training pairs and of the language model's corpus."""

NEWCOMERS = {
    "courtier": ResponseModel(slip=0.5, works=0.2, polite=1.0, loose=0.1, fillers=(2, 4)),
    "monk": ResponseModel(slip=0.25, works=0.5, polite=0.0, loose=0.5, fillers=(0, 0)),
}
"""Models that occur only in the split ood/model."""


def respond(task: str, model: ResponseModel, stream: Stream) -> str:
    """Draw a response of `model`: sentences, each ending in a full stop."""
    skill = task.split()[0]
    slips = stream.chance(model.weak.get(skill, model.slip))
    attempt = solve(task, stream if slips else None)
    work = solve(task, stream).work if stream.chance(model.careless) else attempt.work
    low, high = model.fillers
    fillers = stream.sample(FILLER, low + stream.below(high - low + 1))
    cut = stream.below(len(fillers) + 1)
    sentences = [stream.pick(POLITE[:3])] if stream.chance(model.polite) else []
    sentences += fillers[:cut]
    sentences += work if stream.chance(model.works) else ()
    loose = stream.chance(model.loose)
    sentences.append(f"{attempt.answer} i guess" if loose else f"the answer is {attempt.answer}")
    sentences += fillers[cut:]
    sentences += [stream.pick(POLITE[3:])] if stream.chance(model.polite) else []
    return " ".join(f"{sentence} ." for sentence in sentences)


@dataclass(frozen=True)
class Grade:
    """The terms of the gold reward, which are defined at the top of this module."""

    right: bool
    work: float
    form: bool
    polite: bool
    words: int

    @property
    def gold(self) -> float:
        return (
            1.5 * self.right + self.work + 0.75 * self.form + 0.75 * self.polite - 0.03 * self.words
        )


def grade(prompt: str, response: str) -> Grade:
    """Determine the terms of the gold reward from the texts alone."""
    task = task_of(prompt)
    solution = solve(task)
    sentences = _sentences(response)
    answers = [answer for s in sentences if (answer := _answer(s)) is not None]
    truths = [truth for s in sentences if (truth := _truth(s, solution)) is not None]
    return Grade(
        right=answers == [solution.answer],
        work=sum(1 if truth else -1 for truth in truths) / max(1, len(truths)),
        form=sum(sentence.startswith(_PROPER) for sentence in sentences) == 1,
        polite=any(sentence in POLITE for sentence in sentences),
        words=len(response.split()),
    )


def gold(prompt: str, response: str) -> float:
    """The gold reward of a response, by the formula at the top of this module."""
    return grade(prompt, response).gold


def _sentences(response: str) -> list[str]:
    return [sentence.strip() for sentence in response.split(" .") if sentence.strip()]


_PROPER, _LOOSE = "the answer is ", " i guess"


def _answer(sentence: str) -> str | None:
    """The answer that a sentence gives, or None."""
    if sentence.startswith(_PROPER):
        return sentence.removeprefix(_PROPER)
    return sentence.removesuffix(_LOOSE) if sentence.endswith(_LOOSE) else None


_SUM = re.compile(r"(\d+) (plus|minus) (\d+) is (\d+)")
_ABOVE = re.compile(r"(\d+) is above (\d+)")
_CLAIM = re.compile(r"\w+ comes (first|last|\d+ times)|\w+ is \w+|to \w+ is \w+")


def _truth(sentence: str, solution: Attempt) -> bool | None:
    """Whether a statement about the task is true, or None for any other sentence."""
    if found := _SUM.fullmatch(sentence):
        left, right, result = int(found[1]), int(found[3]), int(found[4])
        return result == (left + right if found[2] == "plus" else left - right)
    if found := _ABOVE.fullmatch(sentence):
        return int(found[1]) > int(found[2])
    if _CLAIM.fullmatch(sentence):
        return sentence in solution.work
    return None


# ---- annotator and files -----------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """Sizes of a world and its annotator. The defaults are the demo's."""

    seed: int = 0
    train_prompts: int = 900
    pairs_per_prompt: int = 4
    evaluation_prompts: int = 200
    group_prompts: int = 120
    q: float = 2.0
    """Quality of the annotator, in logits a standard deviation of gold."""
    length_bias: float = 0.7
    """Preference of the annotator for length, in logits a standard deviation of words."""


def utility(gold_gap: float, words_gap: float, world: World, sd: tuple[float, float]) -> float:
    """The annotator's logit z for a pair. sd: standard deviations of gold and of words."""
    return world.q * gold_gap / sd[0] + world.length_bias * words_gap / sd[1]


def prompts(world: World) -> dict[str, list[tuple[str, str]]]:
    """Draw (skill, prompt) for every split, with the skills in turn. No task occurs twice."""
    wanted = {
        "train": (SKILLS, world.train_prompts),
        "id": (SKILLS, world.evaluation_prompts),
        "ood-skill": (UNSEEN, world.evaluation_prompts),
        "ood-model": (SKILLS, world.evaluation_prompts),
        "ood-length": (SKILLS, world.evaluation_prompts),
        "groups": (SKILLS, world.group_prompts),
    }
    seen: set[str] = set()
    found: dict[str, list[tuple[str, str]]] = {}
    for split, (skills, count) in wanted.items():
        stream = Stream(world.seed, "prompts", split)
        found[split] = []
        while len(found[split]) < count:
            skill = skills[len(found[split]) % len(skills)]
            task = draw_task(skill, stream)
            if for_evaluation(task) == (split != "train") and task not in seen:
                seen.add(task)
                found[split].append((skill, f"{stream.pick(LEADS)} {task}".strip()))
    return found


@dataclass(frozen=True)
class Conversation:
    """A document of the corpus. An exercise has no prompt; an empty mark means no mark."""

    prompt: str
    text: str
    mark: str


def corpus(world: World, count: int) -> Iterator[Conversation]:
    """Draw the language model's training text: conversations and exercises on training tasks.

    A conversation has a response of a training model. In four of five cases a mark after it says
    whether its answer is right, and half of its statements are followed by a mark of their own. An
    exercise has eight statements, each with a mark; most come from wrong attempts. The corpus thus
    carries information about truth, as natural text does, and none about gold rewards, form,
    politeness, length or annotations.
    """
    stream = Stream(world.seed, "corpus")
    models = list(MODELS.values())
    for _ in range(count):
        if stream.chance(0.5):
            yield Conversation("", " ".join(_exercise(stream) for _ in range(8)), "")
            continue
        task = _training_task(SKILLS + UNSEEN, stream)
        prompt = f"{stream.pick(LEADS)} {task}".strip()
        response = respond(task, stream.pick(models), stream)
        mark = _mark(grade(prompt, response).right) if stream.chance(0.8) else ""
        solution = solve(task)
        copy = []
        for sentence in _sentences(response):
            answer = _answer(sentence)
            true = _truth(sentence, solution) if answer is None else answer == solution.answer
            marked = true is not None and stream.chance(0.5)
            copy.append(f"{sentence} {_mark(true is True)} ." if marked else f"{sentence} .")
        yield Conversation(prompt, " ".join(copy), mark)


def _training_task(skills: Sequence[str], stream: Stream) -> str:
    while for_evaluation(task := draw_task(stream.pick(skills), stream)):
        pass
    return task


def _exercise(stream: Stream) -> str:
    """A statement that can be judged without its task, with its mark."""
    task = _training_task(("compute", "colours", "may", "largest"), stream)
    claim = stream.pick(solve(task, stream if stream.chance(0.7) else None).work)
    return f"{claim} {_mark(_truth(claim, solve(task)) is True)} ."


def _mark(right: bool) -> str:
    return "tick" if right else "cross"


def vocabulary() -> list[str]:
    """All words that can occur in the world, sorted."""
    lists = [*POLITE, *FILLER, *LEADS, *LETTERS, *THINGS, *PLACES, *JOINERS, *HARMFUL, *HARMLESS]
    lists += [*COLOURS, *COLOUR_OF, *_SOLVERS, *(str(number) for number in range(40))]
    sentences = (
        "plus minus is comes first last times to harmful harmless above and of with "
        "may i a at the no yes answer guess tick cross ."
    )
    return sorted({word for entry in [*lists, sentences] for word in entry.split()})


@dataclass(frozen=True)
class _Answer:
    model: str
    text: str
    gold: float
    words: int


def _answers(seed: int, prompt: str, models: Mapping[str, ResponseModel]) -> list[_Answer]:
    answers = []
    for name, model in models.items():
        text = respond(task_of(prompt), model, Stream(seed, "response", prompt, name))
        found = grade(prompt, text)
        answers.append(_Answer(name, text, found.gold, found.words))
    return answers


def _row(prompt: str, skill: str, chosen: _Answer, rejected: _Answer) -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": prompt}],
        "chosen": [{"role": "assistant", "content": chosen.text}],
        "rejected": [{"role": "assistant", "content": rejected.text}],
        "chosen_model": chosen.model,
        "rejected_model": rejected.model,
        "subset": skill,
    }


def _train_rows(
    world: World, asked: list[tuple[str, str]]
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Training pairs with noisy labels, and the annotator's expected and actual error rate."""
    answers = [_answers(world.seed, prompt, MODELS) for _, prompt in asked]
    sd = (
        pstdev(answer.gold for group in answers for answer in group),
        pstdev(answer.words for group in answers for answer in group),
    )
    rows = []
    wrong, expected, judged = 0, 0.0, 0
    for (skill, prompt), group in zip(asked, answers, strict=True):
        stream = Stream(world.seed, "annotator", prompt)
        options = [pair for pair in combinations(group, 2) if pair[0].text != pair[1].text]
        for a, b in stream.sample(options, min(world.pairs_per_prompt, len(options))):
            z = utility(a.gold - b.gold, a.words - b.words, world, sd)
            felt = z + stream.logistic()  # P(felt > 0) = sigmoid(z)
            chosen, rejected = (a, b) if felt > 0 else (b, a)
            rows.append({**_row(prompt, skill, chosen, rejected), "margin": round(abs(felt), 3)})
            if a.gold != b.gold:
                judged += 1
                wrong += chosen.gold < rejected.gold
                expected += 1 / (1 + math.exp(z if a.gold > b.gold else -z))
    return rows, {
        "sd_gold": sd[0],
        "sd_words": sd[1],
        "label_error_expected": expected / judged,
        "label_error": wrong / judged,
    }


def _gold_rows(
    world: World, asked: list[tuple[str, str]], admits: Callable[[_Answer, _Answer], bool]
) -> list[dict[str, Any]]:
    """Up to three pairs a prompt, labelled by gold, that `admits` accepts (better, worse)."""
    rows = []
    for skill, prompt in asked:
        group = _answers(world.seed, prompt, MODELS | NEWCOMERS)
        ordered = [(a, b) if a.gold > b.gold else (b, a) for a, b in combinations(group, 2)]
        options = [pair for pair in ordered if pair[0].gold > pair[1].gold and admits(*pair)]
        stream = Stream(world.seed, "pairs", prompt)
        for better, worse in stream.sample(options, min(3, len(options))):
            rows.append(_row(prompt, skill, better, worse))
    return rows


def _group_rows(world: World, asked: list[tuple[str, str]]) -> list[dict[str, Any]]:
    """The answers of all training models to held-out prompts, with their gold rewards."""
    rows = []
    for skill, prompt in asked:
        for answer in _answers(world.seed, prompt, MODELS):
            rows.append(
                {
                    "prompt": [{"role": "user", "content": prompt}],
                    "response": [{"role": "assistant", "content": answer.text}],
                    "model": answer.model,
                    "gold": round(answer.gold, 6),
                    "subset": skill,
                }
            )
    return rows


def make_world(out: Path, world: World) -> None:
    """Write the world's files below `out`; the same `world` gives the same bytes.

    train.jsonl           labels of the noisy annotator; column `margin`: felt strength, in logits
    id.jsonl              gold labels, new prompts, same skills and models
    ood-skill.jsonl       gold labels, a new skill and harder instances
    ood-model.jsonl       gold labels, at least one answer by a model that training never saw
    ood-length.jsonl      gold labels, the better answer is the shorter one
    groups.jsonl          prompt, model, response and gold reward, of new prompts
    world.json            the settings, the annotator's expected and actual error rate
    """

    def known(*pair: _Answer) -> bool:
        return all(answer.model in MODELS for answer in pair)

    asked = prompts(world)
    train, annotator = _train_rows(world, asked["train"])
    files = {
        "train": train,
        "id": _gold_rows(world, asked["id"], known),
        "ood-skill": _gold_rows(world, asked["ood-skill"], known),
        "ood-model": _gold_rows(world, asked["ood-model"], lambda *pair: not known(*pair)),
        "ood-length": _gold_rows(
            world, asked["ood-length"], lambda a, b: known(a, b) and a.words < b.words
        ),
        "groups": _group_rows(world, asked["groups"]),
    }
    for name, rows in files.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        write_bytes(out / f"{name}.jsonl", lines.encode())
    settings = {**asdict(world), **{name: round(value, 6) for name, value in annotator.items()}}
    write_bytes(out / "world.json", (json.dumps(settings, indent=1) + "\n").encode())
