"""Tasks: each is an environment and the rows of its data.

The form of the id tells the benchmark: `D4RL/door/human-v2` is Minari's,
`cube-single-play-singletask-v0` OGBench's, `door-binary-v0` the Cal-QL paper's, all others D4RL's.

    task = tasks.make("antmaze-umaze-v2")
    observation = task.reset(seed=0)
    observation, reward, terminal, truncated, success = task.step(action)  # action in [-1, 1]
    rows = task.rows(task.data_file(None))

Wrong input raises `InputError`. `task.py` says how to add a benchmark.
"""

from typing import Optional

from tasks.task import Step, Task, check_sizes, episode_ends

__all__ = ["Step", "Task", "check_sizes", "episode_ends", "make"]


def make(name: str, dataset_path: Optional[str] = None) -> Task:
    """The task with this id; raises `InputError` if there is none or it cannot run here.

    Only Minari's tasks need `dataset_path`, because their datasets name the environment.
    """
    # A family is imported when one of its tasks is made, since it loads a simulator.
    if "/" in name:
        from tasks.minari import Minari

        return Minari(name, dataset_path)
    if "singletask" in name:
        from tasks.ogbench import OGBench

        return OGBench(name)
    if "-binary-" in name:
        from tasks.adroit import BinaryAdroit

        return BinaryAdroit(name)
    from tasks.d4rl import D4RL, Kitchen

    return Kitchen(name) if name.startswith("kitchen") else D4RL(name)
