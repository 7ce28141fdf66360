"""Files are data: they cannot run code or refer to other files.

Each test reads a file that would make the folder `ran`, load a library or open another file.
"""

from __future__ import annotations

import ast
import json
import os
import pickle
import re
import sys
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

import tasks
from helpers import ROOT, SMALL, call, error_line, make_pendulum_data, write_dataset
from runs.errors import InputError
from tasks import d4rl_compat
from tasks.adroit import unpickle
from tasks.files import read_hdf5, read_npz
from tasks.minari import check_pyarrow


class MakesFolder:
    """Unpickling it makes the folder `ran`."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("ran",)


@pytest.fixture(autouse=True)
def nothing_ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Each test begins in an empty folder, and must not have made `ran` there."""
    monkeypatch.chdir(tmp_path)
    yield
    assert not Path("ran").exists()


def read_rows(path: Path) -> dict[str, np.ndarray]:
    return read_hdf5(path, ["observations", "actions", "rewards", "terminals"])


def refused(reads: Callable[[Path], Any], path: Path, problem: str) -> None:
    """Reading gives one line that matches."""
    with pytest.raises(InputError, match=problem) as caught:
        reads(path)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------- configs, checkpoints


@pytest.mark.parametrize("tag", ["object/apply:os.mkdir [ran]", "name:os.mkdir", "module:os"])
def test_a_config_names_no_python_object(tag: str) -> None:
    Path("config.yaml").write_text(f"seed: !!python/{tag}\n")
    assert "config.yaml" in error_line(call("--config_path", "config.yaml"))


def test_an_option_names_no_python_object() -> None:
    assert "seed" in error_line(call("--seed", "!!python/object/apply:os.mkdir [ran]"))


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_checkpoint_calls_nothing(protocol: int) -> None:
    write_dataset(Path("data.hdf5"))
    torch.save({"agent": MakesFolder()}, "model.pt", pickle_protocol=protocol)
    line = error_line(call(*SMALL, "--load_model", "model.pt", "--checkpoints_path", "runs"))
    assert "model.pt" in line


def test_the_code_has_no_other_way_to_run_what_a_file_says() -> None:
    """Except for pickles that a run's own processes exchange."""
    found = []
    files = [ROOT / "cal_ql.py", *(ROOT / "runs").rglob("*.py")]
    files += [*(ROOT / "tasks").rglob("*.py"), *(ROOT / "tools").rglob("*.py")]
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            is_open = name in ("eval", "exec", "pickle.load", "yaml.unsafe_load", "joblib.load")
            is_open |= name == "torch.load" and options.get("weights_only") != "True"
            is_open |= options.get("allow_pickle", "False") != "False"
            is_open |= name == "pickle.loads" and file.name not in ("cal_ql.py", "workers.py")
            if is_open:
                found.append(f"{file.name}: {ast.unparse(node)}")
    assert found == []


# ---------------------------------------------------------------------------- pickles and .npz


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_calls_nothing(protocol: int) -> None:
    Path("a.npy").write_bytes(pickle.dumps([{"rewards": MakesFolder()}], protocol))
    refused(unpickle, Path("a.npy"), r"calls \w+\.mkdir")


def test_an_npz_holds_no_pickles() -> None:
    np.savez("data.npz", rewards=np.array([MakesFolder()], object))
    refused(read_npz, Path("data.npz"), "data.npz: not a valid .npz file .*allow_pickle=False")


def test_an_ogbench_file_holds_no_pickles() -> None:
    pytest.importorskip("ogbench")
    arrays = {"observations": np.zeros((3, 2)), "actions": np.zeros((3, 2))}
    arrays |= {"terminals": np.zeros(3), "qpos": np.array([MakesFolder()] * 3, object)}
    np.savez("data.npz", **arrays)
    task = tasks.make("pointmaze-medium-navigate-singletask-v0")
    refused(task.rows, Path("data.npz"), "data.npz: not a valid .npz file .*allow_pickle=False")
    Path("pickle.npz").write_bytes(pickle.dumps(MakesFolder()))
    refused(task.rows, Path("pickle.npz"), "pickle.npz: not a valid .npz file .*allow_pickle=")


def test_an_npz_writes_no_file_outside() -> None:
    with zipfile.ZipFile("data.npz", "w") as file:
        file.writestr("../ran", b"")
        file.writestr("/ran", b"")
    read_npz(Path("data.npz"))
    assert not Path("../ran").exists() and not Path("/ran").exists()


# ---------------------------------------------------------------------------- HDF5


def test_an_hdf5_file_leads_to_no_other_file() -> None:
    """Not by external links (even behind soft links), external storage or virtual datasets."""
    write_dataset(Path("other.hdf5"))
    os.mkfifo("fifo")  # whose opening would wait forever

    def link(file: h5py.File) -> None:
        file["rewards"] = h5py.ExternalLink("fifo", "rewards")

    def soft_link(file: h5py.File) -> None:
        file["other"] = h5py.ExternalLink("fifo", "/")
        file["rewards"] = h5py.SoftLink("/other/rewards")

    def storage(file: h5py.File) -> None:
        file.create_dataset("rewards", (400,), "f4", external=[("fifo", 0, 1600)])

    def virtual(file: h5py.File) -> None:
        layout = h5py.VirtualLayout((400,), "f4")
        layout[:] = h5py.VirtualSource("other.hdf5", "rewards", (400,))
        file.create_virtual_dataset("rewards", layout)

    for change in (link, soft_link, storage, virtual):
        path = write_dataset(Path(f"{change.__name__}.hdf5"))
        with h5py.File(path, "a") as file:
            del file["rewards"]
            change(file)
        refused(read_rows, path, "(rewards|other) lies in another file, expected all data in this")


