"""The update of CORL's cal_ql.py, to compare its speed with ours."""

import contextlib
import importlib.util
import io
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import cal_ql
from runs.errors import InputError
from tasks import d4rl_compat  # noqa: F401 - lets CORL's `import d4rl` succeed

HIDDEN_DIM, ACTOR_LAYERS, N_CRITICS = 256, 3, 2  # its networks have no option for these
SHARED = """discount soft_target_update_rate alpha_multiplier use_automatic_entropy_tuning
    backup_entropy policy_lr qf_lr bc_steps target_update_period cql_n_actions
    cql_importance_sample cql_lagrange cql_target_action_gap cql_temp cql_alpha
    cql_max_target_backup cql_clip_diff_min cql_clip_diff_max""".split()


def load_module(path: Path) -> ModuleType:
    """CORL's cal_ql.py as a module; raises `InputError` for any other file."""
    name = "corl_cal_ql"
    try:
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # where its dataclass looks for it
        with contextlib.redirect_stderr(io.StringIO()):  # D4RL's warnings
            spec.loader.exec_module(module)
        assert module.CalQL and module.FullyConnectedQFunction and module.TanhGaussianPolicy
    except Exception as error:  # code of others can raise any exception
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"against: {path} is not CORL's cal_ql.py ({reason})") from None
    return module


def has_its_sizes(config: cal_ql.Config) -> bool:
    """Whether CORL's networks can have the configuration's sizes."""
    sizes = config.hidden_dim, config.actor_n_hidden_layers, config.n_critics
    others = config.critic_layer_norm, config.actor_layer_norm, config.n_target_critics
    return sizes == (HIDDEN_DIM, ACTOR_LAYERS, N_CRITICS) and not any(others)


def make_update(
    path: Path, config: cal_ql.Config, batch: cal_ql.Batch, device: torch.device
) -> Callable[[], Any]:
    """CORL's update with these options on this batch, as its training loop calls it."""
    module = load_module(path)
    sizes = batch.observations.shape[1], batch.actions.shape[1]
    networks = {}
    for name in ("critic_1", "critic_2"):
        critic = module.FullyConnectedQFunction(
            *sizes, config.orthogonal_init, config.q_n_hidden_layers
        ).to(device)
        networks[name] = critic
        networks[f"{name}_optimizer"] = torch.optim.Adam(critic.parameters(), config.qf_lr)
    actor = module.TanhGaussianPolicy(*sizes, 1.0, orthogonal_init=config.orthogonal_init)
    actor = actor.to(device)
    optimizer = torch.optim.Adam(actor.parameters(), config.policy_lr)
    options = {name: getattr(config, name) for name in SHARED}
    trainer = module.CalQL(
        **networks,
        actor=actor,
        actor_optimizer=optimizer,
        target_entropy=-float(sizes[1]),
        device=str(device),
        **options,
    )
    columns = [column if column.ndim == 2 else column[:, None] for column in batch]
    return lambda: trainer.train(columns)
