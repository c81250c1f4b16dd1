"""From reward heads to policies: the demo's language model optimised against two reward models.

The world's gold reward is known, so the effect of optimisation on it can be measured: does gold
rise with the proxy, and does a head that resists the annotator's preference for length do better?
"""

import sys
from importlib import import_module
from importlib.resources import files
from pathlib import Path

import polars as pl
from rich.console import Console

from embrm.core.errors import UserError
from embrm.core.files import exclusive, write_atomic, write_bytes
from embrm.core.progress import progress
from embrm.core.table import terminal
from embrm.demo.overoptimisation import (
    curves,
    outcomes,
    policy_curves,
    policy_figures,
    table,
    verdict,
)
from embrm.demo.policy import PolicyRecipe, PromptSets, train_policy
from embrm.demo.run import demo
from embrm.demo.tiny_lm import Recipe
from embrm.demo.world import World, prompts
from embrm.exports.run import write_model
from embrm.exports.run_model import open_run_model
from embrm.results.ledger import Results, open_results
from embrm.sweeps.execute import sweep

HELD_OUT = 96
"""Number of prompts of the split "id" (new tasks of trained skills) for evaluating policies."""


def rlhf(
    out: Path,
    world: World | None = None,
    lm: Recipe | None = None,
    recipe: PolicyRecipe | None = None,
) -> None:
    """Run the demo, then train and export two reward heads and optimise policies against them.

    One policy is optimised for each head and seed. Results go to `out`/rlhf; running the command
    again keeps what is finished. `world`, `lm`, `recipe`: sizes, by default the demo's. An
    existing `out`/rlhf/heads.toml is kept: its runs, which must be linear heads on the final
    state, and its seeds determine the policies.

    Raises UserError for what the user can correct, such as TRL not being installed.
    """
    try:
        import_module("trl")
    except ImportError:
        raise UserError(
            "embrm demo --rlhf: needs TRL: pip install '.[finetune]' in embrm's source folder"
        ) from None
    demo(out, world, lm)
    world, recipe = world or World(), recipe or PolicyRecipe()
    folder = out / "rlhf"
    _say(f"1/4 reward heads on noisy labels → {folder / 'heads'}")
    toml = folder / "heads.toml"
    if not toml.exists():
        write_bytes(toml, files("embrm.demo").joinpath("rlhf.toml").read_bytes())
    heads = open_results(sweep(toml, out / "cache"))
    with exclusive(folder):
        _say(f"2/4 reward models → {folder / 'rewards'}")
        rewards = _rewards(heads, out, folder / "rewards")
        _say(f"3/4 policies, optimised by TRL's RLOO → {folder / 'policies'}")
        answers = _policies(heads, rewards, out / "lm", folder / "policies", world, recipe)
        _say(f"4/4 gold against proxy → {folder / 'figures'}")
        _report(answers, heads.spec.baseline, folder)


def _rewards(heads: Results, out: Path, folder: Path) -> dict[str, Path]:
    """Export every run; returns run id → folder. The world's texts are read once for all runs."""
    found = {run_id: folder / run_id for run_id in heads.ledger["run_id"]}
    missing = [run_id for run_id, reward in found.items() if not reward.exists()]
    trained = [open_run_model(heads.folder, run_id, out / "cache") for run_id in missing]
    if trained:
        prepared = trained[0].prepared(str(out / "lm"))
        for run_id, run in zip(missing, trained, strict=True):
            write_model(run, prepared, found[run_id], device="cpu")
    return found


def _policies(
    heads: Results,
    rewards: dict[str, Path],
    lm: Path,
    folder: Path,
    world: World,
    recipe: PolicyRecipe,
) -> pl.DataFrame:
    """The rows of `train_policy` for every head and seed, with their name and seed."""
    texts = {split: [text for _, text in asked] for split, asked in prompts(world).items()}
    sets = PromptSets(train=texts["train"], held_out=texts["id"][:HELD_OUT])
    runs = heads.ledger.select("run_id", "config", "seed").rows()
    found = []
    with progress("policies", len(runs) * recipe.steps, "steps") as bar:
        for run_id, name, seed in runs:
            rows = train_policy(folder / run_id, lm, rewards[run_id], sets, recipe, seed, bar)
            found.append(
                rows.select(pl.lit(name).alias("name"), pl.lit(seed).alias("seed"), pl.all())
            )
    return pl.concat(found)


def _report(answers: pl.DataFrame, baseline: str, folder: Path) -> None:
    """Write answers, curves, table and figures; print the table and its verdict."""
    measured = policy_curves(answers)
    by_step, found = curves(measured, baseline), outcomes(measured, baseline)
    for name, rows in (("answers", answers), ("curves", by_step), ("outcomes", found)):
        write_atomic(folder / f"{name}.parquet", rows.write_parquet)
    images = policy_figures(by_step, baseline)
    for name, content in images.items():
        write_bytes(folder / "figures" / name, content)
    console = Console()
    console.print(terminal(table(found, baseline)))
    guide = f"""
{verdict(found, baseline)}
This is a toy world: it shows how to evaluate, not which head to choose.

What to look at
  {folder / "figures" / "overoptimisation.png"}
  {folder / "answers.parquet"}: every held-out answer, its gold reward and its parts
  {folder / "rewards"}: reward models that any trainer loads, as docs/rlhf.md shows"""
    console.print(guide, markup=False, highlight=False, soft_wrap=True)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
