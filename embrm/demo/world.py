"""A synthetic preference world with known gold rewards and a known annotation error.

Prompts are short tasks in a language of about two hundred words. Six simulated response models
answer them, each with its own error rates, verbosity and politeness; two more occur only in
evaluation. The gold reward of a response is a function of prompt and response (`responses.gold`):

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

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from statistics import pstdev
from typing import Any

from embrm.core.files import write_bytes
from embrm.demo.responses import (
    FILLER,
    MODELS,
    NEWCOMERS,
    POLITE,
    ResponseModel,
    answer_in,
    grade,
    respond,
    sentences_of,
    truth_of,
)
from embrm.demo.tasks import (
    COLOUR_OF,
    COLOURS,
    HARMFUL,
    HARMLESS,
    JOINERS,
    LEADS,
    LETTERS,
    PLACES,
    SKILLS,
    SOLVERS,
    THINGS,
    UNSEEN,
    Stream,
    draw_task,
    for_evaluation,
    solve,
    task_of,
)


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
        for sentence in sentences_of(response):
            answer = answer_in(sentence)
            true = truth_of(sentence, solution) if answer is None else answer == solution.answer
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
    return f"{claim} {_mark(truth_of(claim, solve(task)) is True)} ."


def _mark(right: bool) -> str:
    return "tick" if right else "cross"


def vocabulary() -> list[str]:
    """All words that can occur in the world, sorted."""
    lists = [*POLITE, *FILLER, *LEADS, *LETTERS, *THINGS, *PLACES, *JOINERS, *HARMFUL, *HARMLESS]
    lists += [*COLOURS, *COLOUR_OF, *SOLVERS, *(str(number) for number in range(40))]
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
