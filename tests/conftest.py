"""Every test on one core, nothing sent to W&B, the longest files first."""

import os
from collections.abc import Iterator
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["WANDB_MODE"] = "disabled"

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

torch.set_num_threads(1)
settings.register_profile("tests", deadline=None, max_examples=50)  # a busy machine is no failure
settings.load_profile("tests")

pytest.register_assert_rewrite("helpers")  # a failure there also shows its values

LONGEST = """test_resume test_ogbench test_update test_methods test_wandb test_sweeps test_minari
    test_adroit test_make_dataset test_d4rl_compat test_locomotion test_evaluation test_tools
    test_cli""".split()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start the longest files first, so that no process still runs one when the others are done."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONGEST)))


@pytest.fixture(autouse=True)
def precision_of_this_test() -> Iterator[None]:
    """A run sets the precision of all products in this process."""
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, empty."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
