"""Another critic: each hidden unit is gated by x * sigmoid(slope * x), and the slopes are learned.

python examples/gated_critic.py --config_path configs/quickstart.yaml --name gated
"""

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import cal_ql
from runs.errors import run_program


class GatedCritic(cal_ql.Critic):
    def __init__(self, observation_dim: int, action_dim: int, config: cal_ql.Config):
        super().__init__(observation_dim, action_dim, config)
        self.slopes = nn.ParameterList(torch.ones_like(bias) for bias in self.biases[:-1])

    def activation(self, x: Tensor, layer: int) -> Tensor:
        slopes = self.slopes[layer].view(-1, *(1,) * (x.ndim - 2), x.shape[-1])  # [C, ..., hidden]
        return x * torch.sigmoid(slopes * x)


cal_ql.Critic = GatedCritic

if __name__ == "__main__":
    sys.exit(run_program(cal_ql.main, "gated_critic.py", goes_on=True))
