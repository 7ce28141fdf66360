"""The programs of docs/changing.md and docs/own_data.md, each by its own command line."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import QUICKSTART, ROOT, SMALL, read_records

MAZE = ["--env", "maze2d-umaze-v1", "--dataset_path", QUICKSTART]
SHORT = ["--offline_iterations", 10, "--online_iterations", 5, "--n_episodes", 2]


@pytest.mark.parametrize(
    ("name", "options", "metric"),
    [
        ("gated_critic", MAZE, "qf2_loss"),
        ("td3_bc", MAZE, "td3_bc_loss"),
        (
            "own_task",
            ["--env", "Pendulum-v1", "--dataset_path", "pendulum.npz"],
            "eval/episode_return",
        ),
    ],
)
def test_an_example_trains(name, options, metric, tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "examples" / f"{name}.py", *SMALL, *SHORT, *options]
    subprocess.run([*map(str, command), "--checkpoints_path", "."], cwd=tmp_path, check=True)
    (records,) = tmp_path.glob("*/metrics.jsonl")
    found = [json.loads(line) for line in records.read_text().splitlines()]
    assert any(metric in record for record in found)
    assert max(record["step"] for record in found) == 15


# ---------------------------------------------------------------------------- docs/own_data.md

PAGE = (ROOT / "docs/own_data.md").read_text()
MINE = """
class Mine(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-1, 1, (3,))
    action_space = gymnasium.spaces.Box(-1, 1, (2,))

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        return self.np_random.random(3, "float32"), {}

    def step(self, action):
        success = bool(self.np_random.random() < 0.01)
        reward = 0.0 if success else -1.0
        return self.np_random.random(3, "float32"), reward, success, False, {"success": success}
"""


def run(*command, cwd: Path, fails: bool = False) -> str:
    """The stderr of a program of this repository or of the page."""
    command = [sys.executable, *map(str, command)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == (2 if fails else 0), done.stderr
    return done.stderr


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A folder with the example's data."""
    pytest.importorskip("minari")
    run(ROOT / "examples/own_data.py", "data", cwd=tmp_path)
    return tmp_path


def test_data_of_ones_own_trains(made: Path) -> None:
    options = re.search(r"cal_ql.py (--config_path .*?)```", PAGE, re.DOTALL)[1]
    options = options.replace("\\\n", "").replace("configs/", f"{ROOT}/configs/")
    options = options.replace("datasets/minari", "data").split()
    assert "pendulum/swing-up-v0" in options
    tiny = [
        x for x in SMALL if x not in ("--env", "maze2d-umaze-v1", "--dataset_path", "data.hdf5")
    ]
    run(ROOT / "cal_ql.py", *options, *tiny, *SHORT, "--checkpoints_path", ".", cwd=made)
    records = read_records(made)
    first, *_, last = [r for r in records if "eval/d4rl_normalized_score" in r]
    assert first["eval/episode_length"] == 200 and "eval/success_rate" not in first
    score = (first["eval/episode_return"] + 1200) / (1200 - 150) * 100
    assert first["eval/d4rl_normalized_score"] == pytest.approx(score)
    assert last["step"] == 15
    (bound,) = {r["average_return_to_go"] > 0 for r in records if "average_return_to_go" in r}
    assert bound  # no reward is negative as scaled


def test_an_environment_of_ones_own_and_a_sparse_task(made: Path) -> None:
    """By the page's programs, in several processes; without them the environment is refused."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    sparse, register, train = (x.replace("/path/to/this/repository", str(ROOT)) for x in blocks)
    (made / "my_envs.py").write_text(register + MINE)
    (made / "train.py").write_text(train)
    (made / "sparse.py").write_text(
        sparse.replace("import tasks\n", "import my_envs\nimport tasks\n")
    )
    recipe = (ROOT / "examples/own_data.py").read_text()
    recipe = recipe.replace("import gymnasium\n", "import gymnasium\nimport my_envs\n")
    recipe = recipe.replace("pendulum/swing-up-v0", "mine/first-v0").replace(
        "Pendulum-v1", "Mine-v0"
    )
    recipe = recipe.replace("controller(observation, rng)", "env.action_space.sample()")
    (made / "record.py").write_text(recipe.replace("n_episodes: int = 100", "n_episodes: int = 5"))
    run("record.py", "data", cwd=made)

    tiny = [
        x for x in SMALL if x not in ("--env", "maze2d-umaze-v1", "--dataset_path", "data.hdf5")
    ]
    command = [*tiny, *SHORT, "--env", "mine/first-v0", "--dataset_path", "data"]
    command += ["--eval_workers", 2, "--checkpoints_path"]
    refused = run(ROOT / "cal_ql.py", *command, "no", cwd=made, fails=True)
    assert "'Mine-v0' is not registered with gymnasium here, and a dataset must run no" in refused
    is_sparse = ["--is_sparse_reward", "true"]
    dense = run("train.py", *command, "no", *is_sparse, cwd=made, fails=True)
    assert "found true, expected false: mine/first-v0 is dense" in dense
    run("train.py", *command, "dense", cwd=made)
    run("sparse.py", *command, "sparse", *is_sparse, cwd=made)
    for name in ("dense", "sparse"):
        assert any("eval/success_rate" in record for record in read_records(made / name))