def test_links_within_an_hdf5_file_are_followed() -> None:
    path = write_dataset(Path("data.hdf5"))
    with h5py.File(path, "a") as file:
        file.move("rewards", "infos/rewards")
        file["rewards"] = h5py.SoftLink("/infos/rewards")
    assert read_rows(path)["rewards"].shape == (400,)


def test_an_hdf5_filter_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """HDF5 only loads filters from folders that the user has named, not from the data's folder."""
    Path("libh5bogus.so").write_bytes(b"\x7fELF")
    path = write_dataset(Path("data.hdf5"))
    with h5py.File(path, "a") as file:
        del file["rewards"]
        options = dict(chunks=(100,), compression=32015, allow_unknown_filter=True)
        file.create_dataset("rewards", (400,), "f4", **options)
    refused(read_rows, path, "compressed by HDF5 filter 32015.*install it")


# ---------------------------------------------------------------------------- Minari

PENDULUM = "toys/pendulum-v0"


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Minari's root folder with a dataset of two steps, and its metadata."""
    pytest.importorskip("minari")
    pytest.importorskip("gymnasium_robotics")
    root = tmp_path_factory.mktemp("minari")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(root))
        path = make_pendulum_data(PENDULUM, root)
    return {"root": root, "path": path, "metadata": json.loads(path.read_text())}


def make_with(recorded: dict[str, Any], **changed: Any) -> tasks.Task:
    """The task of that dataset with other metadata; None leaves an entry out."""
    metadata = {k: v for k, v in (recorded["metadata"] | changed).items() if v is not None}
    recorded["path"].write_text(json.dumps(metadata))
    return tasks.make(PENDULUM, str(recorded["root"]))


def specification(recorded: dict[str, Any], **changed: Any) -> str:
    return json.dumps(json.loads(recorded["metadata"]["env_spec"]) | changed)


MKDIR = {"entry_point": "os:mkdir", "kwargs": {"path": "ran"}}
WRAPPER = {"name": "Ran", "entry_point": "os:mkdir", "kwargs": {"path": "ran"}}
SPECIFICATIONS = [
    MKDIR,
    MKDIR | {"id": "Ran-v0"},
    MKDIR | {"id": "os:Ran-v0"},
    MKDIR | {"id": "GymV26Environment-v0"},
    MKDIR | {"entry_point": "subprocess:check_output", "kwargs": {"args": ["mkdir", "ran"]}},
    {"additional_wrappers": [WRAPPER]},
]


@pytest.mark.parametrize("changed", SPECIFICATIONS, ids=[str(c)[:60] for c in SPECIFICATIONS])
@pytest.mark.parametrize("key", ["env_spec", "eval_env_spec"])
def test_a_minari_dataset_makes_registered_environments_alone(
    key: str, changed: dict[str, Any], recorded: dict[str, Any]
) -> None:
    with pytest.raises(InputError, match="a dataset must run no code"):
        make_with(recorded, **{key: specification(recorded, **changed)})


def test_a_minari_dataset_without_spaces_makes_no_environment_to_find_them(
    recorded: dict[str, Any],
) -> None:
    with pytest.raises(InputError, match="its metadata lacks observation_space"):
        make_with(recorded, observation_space=None, env_spec=specification(recorded, **MKDIR))


def test_the_arguments_are_the_datasets(recorded: dict[str, Any]) -> None:
    text = specification(recorded, kwargs={"g": 1.0}, max_episode_steps=7)
    task = make_with(recorded, env_spec=text, eval_env_spec=text)
    assert (task.env.unwrapped.g, task.max_episode_steps) == (1.0, 7)
    assert make_with(recorded).max_episode_steps == 200


def test_a_minari_dataset_leads_to_no_other_file(recorded: dict[str, Any]) -> None:
    path = recorded["path"].parent / "main_data.hdf5"
    whole = path.read_bytes()
    with h5py.File(path, "a") as file:
        del file["episode_0/rewards"]
        file["episode_0/rewards"] = h5py.ExternalLink("other.hdf5", "rewards")
    with pytest.raises(InputError, match="episode_0/rewards lies in another file"):
        make_with(recorded)
    path.write_bytes(whole)


def test_arrow_files_need_a_pyarrow_that_unpickles_nothing(
    recorded: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until 14.0.1, an extension type in an Arrow file was a pickle: CVE-2023-47248."""
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match="pyarrow; install it by `pip install pyarrow`"):
        make_with(recorded, data_format="arrow")
    old = types.SimpleNamespace(__version__="14.0.0")
    monkeypatch.setitem(sys.modules, "pyarrow", old)
    with pytest.raises(InputError, match="found pyarrow 14.0.0.*expected 14.0.1 or newer"):
        make_with(recorded, data_format="parquet")
    old.__version__ = "14.0.1"
    check_pyarrow("arrow", Path("data"))


# ---------------------------------------------------------------------------- models in XML


def test_a_model_loads_no_library_and_reads_no_entity() -> None:
    """D4RL's models come with its package, and Minari's arguments may name one."""
    plugin = '<mujoco><extension><plugin plugin="ran"/></extension></mujoco>'
    with pytest.raises(ValueError, match="plugin"):
        d4rl_compat.load_model_from_xml(plugin)
    Path("secret").write_text("secret")
    entity = '<!DOCTYPE m [<!ENTITY e SYSTEM "secret">]><mujoco model="a"><a>&e;</a></mujoco>'
    Path("model.xml").write_text(entity)
    with pytest.raises(Exception, match="entity") as caught:
        d4rl_compat.load_model_from_path("model.xml")
    assert not re.search("secret", str(caught.value))
