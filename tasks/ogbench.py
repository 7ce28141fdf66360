"""OGBench's single tasks."""

import os
import socket
import tempfile
import zipfile
from http.client import HTTPException
from pathlib import Path

import numpy as np

from runs.errors import InputError, close_matches
from tasks.files import download_error, reading
from tasks.gymnasium_task import GymnasiumTask, import_for, making_environment, silence
from tasks.task import check_rows


class OGBench(GymnasiumTask):
    """A single task of OGBench, by its dataset's id: `cube-single-play-singletask-task2-v0`.

    A step is paid, and ends the episode, for the state before it, as in the data: in mazes and for
    one cube -1, or 0 at the goal; else minus the number of subtasks that are not complete.
    """

    failure_reward = -1.0

    def __init__(self, name: str):
        gymnasium, self.ogbench = import_for(name, "ogbench")
        names = {}  # id -> the environment's, for those that observe the state
        for env_name in gymnasium.registry:
            family, found, task = env_name.partition("-singletask")
            if found and not family.startswith("visual"):
                is_arm = family.startswith(("cube", "puzzle", "scene"))
                for data in ("play", "noisy") if is_arm else ("navigate", "stitch", "explore"):
                    names[f"{family}-{data}-singletask{task}"] = env_name
        if name not in names:
            close = close_matches(name, names)
            raise InputError(f"env: OGBench has no task {name!r}; close matches: {close}")
        with making_environment():
            env = gymnasium.make(names[name], disable_env_checker=True)
            # an arm's would be another one at each look, and so could not be seeded
            type(env.unwrapped).action_space = env.unwrapped.action_space
            super().__init__(name, env)

    def published_file(self) -> Path:
        default = self.ogbench.utils.DEFAULT_DATASET_DIR
        directory = Path(os.environ.get("OGBENCH_DATASET_DIR", default)).expanduser()
        file = directory / f"{self.name.partition('-singletask')[0]}-v0.npz"
        if file.is_file():
            return file
        timeout = socket.getdefaulttimeout()
        socket.setdefaulttimeout(30)  # OGBench would wait for ever
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=directory) as folder:  # gone, whatever happens
                self.ogbench.download_datasets([file.stem], folder)
                for part in sorted(Path(folder).iterdir()):
                    if not zipfile.is_zipfile(part):
                        raise ValueError(f"{part.name} was cut short")
                    part.replace(directory / part.name)
        except (OSError, ValueError, HTTPException) as error:
            raise download_error(self.name, self.ogbench.utils.DATASET_URL, file, error) from None
        finally:
            socket.setdefaulttimeout(timeout)
        return file

    def rows(self, path: Path) -> dict[str, np.ndarray]:
        """The arrays of a file in OGBench's layout, paid for this task by OGBench's own rule.

        Each goal state is terminal, also where the recording goes on, and each recording's last
        row a timeout. Actions stop short of the bounds, where the policy has no density.
        """
        kind = ".npz file in OGBench's layout"
        with reading(path, kind), silence():
            raw = self.ogbench.load_dataset(path, compact_dataset=True, add_info=True)
        self.check_positions(raw.get("qpos", np.empty(0)), path)
        with reading(path, kind), silence():
            self.ogbench.relabel_utils.relabel_dataset(self.env.spec.id, self.env, raw)
        rows = {key: raw[key] for key in ("observations", "actions", "rewards")}
        rows |= {"terminals": raw["masks"] == 0, "timeouts": raw["valids"] == 0}
        rows = check_rows(rows, self, path)
        rows["actions"] = rows["actions"].clip(-1 + 1e-5, 1 - 1e-5)
        return rows

    def check_positions(self, positions: np.ndarray, path: Path) -> None:
        """Raise `InputError` for positions [N, nq] of another robot, or of another maze."""
        env = self.env.unwrapped
        if positions.shape[1:] != (env.model.nq,):
            found, width = positions.shape, env.model.nq
            raise InputError(f"dataset {path}: qpos has shape {found}, the task needs (N, {width})")
        if hasattr(env, "maze_map"):
            free = set(map(tuple, np.argwhere(env.maze_map == 0).tolist()))
            some = positions[:: 1 + len(positions) // 1000, :2]
            if np.mean([env.xy_to_ij(xy) in free for xy in some]) < 0.99:
                raise InputError(f"dataset {path}: its positions are in walls of {self.name}")
