"""What an agent trains on: each task with an environment and the rows of its data.

The id says whose it is: `D4RL/door/human-v2` Minari's, `cube-single-play-singletask-v0` OGBench's,
`door-binary-v0` the Cal-QL paper's, else D4RL's.

    task = tasks.make("antmaze-umaze-v2")
    observation = task.reset(seed=0)
    observation, reward, terminal, truncated, success = task.step(action)  # action in [-1, 1]
    rows = task.rows(task.data_file(None))

Nothing here knows of Cal-QL. Wrong input raises `InputError`.
"""

from typing import Optional

from tasks.task import Step, Task, check_sizes, episode_ends

__all__ = ["Step", "Task", "check_sizes", "episode_ends", "make"]


def make(name: str, dataset_path: Optional[str] = None) -> Task:
    """The task of that id; raises `InputError` where there is none such or it cannot run here.

    A Minari task's environment stands in its dataset, so it needs to know where that lies.
    """
    from tasks import adroit, d4rl, minari, ogbench

    if "/" in name:
        return minari.Minari(name, dataset_path)
    if "singletask" in name:
        return ogbench.OGBench(name)
    if "-binary-" in name:
        return adroit.BinaryAdroit(name)
    return d4rl.Kitchen(name) if name.startswith("kitchen") else d4rl.D4RL(name)
