"""The recipes of `make_dataset.py`, one file per family of tasks.

To add one, write a subclass of `common.Recipe` in its own file and name it below. description.txt
describes the recipes and the rows; locomotion.txt does so for locomotion. Each dataset contains a
copy of that text, so any change to the text changes the datasets.
"""

import importlib
import re

from tools.recipes.common import Recipe

ANT_MAZES = "umaze umaze-diverse medium-play medium-diverse large-play large-diverse".split()

# task -> module and class; modules are imported when needed, since simulators take seconds to load
RECIPES: dict[str, str] = {}
for maze in ("umaze", "medium", "large"):
    RECIPES[f"maze2d-{maze}-v1"] = "maze2d:Maze2D"
for maze in ANT_MAZES:
    RECIPES[f"antmaze-{maze}-v2"] = "antmaze:AntMaze"
for body in ("halfcheetah", "hopper", "walker2d", "ant"):
    RECIPES[f"{body}-random-v2"] = "locomotion:Random"
for maze in ("open", "umaze", "medium", "large"):
    RECIPES[f"D4RL/pointmaze/{maze}-v2"] = "pointmaze:PointMaze"
for data in ("navigate", "stitch"):
    for maze in ("medium", "large", "giant", "teleport"):
        RECIPES[f"pointmaze-{maze}-{data}-singletask-v0"] = "ogbench:Point"
for data in ("play", "noisy"):
    for cubes in ("single", "double", "triple", "quadruple", "octuple"):
        RECIPES[f"cube-{cubes}-{data}-singletask-v0"] = "ogbench:Cubes"
RECIPES["door-human-v1"] = "door:Door"
RECIPES["door-binary-v0"] = "door:BinaryDoor"


def find_recipe(task: str) -> type[Recipe] | None:
    """The class that makes data for `task`, if there is one."""
    shared = re.sub("-task[1-5]-", "-", task)  # OGBench's five tasks of an environment share data
    if shared not in RECIPES:
        return None
    module, name = RECIPES[shared].split(":")
    return getattr(importlib.import_module(f"tools.recipes.{module}"), name)
