"""W&B's own commands on sweeps and on runs recorded offline, against a stand-in for its server."""

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
import wandb
import yaml

from helpers import ROOT, SMALL, call, parse, write_dataset
from wandb_server import Server

FAST = [*SMALL, *"--env maze2d-open-v0 --eval_freq 100000".split()]  # episodes of 150 steps
WANDB = """import sys
from wandb import wandb_agent
from wandb.cli.cli import cli
wandb_agent.Agent.POLL_INTERVAL = 0.2  # seconds, instead of 5
for command in sys.argv[1].splitlines():
    cli(command.split(), standalone_mode=False)"""


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        yield server


def start(folder: Path, server: Server, *commands: str) -> subprocess.Popen:
    """Run each `wandb COMMAND` in turn, in `folder`; `log` gets their output and their runs'."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    env |= {"HOME": str(folder), "PATH": f"{Path(sys.executable).parent}:{env['PATH']}"}
    env |= {"WANDB_AGENT_DISABLE_FLAPPING": "true", **server.env}
    env["WANDB__FILE_STREAM_TRANSMIT_INTERVAL"] = "0.5"  # seconds, instead of 15
    arguments = [sys.executable, "-c", WANDB, "\n".join(commands)]
    with open(folder / "log", "a") as log:
        return subprocess.Popen(arguments, cwd=folder, env=env, stdout=log, stderr=log)


def wait_for(holds: Callable[[], Any], what: str) -> Any:
    """What `holds` returns as soon as that is true."""
    end = time.monotonic() + 300
    while not (found := holds()):
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.05)
    return found


def run_processes(agent: subprocess.Popen) -> list[int]:
    """The processes of the run that this agent has started."""
    try:
        children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
        commands = {int(child): Path(f"/proc/{child}/cmdline").read_text() for child in children}
    except FileNotFoundError:  # one has just ended
        return []
    return [child for child, command in commands.items() if "cal_ql.py" in command]


def test_runs_of_a_sweep_survive_their_agent_and_agents_their_runs(
    tmp_path: Path, server: Server
) -> None:
    write_dataset(tmp_path / "data.hdf5")
    options = [*FAST, *"--online_iterations 1000000 --checkpoint_freq 10".split()]
    sweep = {
        "program": f"{ROOT}/cal_ql.py",
        "method": "grid",
        "parameters": {
            "checkpoints_path": {"values": ["runs", ""]},  # the second is an error
            "eval_workers": {"value": None},
        },
        "command": ["python", "${program}", *options, "${args}"],
    }
    (tmp_path / "sweep.yaml").write_text(yaml.dump(sweep))
    assert start(tmp_path, server, "sweep --project p sweep.yaml").wait(60) == 0
    good, bad = server.runs.values()
    agents, orphan = [], 0
    log = (tmp_path / "log").read_text
    try:
        # two agents take a run each; one run ends with an error, and its agent continues
        agents = [start(tmp_path, server, "agent me/p/sweep0") for _ in range(2)]
        wait_for(lambda: list(tmp_path.glob("runs/*/checkpoint_*.pt")), "a checkpoint")
        wait_for(lambda: bad.state == "failed", "the error of the other run")
        assert "cal_ql.py: error: checkpoints_path: found ''" in log()
        killed, other = sorted(agents, key=lambda agent: not run_processes(agent))
        assert good.agents != bad.agents and other.poll() is None

        # one agent is killed and its run lives on: another start of it is refused
        (orphan,) = run_processes(killed)
        killed.kill()
        killed.wait()
        os.kill(orphan, signal.SIGSTOP)  # so that it takes nobody's time
        good.state = "pending"
        wait_for(lambda: good.state == "failed", "the refusal of the second start")
        assert "another process runs in" in log() and run_processes(other) == []

        # it ends, and the next start continues it, until the server stops that early
        os.kill(orphan, signal.SIGCONT)
        os.kill(orphan, signal.SIGTERM)
        wait_for(lambda: log().count("by SIGTERM") == 1, "the end of the first start")
        good.state = "pending"
        starts = re.compile(r"starting at step (\d+) of").findall
        first, second = wait_for(lambda: len(starts(log())) > 1 and starts(log()), "the third")
        assert int(first) == 0 < int(second)
        known = len(good.history)
        wait_for(lambda: len(good.history) > known, "its records")
        good.stop = True
        wait_for(lambda: log().count("by SIGTERM") == 2, "its end")
        server.closing = True
        assert other.wait(60) == 0
    finally:
        for pid in [orphan, *(pid for agent in agents for pid in run_processes(agent))]:
            if pid and Path(f"/proc/{pid}").exists():
                os.kill(pid, signal.SIGKILL)
        for agent in agents:
            agent.kill()

    (run,) = tmp_path.glob("runs/*")
    assert (run / "wandb_id").read_text() == good.id and len(good.agents) == 3
    steps = {json.loads(line)["step"] for line in (run / "metrics.jsonl").open()}
    received = {record["step"] for record in good.history}
    assert {step for step in steps if step <= int(second)} < received


def test_the_runs_that_our_sweeps_start(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each sweep one, by the arguments that it gets."""
    note = "import json, os, sys; json.dump(sys.argv[1:], open(os.environ['WANDB_RUN_ID'], 'w'))"
    (tmp_path / "cal_ql.py").write_text(note)
    names = ["antmaze", "search", "search_gap"]
    sweeps = [f"sweep --project p {ROOT}/configs/sweeps/{name}.yaml" for name in names]
    agents = [f"agent --count 1 me/p/sweep{i}" for i in range(len(names))]
    process = start(tmp_path, server, *sweeps, *agents)
    assert process.wait(120) == 0, (tmp_path / "log").read_text()
    monkeypatch.chdir(ROOT)
    for i, name in enumerate(names):
        chosen = server.sweeps[f"sweep{i}"].runs
        assert len({json.dumps(run.args) for run in chosen}) == len(chosen)
        assert len(chosen) == (60 if name == "antmaze" else 3)
        (run,) = [run for run in chosen if run.agents]
        config = parse(*json.loads((tmp_path / run.id).read_text()))
        assert config.checkpoints_path == "output"
        assert config.cql_alpha == config.cql_alpha_online
        assert (config.cql_alpha == 5.0) == (name != "search")
        assert config.cql_lagrange == (name != "search")
        assert (config.cql_target_action_gap == 0.8) == (name != "search_gap")
        for option, value in run.args.items():
            assert option == "config_path" or getattr(config, option) == value, option


