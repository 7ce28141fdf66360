"""OGBench's single tasks."""

import socket
import tempfile
import zipfile
from collections.abc import Iterable
from http.client import HTTPException
from pathlib import Path

import numpy as np

from runs.errors import InputError, close_matches
from tasks.files import check_file, data_directory, download_error, is_file, reading
from tasks.gymnasium_task import GymnasiumTask, import_for, making_environment, silence
from tasks.task import check_rows


class OGBench(GymnasiumTask):
    """A single task of OGBench, by its dataset's id: `cube-single-play-singletask-task2-v0`.

    As in the data, the state before a step determines its reward and whether it ends the episode.
    Mazes and single cubes pay -1, or 0 at the goal. The others pay minus the number of incomplete
    subtasks.
    """

    failure_reward = -1.0

    def __init__(self, name: str):
        gymnasium, self.ogbench = import_for(name, "ogbench")
        names = environment_names(gymnasium.registry)
        if name not in names:
            close = close_matches(name, names)
            raise InputError(f"env: OGBench has no task {name!r}; close matches: {close}")
        with making_environment():
            env = gymnasium.make(names[name], disable_env_checker=True)
            # arm environments return a new action space on each access, which cannot be seeded
            type(env.unwrapped).action_space = env.unwrapped.action_space
            super().__init__(name, env, simulator="mujoco")
        if hasattr(env.unwrapped, "maze_map") and "teleport" not in name:
            self.cell_size = env.unwrapped._maze_unit

    def published_file(self) -> Path:
        default = self.ogbench.utils.DEFAULT_DATASET_DIR
        directory = data_directory("OGBENCH_DATASET_DIR", default)
        file = directory / f"{self.name.partition('-singletask')[0]}-v0.npz"
        if is_file(file):
            return file
        timeout = socket.getdefaulttimeout()
        socket.setdefaulttimeout(30)  # OGBench would wait forever
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=directory) as folder:  # deleted in any case
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
        """The arrays of a file in OGBench's layout, with this task's rewards by OGBench's own rule.

        Each goal state is terminal, even if the recording continues. Each recording's last row is a
        timeout. Actions are clipped just inside the bounds, where the policy has no density.
        """
        kind = ".npz file in OGBench's layout"
        check_file(path)
        with reading(path, kind), silence():
            raw = self.ogbench.load_dataset(path, compact_dataset=True, add_info=True)
        self.check_states(raw, path)
        with reading(path, kind), silence():
            self.ogbench.relabel_utils.relabel_dataset(self.env.spec.id, self.env, raw)
            rows = {key: raw[key] for key in ("observations", "actions", "rewards")}
            rows["terminals"] = raw["masks"] == 0
            rows["timeouts"] = raw["valids"] == 0
        rows = check_rows(rows, self, path)
        rows["actions"] = rows["actions"].clip(-1 + 1e-5, 1 - 1e-5)
        return rows

    def check_states(self, raw: dict[str, np.ndarray], path: Path) -> None:
        """Raise `InputError` for states of another robot or maze, or with NaN in them."""
        env = self.env.unwrapped
        positions = raw.get("qpos", np.empty(0))
        if positions.shape[1:] != (env.model.nq,) or len(positions) < 2:
            raise InputError(
                f"dataset {path}: qpos has shape {positions.shape}, the task needs "
                f"(N, {env.model.nq}) with N > 1"
            )
        for key in ("qpos", "button_states"):
            values = raw.get(key, np.empty(0))
            if values.dtype.kind not in "biuf" or not np.isfinite(values).all():
                raise InputError(f"dataset {path}: {key} holds NaN, infinite values or no numbers")
        if hasattr(env, "maze_map"):
            free = set(map(tuple, np.argwhere(env.maze_map == 0).tolist()))
            sampled = positions[:: 1 + len(positions) // 1000, :2]
            if np.mean([env.xy_to_ij(xy) in free for xy in sampled]) < 0.99:
                raise InputError(f"dataset {path}: its positions are in walls of {self.name}")


def environment_names(registry: Iterable[str]) -> dict[str, str]:
    """The environment's id for each task's id; only tasks with states as observations."""
    names = {}
    for env_name in registry:
        family, found, task = env_name.partition("-singletask")
        if not found or family.startswith("visual"):
            continue
        is_arm = family.startswith(("cube", "puzzle", "scene"))
        recordings = ("play", "noisy") if is_arm else ("navigate", "stitch", "explore")
        for data in recordings:
            names[f"{family}-{data}-singletask{task}"] = env_name
    return names
