"""configs/sweeps/ by W&B's own commands, against a stand-in for its server on this machine."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from wandb_server import Server

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import cal_ql  # noqa: E402

TINY = {
    "env": "maze2d-umaze-v1",
    "dataset_path": f"{ROOT}/datasets/maze2d-umaze-v1-small.hdf5",
    "device": "cpu",
    "offline_iterations": 100,
    "online_iterations": 100,
    "eval_freq": 100,
    "checkpoint_freq": 10,
    "n_episodes": 1,
    "log_freq": 10,
    "eval_workers": 1,
    "hidden_dim": 8,
    "batch_size": 16,
    "cql_n_actions": 2,
}


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        yield server


def start(folder: Path, server: Server, *command: str, **env: str) -> Any:
    """`wandb COMMAND` in `folder` as a process; what it and its runs print goes to `log`."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")} | env
    env |= {"HOME": str(folder), "PATH": f"{Path(sys.executable).parent}:{env['PATH']}"}
    with open(folder / "log", "a") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "wandb", *command],
            cwd=folder,
            env=env | server.env,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
        )


def create_sweep(folder: Path, server: Server, file: Path) -> str:
    """The path of a new sweep, as `wandb sweep` prints it for `wandb agent`."""
    process = start(folder, server, "sweep", "--project", "p", str(file))
    assert process.wait(60) == 0, (folder / "log").read_text()
    return (folder / "log").read_text().split("wandb agent ")[-1].strip()


def wait_for(holds: Callable[[], Any], what: str) -> Any:
    """What `holds` returns as soon as that is true."""
    end = time.monotonic() + 120
    while not (found := holds()):
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.05)
    return found


def processes(part: str) -> list[tuple[int, int]]:
    """Ids of live processes with `part` in their command line, and of their parents."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
            command = (stat.parent / "cmdline").read_text()
        except OSError:  # it has just ended
            continue
        if part in command and state != "Z":
            found.append((int(stat.parent.name), int(parent)))
    return found


def checkpoints(folder: Path, seed: int) -> list[Path]:
    return list(folder.glob(f"runs/*-seed{seed}-*/checkpoint_*.pt"))


def test_runs_of_a_sweep_survive_their_agent_and_agents_their_runs(
    tmp_path: Path, server: Server
) -> None:
    configs = [str(tmp_path / name) for name in ("short", "bad", "long")]
    changes = [{}, {"batch_size": 0}, {"seed": 1, "online_iterations": 1_000_000}]
    for name, changed in zip(configs, changes):
        Path(name).write_text(yaml.dump(TINY | changed))
    sweep_file = tmp_path / "sweep.yaml"
    parameters = {"config_path": {"values": configs}, "checkpoints_path": {"value": "runs"}}
    sweep = {"program": f"{ROOT}/cal_ql.py", "method": "grid", "parameters": parameters}
    sweep_file.write_text(yaml.dump(sweep))
    path = create_sweep(tmp_path, server, sweep_file)
    (short, bad, long) = server.runs.values()
    patient = {"WANDB_AGENT_DISABLE_FLAPPING": "true"}
    agents, orphan = [], 0
    try:
        # two agents take a run each
        agents = [start(tmp_path, server, "agent", path, **patient) for _ in range(2)]
        wait_for(lambda: checkpoints(tmp_path, seed=0), "a checkpoint of the first run")
        parents = [agent.pid for agent in agents]
        ((orphan, parent),) = [two for two in processes(configs[0]) if two[1] in parents]
        killed, other = sorted(agents, key=lambda agent: agent.pid != parent)

        # one agent is killed, and its run lives on, held up here so that it does not end too early
        killed.kill()
        killed.wait()
        os.kill(orphan, signal.SIGSTOP)

        # the other's run ends with an error, and it takes the next; the server stops that, it saves
        wait_for(lambda: checkpoints(tmp_path, seed=1), "a checkpoint of the last run")
        assert bad.state == "failed"
        assert "cal_ql.py: error: batch_size" in (tmp_path / "log").read_text()
        assert short.agents != bad.agents == long.agents
        long.stop = True
        wait_for(lambda: long.state != "running", "the end of the stopped run")
        assert "SIGTERM" in (tmp_path / "log").read_text()
        assert other.poll() is None

        # a start of the first run is refused while that lives
        short.state = "pending"
        wait_for(lambda: short.state == "failed", "the refusal of the second start")
        assert "another process runs in" in (tmp_path / "log").read_text()
        os.kill(orphan, signal.SIGCONT)
        os.kill(orphan, signal.SIGTERM)
        wait_for(lambda: not any(pid == orphan for pid, _ in processes("")), "its end")

        # a new agent continues it
        server.closing = True
        assert other.wait(60) == 0
        short.state = "pending"
        agents.append(start(tmp_path, server, "agent", path, **patient))
        assert agents[-1].wait(120) == 0
    finally:
        for process in agents:
            process.kill()
        for pid, _ in processes(str(tmp_path)):
            os.kill(pid, signal.SIGKILL)

    assert short.state == "finished"
    starts = re.findall(r"starting at step (\d+) of 200$", (tmp_path / "log").read_text(), re.M)
    assert starts[0] == "0" and int(starts[1]) > 0 and len(starts) == 2
    (run,) = tmp_path.glob("runs/*-seed0-*")
    assert (run / "wandb_id").read_text() == short.id
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [record["step"] for record in records]
    assert steps == sorted(steps) and steps[-1] == 200
    assert {record["step"] for record in short.history} == set(steps)


CAPTURE = "import json, sys; open('arguments', 'w').write(json.dumps(sys.argv[1:]))"


@pytest.mark.parametrize("name", ["antmaze", "search", "search_gap"])
def test_the_runs_that_our_sweeps_start(
    name: str, tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cal_ql.py").write_text(CAPTURE)
    path = create_sweep(tmp_path, server, ROOT / "configs" / "sweeps" / f"{name}.yaml")
    agent = start(tmp_path, server, "agent", "--count", "1", path)
    assert agent.wait(60) == 0, (tmp_path / "log").read_text()
    monkeypatch.chdir(ROOT)
    config = cal_ql.parse_config(json.loads((tmp_path / "arguments").read_text()))
    chosen = [json.dumps(run.args) for run in server.runs.values()]
    assert len(set(chosen)) == len(chosen) == (60 if name == "antmaze" else 3)
    assert config.checkpoints_path == "runs"
    assert config.cql_alpha == config.cql_alpha_online
    assert (config.cql_alpha == 5.0) == (name != "search")
    assert config.cql_lagrange == (name != "search")
    assert (config.cql_target_action_gap == 0.8) == (name != "search_gap")
    (run,) = [run for run in server.runs.values() if run.agents]
    for option, value in run.args.items():
        if option != "config_path":
            assert getattr(config, option) == value, option
