"""The bound of an update: what it must compute and move, and how fast the device does that."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import cal_ql

aten = torch.ops.aten
PRODUCTS = (aten.mm, aten.bmm, aten.addmm, aten.baddbmm)


def n_critic_rows(config: cal_ql.Config, kind: cal_ql.UpdateKind) -> int:
    """Actions whose values the critics' loss takes: the data's and those of the regularizer."""
    n_sampled = 3 * config.cql_n_actions if kind.cql_alpha else 0
    return config.batch_size * (1 + n_sampled)


def flops(
    config: cal_ql.Config, kind: cal_ql.UpdateKind, observation_dim: int, action_dim: int
) -> float:
    """Floating-point operations of the matrix products that an update needs."""
    batch, n, hidden = config.batch_size, config.cql_n_actions, config.hidden_dim

    def critics(rows: int, n_critics: int = config.n_critics) -> tuple[int, int]:
        """Multiply-adds forward (a weight's gradient takes as many), and of the input gradients."""
        inner = rows * hidden * (hidden * (config.q_n_hidden_layers - 1) + 1)
        first = hidden * (batch * observation_dim + rows * action_dim)
        return n_critics * (first + inner), n_critics * inner

    learned, learned_inputs = critics(n_critic_rows(config, kind))
    n_target = batch * (n if config.cql_max_target_backup else 1)
    target, _ = critics(n_target, config.n_target_critics or config.n_critics)
    inner = batch * hidden * (hidden * (config.actor_n_hidden_layers - 1) + 2 * action_dim)
    actor = batch * hidden * observation_dim + inner
    total = 2 * learned + learned_inputs + target
    total += 2 * actor  # at s and s'
    if kind.trains_actor:
        total += actor + inner  # backward at s
    if kind.trains_actor and not kind.cloning:
        judged, judged_inputs = critics(batch)  # the input gradient reaches the actions
        total += judged + judged_inputs + config.n_critics * batch * hidden * action_dim
    return 2.0 * total


@contextlib.contextmanager
def in_one_piece() -> Iterator[None]:
    """Within, critics do not split batches for a CPU's cache: they compute as on a GPU."""
    size = cal_ql.CPU_CACHE
    cal_ql.CPU_CACHE = sys.maxsize
    try:
        yield
    finally:
        cal_ql.CPU_CACHE = size


class ProductBytes(TorchDispatchMode):
    """Within, adds the bytes of each matrix product's factors and result to `total`."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket in PRODUCTS:
            tensors = [value for value in (*args, result) if torch.is_tensor(value)]
            self.total += sum(tensor.nbytes for tensor in tensors)
        return result


def bytes_moved(agent: cal_ql.Agent, batch: cal_ql.Batch, kind: cal_ql.UpdateKind) -> int:
    """Bytes that an update moves if all other operations are fused into its matrix products.

    Adam reads parameters, gradients and two moments, and writes all but the gradients. The update
    of the target critics reads the critics and the targets, and writes the targets.
    """
    with in_one_piece(), ProductBytes() as products:
        gradients, _ = agent.gradients(batch, agent.draw_noise(kind), kind)
    parameter_bytes = sum(p.nbytes for name in gradients for p in agent.learned[name])
    target_bytes = sum(p.nbytes for p in agent.target_critic.parameters())
    return products.total + 7 * parameter_bytes + 3 * target_bytes


def hidden_products(
    config: cal_ql.Config, kind: cal_ql.UpdateKind, device: torch.device
) -> Callable[[int], None]:
    """A function that computes the three products of a critics' hidden layer, in pieces of rows."""
    rows, hidden, n = n_critic_rows(config, kind), config.hidden_dim, config.n_critics
    x, y, out = (torch.randn(n, rows, hidden, device=device) for _ in range(3))
    weight, weight_out = (torch.randn(n, hidden, hidden, device=device) for _ in range(2))

    def multiply(size: int) -> None:
        for a, b, c in zip(x.split(size, 1), y.split(size, 1), out.split(size, 1)):
            torch.bmm(a, weight, out=c)
            torch.bmm(b, weight.mT, out=c)
            torch.bmm(a.mT, b, out=weight_out)

    return multiply


def hidden_flops(config: cal_ql.Config, kind: cal_ql.UpdateKind) -> float:
    """Floating-point operations of the three products of `hidden_products`."""
    rows = n_critic_rows(config, kind)
    return 3.0 * 2.0 * config.n_critics * rows * config.hidden_dim**2


def hidden_copy(
    config: cal_ql.Config, kind: cal_ql.UpdateKind, device: torch.device
) -> tuple[Callable, int]:
    """A copy of the values of a hidden layer of the critics, and the bytes that it moves."""
    rows = n_critic_rows(config, kind)
    x, y = (torch.zeros(config.n_critics, rows, config.hidden_dim, device=device) for _ in range(2))
    return lambda: y.copy_(x), 2 * x.nbytes
