"""Every test on one core, nothing sent to W&B."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["WANDB_MODE"] = "disabled"

import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

torch.set_num_threads(1)
settings.register_profile("tests", deadline=None, max_examples=50)  # a busy machine is no failure
settings.load_profile("tests")
