"""The demo, shrunk until it takes seconds."""

from embrm.demo.tiny_lm import Recipe
from embrm.demo.world import World

WORLD = World(train_prompts=60, evaluation_prompts=24, group_prompts=12)
RECIPE = Recipe(width=16, layers=1, heads=2, steps=20, batch=8, warmup=2, held_out=16)
SMALL_SWEEP = """
baseline = "bt"
seeds = [0, 1]
[defaults]
epochs = 2
[[runs]]
name = "bt"
[[runs]]
name = "mean"
state = "mean"
bsr = 0.01
"""