def test_the_sweep_of_methods_starts_each_method_over_the_tasks_config(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of its runs of seed 0, by the arguments that W&B's agent gives them."""
    note = "import json, os, sys; json.dump(sys.argv[1:], open(os.environ['WANDB_RUN_ID'], 'w'))"
    (tmp_path / "cal_ql.py").write_text(note)
    sweep = yaml.safe_load((ROOT / "configs/sweeps/methods.yaml").read_text())
    methods = sweep["parameters"]["config_path"]["values"]
    assert len(sweep["parameters"]["seed"]["values"]) == 5
    sweep["parameters"]["seed"] = {"value": 0}
    (tmp_path / "methods.yaml").write_text(yaml.dump(sweep))
    commands = "sweep --project p methods.yaml", f"agent --count {len(methods)} me/p/sweep0"
    assert start(tmp_path, server, *commands).wait(120) == 0, (tmp_path / "log").read_text()
    monkeypatch.chdir(ROOT)
    found = {}
    for run in server.sweeps["sweep0"].runs:
        arguments = json.loads((tmp_path / run.id).read_text())
        assert arguments[0] == "--config_path=configs/antmaze.yaml"
        found[Path(run.args["config_path"]).stem] = parse(*arguments)
    options = "--config_path configs/antmaze.yaml --env antmaze-large-diverse-v2".split()
    options += ["--checkpoints_path", "output"]
    assert found.pop("antmaze") == parse(*options)  # Cal-QL
    assert set(found) == {path.stem for path in (ROOT / "configs/methods").iterdir()}
    for method, config in found.items():
        assert config == parse(*options, "--config_path", f"configs/methods/{method}.yaml")


@pytest.mark.parametrize("method", [None, "wsrl"])
def test_the_job_array_starts_its_tasks_and_seeds_by_any_method(
    method: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    (tmp_path / "python").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "python").chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_ARRAY_TASK_ID": "9"}
    more = ["--config_path", f"configs/methods/{method}.yaml"] if method else []
    job = ["bash", "configs/sweeps/antmaze.sbatch", *more, "--group", "mine"]
    done = subprocess.run(job, env=env, capture_output=True, text=True, timeout=60)
    script, *arguments = done.stdout.splitlines()
    assert (script, done.returncode, done.stderr) == ("cal_ql.py", 0, "")
    options = ["--config_path", "configs/antmaze.yaml", *more, "--checkpoints_path", "output"]
    options += "--env antmaze-medium-diverse-v2 --seed 1 --group mine".split()
    assert parse(*arguments) == parse(*options)


def test_the_newest_offline_directory_alone_brings_every_record_home(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    wandb.teardown()  # it may have read the environment for another test
    monkeypatch.chdir(tmp_path)
    write_dataset(tmp_path / "data.hdf5")
    for n in (0, 10, 20):  # each start resumes where the one before ended
        assert call(*FAST, "--checkpoints_path", "runs", "--online_iterations", n).returncode == 0
    (run,) = tmp_path.glob("runs/*")
    directories = sorted(run.glob("wandb/offline-run-*"))
    run_id = (run / "wandb_id").read_text()
    # Of starts within one second W&B names the later ones offline-run-TIME-ID-1 and so on.
    assert [path.name.split("-")[3] for path in directories] == [run_id] * 3
    process = start(tmp_path, server, f"sync {directories[-1]}")
    assert process.wait(60) == 0, (tmp_path / "log").read_text()
    (received,) = server.runs.values()
    history = [{k: v for k, v in row.items() if k[0] != "_"} for row in received.history]
    assert received.id == run_id
    assert history == [json.loads(line) for line in (run / "metrics.jsonl").open()]
