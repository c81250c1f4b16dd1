"""The synthetic world: gold is what the formula says, labels err as often as the formula says."""

import json
import math
import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embrm.demo.responses import MODELS, NEWCOMERS, ResponseModel, gold, grade, respond
from embrm.demo.tasks import SKILLS, UNSEEN, Stream, draw_task, for_evaluation, solve, task_of
from embrm.demo.world import World, corpus, make_world, prompts, utility, vocabulary

SMALL = World(train_prompts=90, evaluation_prompts=60, group_prompts=30)
SPLITS = ("train", "id", "ood-skill", "ood-model", "ood-length")
skills = st.sampled_from(SKILLS + UNSEEN)
seeds = st.integers(0, 10**6)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_world(folder, SMALL)
    return folder


def rows(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def text(messages: list[dict[str, str]]) -> str:
    (message,) = messages
    return message["content"]


@pytest.mark.parametrize(
    ("task", "answer", "work"),
    [
        ("compute 7 plus 5 minus 3", "9", ("7 plus 5 is 12", "12 minus 3 is 9")),
        ("sort h c q", "c h q", ("c comes first", "q comes last")),
        ("reverse h c q", "q c h", ("q comes first", "h comes last")),
        ("colours of lemon and coal", "yellow and black", ("lemon is yellow", "coal is black")),
        ("write frog 3 times with dash", "frog dash frog dash frog", ("frog comes 3 times",)),
        ("may i steal a boat at the harbour", "no", ("to steal is harmful",)),
        ("may i paint a boat at the harbour", "yes", ("to paint is harmless",)),
        ("largest of 3 18 5", "18", ("18 is above 3", "18 is above 5")),
    ],
)
def test_solutions(task: str, answer: str, work: tuple[str, ...]) -> None:
    assert (solve(task).answer, solve(task).work) == (answer, work)


@pytest.mark.parametrize(
    ("response", "value"),
    [
        # 1.5·right + work + 0.75·form + 0.75·polite - 0.03·words, by hand
        ("the answer is 9 .", 1.5 + 0 + 0.75 + 0 - 0.03 * 5),
        ("9 i guess .", 1.5 + 0 + 0 + 0 - 0.03 * 4),
        ("the answer is 8 . have a lovely day .", 0 + 0 + 0.75 + 0.75 - 0.03 * 10),
        ("7 plus 5 is 12 . 12 minus 3 is 9 . the answer is 9 .", 1.5 + 1 + 0.75 - 0.03 * 17),
        ("7 plus 5 is 11 . 11 minus 3 is 8 . the answer is 8 .", 0 + 0 + 0.75 - 0.03 * 17),
        ("7 plus 5 is 11 . the answer is 9 .", 1.5 - 1 + 0.75 - 0.03 * 11),
        ("many people wonder about this .", -0.03 * 6),
        ("the answer is 9 . 8 i guess .", 0 + 0 + 0.75 - 0.03 * 9),
    ],
)
def test_gold_by_hand(response: str, value: float) -> None:
    assert gold("hey , compute 7 plus 5 minus 3", response) == pytest.approx(value, abs=1e-12)


@given(skills, seeds)
def test_a_slip_never_gives_the_solution(skill: str, seed: int) -> None:
    stream = Stream("slip", seed)
    task = draw_task(skill, stream)
    assert solve(task, stream).answer != solve(task).answer


@given(
    skills,
    seeds,
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.integers(0, 5),
    st.booleans(),
)
def test_reading_recovers_what_the_model_did(
    skill: str,
    seed: int,
    slips: bool,
    works: bool,
    polite: bool,
    loose: bool,
    fillers: int,
    careless: bool,
) -> None:
    """Models with probabilities 0 and 1: every term is known before the text is read."""
    stream = Stream("read", seed)
    task = draw_task(skill, stream)
    model = ResponseModel(slips, works, polite, loose, (fillers, fillers), careless)
    response = respond(task, model, stream)
    found = grade(f"can you {task}", response)
    assert found.right == (not slips)
    assert (found.form, found.polite) == (not loose, polite)
    assert found.words == len(response.split())
    if not works:
        assert found.work == 0
    elif not (slips or careless):
        assert found.work == 1
    elif skill in ("compute", "colours", "may", "largest"):
        assert found.work < 1  # the other skills' statements do not cover the whole answer
    assert set(response.split()) <= set(vocabulary())


@given(skills, seeds)
def test_tasks_survive_the_lead_in(skill: str, seed: int) -> None:
    task = draw_task(skill, Stream("lead", seed))
    assert task_of(f"i need this : {task}") == task == task_of(task)


def test_same_settings_same_bytes(world: Path, tmp_path: Path) -> None:
    make_world(tmp_path, SMALL)
    names = sorted(path.name for path in world.iterdir())
    assert names == sorted(path.name for path in tmp_path.iterdir())
    assert all((world / name).read_bytes() == (tmp_path / name).read_bytes() for name in names)
    make_world(tmp_path, World(seed=1, train_prompts=90, evaluation_prompts=60, group_prompts=30))
    assert (world / "train.jsonl").read_bytes() != (tmp_path / "train.jsonl").read_bytes()


def test_streams_are_counter_based_and_stable() -> None:
    """Bits of Philox under a hashed key: written down once, so that no version may change them."""
    first = [Stream("a", 1).uniform() for _ in range(2)]
    assert first[0] == first[1] != Stream("a", 2).uniform()
    stream = Stream("demo", 0)
    assert [stream.below(1000) for _ in range(4)] == [844, 574, 643, 653]


def test_streams_are_uniform_and_logistic() -> None:
    stream = Stream("law")
    draws = 20_000
    counts = Counter(stream.below(8) for _ in range(draws))
    assert all(abs(count - draws / 8) < 5 * math.sqrt(draws / 8) for count in counts.values())
    above = sum(stream.logistic() > -1.2 for _ in range(draws)) / draws
    assert above == pytest.approx(1 / (1 + math.exp(-1.2)), abs=0.015)


def test_no_prompt_in_two_splits(world: Path) -> None:
    tasks = {name: {task_of(text(row["prompt"])) for row in rows(world, name)} for name in SPLITS}
    tasks["groups"] = {task_of(text(row["prompt"])) for row in rows(world, "groups")}
    counts = Counter(task for group in tasks.values() for task in group)
    assert max(counts.values()) == 1
    assert not any(map(for_evaluation, tasks.pop("train")))
    assert all(for_evaluation(task) for group in tasks.values() for task in group)


def test_the_corpus_holds_no_evaluation_task() -> None:
    documents = list(corpus(SMALL, 2000))
    assert len(documents) == 2000
    prompts_read = [document.prompt for document in documents if document.prompt]
    assert len(prompts_read) == pytest.approx(1000, abs=120)
    assert not any(for_evaluation(task_of(prompt)) for prompt in prompts_read)
    words = {word for d in documents for word in f"{d.prompt} {d.text} {d.mark}".split()}
    assert words <= set(vocabulary())


def test_marks_tell_true_from_false() -> None:
    """The mark behind a response repeats the grade; marks within it follow the sums."""
    ends, inner = Counter(), Counter()
    for document in corpus(SMALL, 3000):
        if document.mark:
            response = document.text.replace(" tick", "").replace(" cross", "")
            ends[document.mark, grade(document.prompt, response).right] += 1
        for a, sign, b, c, mark in re.findall(
            r"(\d+) (plus|minus) (\d+) is (\d+) (tick|cross)", document.text
        ):
            total = int(a) + int(b) if sign == "plus" else int(a) - int(b)
            inner[mark, total == int(c)] += 1
    for marks in (ends, inner):
        assert set(marks) == {("tick", True), ("cross", False)}
        assert min(marks.values()) > 100


def test_evaluation_labels_are_gold(world: Path) -> None:
    for name in SPLITS[1:]:
        for row in rows(world, name):
            prompt = text(row["prompt"])
            assert gold(prompt, text(row["chosen"])) > gold(prompt, text(row["rejected"]))


def test_each_split_is_what_its_name_says(world: Path) -> None:
    for name in SPLITS:
        found = rows(world, name)
        models = [{row["chosen_model"], row["rejected_model"]} for row in found]
        new = [bool(pair & set(NEWCOMERS)) for pair in models]
        assert all(new) if name == "ood-model" else not any(new)
        wanted = UNSEEN if name == "ood-skill" else SKILLS
        assert {row["subset"] for row in found} == set(wanted)
    for row in rows(world, "ood-length"):
        assert len(text(row["chosen"]).split()) < len(text(row["rejected"]).split())


def test_training_rewards_length_beyond_gold(world: Path) -> None:
    """Among pairs of nearly equal gold the longer answer wins in training."""
    wins = []
    for row in rows(world, "train"):
        prompt, chosen, rejected = (text(row[key]) for key in ("prompt", "chosen", "rejected"))
        gap = len(chosen.split()) - len(rejected.split())
        if gap and abs(gold(prompt, chosen) - gold(prompt, rejected)) < 0.7:
            wins.append(gap > 0)
    assert len(wins) > 50
    assert sum(wins) / len(wins) > 0.6


def test_the_annotator_errs_as_often_as_its_formula_says(tmp_path: Path) -> None:
    """Labels are Bernoulli(sigmoid(z)): their error rate is within 4 standard errors of the mean of
    sigmoid(-|z|), computed here again from the texts."""
    settings = World(train_prompts=400, evaluation_prompts=6, group_prompts=6, length_bias=0.0)
    make_world(tmp_path, settings)
    facts = json.loads((tmp_path / "world.json").read_text())
    errors, expected = [], []
    for row in rows(tmp_path, "train"):
        prompt = text(row["prompt"])
        gap = gold(prompt, text(row["chosen"])) - gold(prompt, text(row["rejected"]))
        if gap:
            z = utility(gap, 0, settings, (facts["sd_gold"], facts["sd_words"]))
            errors.append(gap < 0)
            expected.append(1 / (1 + math.exp(abs(z))))
            assert row["margin"] >= 0
    error, mean = sum(errors) / len(errors), sum(expected) / len(expected)
    noise = math.sqrt(sum(p * (1 - p) for p in expected)) / len(expected)
    assert abs(error - mean) < 4 * noise
    assert facts["label_error"] == pytest.approx(error, abs=1e-6)
    assert facts["label_error_expected"] == pytest.approx(mean, abs=1e-6)


def test_groups_hold_every_training_model_and_its_gold(world: Path) -> None:
    found = rows(world, "groups")
    assert len(found) == SMALL.group_prompts * len(MODELS)
    assert {row["model"] for row in found} == set(MODELS)
    for row in found:
        assert row["gold"] == pytest.approx(gold(text(row["prompt"]), text(row["response"])))


def test_every_skill_has_prompts_enough() -> None:
    found = prompts(World())
    assert {name: len(found[name]) for name in ("train", "id", "groups")} == {
        "train": 900,
        "id": 200,
        "groups": 120,
    }
