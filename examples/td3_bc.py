"""A term in the actor's loss: the squared distance to the data's actions, as in TD3+BC.

    python examples/td3_bc.py --config_path configs/quickstart.yaml --name td3-bc

TD3+BC is Fujimoto and Gu, 2021, arXiv 2106.06860.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import cal_ql
from runs.errors import run_program

WEIGHT = 2.5


class Agent(cal_ql.Agent):
    def actor_loss(self, batch, policy, *args) -> tuple[Tensor, cal_ql.Scalars]:
        loss, metrics = super().actor_loss(batch, policy, *args)
        bc_loss = (torch.tanh(policy.mean) - batch.actions).square().mean()
        return loss + WEIGHT * bc_loss, metrics | {"td3_bc_loss": bc_loss}


cal_ql.Agent = Agent

if __name__ == "__main__":
    sys.exit(run_program(cal_ql.main, "td3_bc.py", goes_on=True))
