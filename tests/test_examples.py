"""The changes of docs/changing.md, each by its own command line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import QUICKSTART, ROOT, SMALL

MAZE = ["--env", "maze2d-umaze-v1", "--dataset_path", QUICKSTART]
SHORT = ["--offline_iterations", 10, "--online_iterations", 5, "--n_episodes", 2]


@pytest.mark.parametrize(
    ("name", "options", "metric"),
    [
        ("gated_critic", MAZE, "qf2_loss"),
        ("td3_bc", MAZE, "bc_loss"),
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
