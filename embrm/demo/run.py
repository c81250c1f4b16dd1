"""The demo: a synthetic world, a tiny language model, then extraction, sweep and report."""

import shlex
import sys
from importlib.resources import files
from pathlib import Path

from rich.console import Console

from embrm.core.files import write_bytes
from embrm.core.table import terminal
from embrm.demo.tiny_lm import Recipe, train_lm
from embrm.demo.world import World, make_world
from embrm.extraction.run import extract
from embrm.extraction.spec import ExtractSpec
from embrm.reports.run import Report, report
from embrm.sweeps.execute import sweep

SPLITS = {
    "train": "train",
    "id": "id",
    "ood/skill": "ood-skill",
    "ood/model": "ood-model",
    "ood/length": "ood-length",
    "id-groups": "groups",
}
"""Splits of the cache and the files of the world that they are read from."""

VIEWS = ("last", "mean")

REAL_MODEL = "Qwen/Qwen2.5-0.5B-Instruct"
REAL_DATA = "trl-lib/ultrafeedback_binarized"


def demo(out: Path, world: World | None = None, recipe: Recipe | None = None) -> None:
    """Make world, language model, cache, sweep and report below `out`, and explain the report.

    Running it again keeps what is finished. `world`, `recipe`: sizes, by default the demo's. An
    existing `out`/demo.toml is kept, so that the sweep can be edited and run again.
    Raises UserError for what the user can correct, such as a folder that cannot be written.
    """
    world, recipe = world or World(), recipe or Recipe()
    _say(f"1/5 preference world → {out / 'world'}")
    make_world(out / "world", world)
    _say(f"2/5 tiny language model → {out / 'lm'}")
    losses = train_lm(out / "lm", world, recipe)
    _say(
        f"    {losses['loss']:.2f} nats a token on unseen text; "
        f"{losses['unigram_entropy']:.2f} without context"
    )
    _say(f"3/5 final states → {out / 'cache'}")
    sources = {split: out / "world" / f"{name}.jsonl" for split, name in SPLITS.items()}
    spec = ExtractSpec.parse(
        {
            "model": str(out / "lm"),
            "data": [{"path": str(path), "split": split} for split, path in sources.items()],
            "states": VIEWS,
        },
        "demo",
    )
    extract(spec, out / "cache", device="cpu")
    _say(f"4/5 sweep of reward heads → {out / 'demo'}")
    toml = out / "demo.toml"
    if not toml.exists():
        write_bytes(toml, files("embrm.demo").joinpath("demo.toml").read_bytes())
    results = sweep(toml, out / "cache")
    _say(f"5/5 report → {results / 'report.md'}")
    found = report(results)
    console = Console()
    for table in found.tables:
        console.print(terminal(table))
        console.print()
    console.print(_guide(out, results, found), markup=False, highlight=False, soft_wrap=True)


def _guide(out: Path, results: Path, found: Report) -> str:
    """What to look at, how to repeat it by hand, and how to continue with a real model."""
    figures = sorted(path for path in found.files if path.suffix == ".png")
    views = ",".join(VIEWS)
    data = [f"{split}={out / 'world' / name}.jsonl" for split, name in SPLITS.items()]
    again = _extract(out / "lm", views, [f"--data {shlex.quote(entry)}" for entry in data])
    real = _extract(REAL_MODEL, views, [f"--data {REAL_DATA}", "--limit 2000"])
    toml, cache = shlex.quote(str(out / "demo.toml")), shlex.quote(str(out / "cache"))
    shown = "\n".join(f"  {path}" for path in [results / "report.md", *figures])
    return f"""\
What to look at
{shown}
- Ranked intervals: heads whose intervals overlap may not differ. The paired differences to the
  baseline are the more sensitive test.
- id against ood/...: the training annotator errs and prefers length. On ood/length the longer
  answer is always the worse one, so a head below one half there has learned the shortcut.
- The row "(longer is better)": the score of length alone on each split.
- id-groups: Kendall's tau with the known gold reward, prompt by prompt.
This is a toy world: it shows how to read a report, not which objective is best.

The same by hand
{again} \\
    --out {cache}
  embrm sweep {toml} --cache {cache}
  embrm report {shlex.quote(str(results))}
Edit {toml} and run the sweep again: only new configurations are trained.

Next, with a real model (downloads from the Hugging Face hub: needs a network)
{real} \\
    --out cache/real
  cp {toml} sweeps/real.toml  # and remove its margin run: that data has no margins
  embrm sweep sweeps/real.toml --cache cache/real
  embrm report sweeps/real"""


def _extract(model: Path | str, views: str, options: list[str]) -> str:
    first = f"  embrm extract --model {shlex.quote(str(model))} --states {views}"
    return " \\\n    ".join([first, *options])


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
