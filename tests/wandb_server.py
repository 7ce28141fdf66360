"""A stand-in for W&B's server on loopback: sweeps, agents, runs and their records, in memory.

It only answers the requests of `wandb sweep`, `wandb agent`, `wandb sync` and a run.
"""

from __future__ import annotations

import contextlib
import gzip
import http.server
import itertools
import json
import random
import re
import threading
from dataclasses import dataclass, field
from typing import Any

import yaml

KEY = "0123456789" * 4


@dataclass
class Run:
    """What the server knows of a run; `state` is pending, running, finished or failed."""

    id: str
    args: dict[str, Any] = field(default_factory=dict)  # that a sweep chose
    config: dict[str, Any] = field(default_factory=dict)  # as the run itself says
    history: list[dict[str, Any]] = field(default_factory=list)
    exit_codes: list[int] = field(default_factory=list)  # of the starts that said how they ended
    agents: list[str] = field(default_factory=list)  # that it was handed to
    state: str = "pending"
    stop: bool = False  # its agent is to end it


@dataclass
class Sweep:
    config: dict[str, Any]
    runs: list[Run]


class Server:
    """`with Server() as server:` serves until the block ends; `server.env` leads clients to it."""

    def __init__(self):
        self.runs: dict[str, Run] = {}
        self.sweeps: dict[str, Sweep] = {}
        self.agents: dict[str, Sweep] = {}
        self.closing = False  # agents without a run are to end
        self.lock = threading.RLock()
        handler = type("Handler", (Handler,), {"server_state": self})
        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        self.env = {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": KEY}

    def __enter__(self) -> Server:
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.http.shutdown()
        self.http.server_close()

    # ------------------------------------------------------------------- operations of GraphQL

    def viewer(self, _: dict) -> dict:
        return {"viewer": {"id": "1", "entity": "me", "username": "me", "flags": "{}"}}

    def server_features_query(self, _: dict) -> dict:
        return {"serverInfo": {"features": []}}

    def upsert_sweep(self, variables: dict) -> dict:
        name = f"sweep{len(self.sweeps)}"
        config = yaml.safe_load(variables["config"])
        runs = [Run(f"{name}run{i}", args) for i, args in enumerate(assignments(config))]
        self.sweeps[name] = Sweep(config, runs)
        self.runs |= {run.id: run for run in runs}
        return {"upsertSweep": {"sweep": {"name": name, "project": project(variables)}}}

    def sweep_with_runs(self, variables: dict) -> dict:
        config = yaml.dump(self.sweeps[variables["sweep"]].config)
        return {"project": {"sweep": {"config": config, "runs": {"edges": []}}}}

    def create_agent(self, variables: dict) -> dict:
        name = f"agent{len(self.agents)}"
        self.agents[name] = self.sweeps[variables["sweep"]]
        return {"createAgent": {"agent": {"id": name}}}

    def heartbeat(self, variables: dict) -> dict:
        """The agent reports which of its runs are alive, and gets commands for them."""
        agent, alive = variables["id"], json.loads(variables["runState"])
        sweep, commands = self.agents[agent], []
        for run in sweep.runs:
            if run.state == "running" and run.agents[-1] == agent and run.id not in alive:
                run.state = "finished" if run.exit_codes[-1:] == [0] else "failed"
        commands += [{"type": "stop", "run_id": id} for id in alive if self.runs[id].stop]
        run = next((run for run in sweep.runs if run.state == "pending"), None)
        if run and not alive:
            run.state = "running"
            run.agents.append(agent)
            args = {name: {"value": value} for name, value in run.args.items()}
            program = sweep.config.get("program")
            commands.append({"type": "run", "run_id": run.id, "program": program, "args": args})
        elif self.closing and not alive:
            commands.append({"type": "exit"})
        return {"agentHeartbeat": {"agent": {"id": agent}, "commands": json.dumps(commands)}}

    def run_resume_status(self, variables: dict) -> dict:
        run = self.runs.get(variables["name"])
        if run is None or not run.config:
            return {"model": {"bucket": None}}
        last = json.dumps(run.history[-1] if run.history else {})
        bucket = {
            "name": run.id,
            "config": json.dumps(run.config),
            "historyLineCount": len(run.history),
            "historyTail": json.dumps([last]),
            "eventsLineCount": 0,
            "eventsTail": "[]",
            "logLineCount": 0,
            "summaryMetrics": last,
            "wandbConfig": '{"t": 1}',
        }
        return {"model": {"id": "1", "name": "p", "entity": {"name": "me"}, "bucket": bucket}}

    def upsert_bucket(self, variables: dict) -> dict:
        run = self.runs.setdefault(variables["name"], Run(variables["name"]))
        run.config |= json.loads(variables.get("config") or "{}")
        bucket = {"id": run.id, "name": run.id, "displayName": run.id, "config": "{}"}
        bucket |= {"historyLineCount": len(run.history), "project": project(variables)}
        return {"upsertBucket": {"bucket": bucket, "inserted": not run.history}}

    def create_run_files(self, variables: dict) -> dict:
        files = [{"name": name, "uploadUrl": f"{self.url}/upload"} for name in variables["files"]]
        return {"createRunFiles": {"runID": "1", "uploadHeaders": [], "files": files}}

    # ------------------------------------------------------------------- records

    def file_stream(self, run_id: str, body: dict) -> None:
        """Lines of the run's history by their offset, and the exit code of the process at last."""
        run = self.runs.setdefault(run_id, Run(run_id))
        for name, chunk in body.get("files", {}).items():
            if name == "wandb-history.jsonl":
                lines = [json.loads(line) for line in chunk["content"]]
                run.history[chunk["offset"] : chunk["offset"] + len(lines)] = lines
        if body.get("complete"):
            run.exit_codes.append(body["exitcode"])


def project(variables: dict) -> dict:
    name = variables.get("projectName") or variables.get("project") or "p"
    return {"id": "1", "name": name, "entity": {"id": "1", "name": variables.get("entity") or "me"}}


def assignments(config: dict) -> list[dict[str, Any]]:
    """Values of the parameters of each run: of a grid all, of a search three drawn at random."""
    rng, parameters = random.Random(0), config["parameters"]
    draws = 1 if config["method"] == "grid" else 3
    values = {
        name: one["values"]
        if "values" in one
        else [one["value"]]
        if "value" in one
        else [rng.uniform(one["min"], one["max"]) for _ in range(draws)]
        for name, one in parameters.items()
    }
    if config["method"] == "grid":
        return [dict(zip(values, choice)) for choice in itertools.product(*values.values())]
    return [{name: rng.choice(some) for name, some in values.items()} for _ in range(draws)]


class Handler(http.server.BaseHTTPRequestHandler):
    """HTTP around one `Server`."""

    server_state: Server
    protocol_version = "HTTP/1.1"

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # a client that is killed, or in a hurry
            super().handle()

    def answer_request(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        state, answer = self.server_state, {}
        with state.lock:
            if self.path == "/graphql":
                request = json.loads(body)
                answer = {"data": self.graphql(request["query"], request.get("variables") or {})}
            elif match := re.search(r"/([^/]+)/file_stream$", self.path):
                state.file_stream(match[1], json.loads(body))
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_PUT = answer_request  # noqa: N815  # names of http.server

    def graphql(self, query: str, variables: dict) -> dict:
        operation = re.search(r"\b(?:query|mutation)\s+(\w+)", query)[1]
        method = re.sub(r"(?<!^)(?=[A-Z])", "_", operation).lower()
        return getattr(self.server_state, method, lambda _: {})(variables)

    def log_message(self, *_: object) -> None:
        pass
