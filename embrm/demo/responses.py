"""Simulated response models: how they answer a task, and how an answer is graded."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from embrm.demo.tasks import Attempt, Stream, solve, task_of

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
    sentences = sentences_of(response)
    answers = [answer for s in sentences if (answer := answer_in(s)) is not None]
    truths = [truth for s in sentences if (truth := truth_of(s, solution)) is not None]
    return Grade(
        right=answers == [solution.answer],
        work=sum(1 if truth else -1 for truth in truths) / max(1, len(truths)),
        form=sum(sentence.startswith(_PROPER) for sentence in sentences) == 1,
        polite=any(sentence in POLITE for sentence in sentences),
        words=len(response.split()),
    )


def gold(prompt: str, response: str) -> float:
    """The gold reward of a response, by the formula in the docstring of `embrm.demo.world`."""
    return grade(prompt, response).gold


def sentences_of(response: str) -> list[str]:
    """The sentences of a response, without their full stops."""
    return [sentence.strip() for sentence in response.split(" .") if sentence.strip()]


_PROPER, _LOOSE = "the answer is ", " i guess"


def answer_in(sentence: str) -> str | None:
    """The answer that a sentence gives, or None."""
    if sentence.startswith(_PROPER):
        return sentence.removeprefix(_PROPER)
    return sentence.removesuffix(_LOOSE) if sentence.endswith(_LOOSE) else None


_SUM = re.compile(r"(\d+) (plus|minus) (\d+) is (\d+)")
_ABOVE = re.compile(r"(\d+) is above (\d+)")
_CLAIM = re.compile(r"\w+ comes (first|last|\d+ times)|\w+ is \w+|to \w+ is \w+")


def truth_of(sentence: str, solution: Attempt) -> bool | None:
    """Whether a statement about the task is true, or None for any other sentence."""
    if found := _SUM.fullmatch(sentence):
        left, right, result = int(found[1]), int(found[3]), int(found[4])
        return result == (left + right if found[2] == "plus" else left - right)
    if found := _ABOVE.fullmatch(sentence):
        return int(found[1]) > int(found[2])
    if _CLAIM.fullmatch(sentence):
        return sentence in solution.work
    return None
