"""d4rl_compat against raw MuJoCo, D4RL's documented facts, and itself in another process."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import h5py
import mujoco
import numpy as np
import pytest

from helpers import ROOT
from tasks import d4rl_compat

# Observation and action dimensions, time limit, and the scores that count as 0 and as 100.
POINT = {
    "umaze-v1": (300, 23.85, 161.86),
    "medium-v1": (600, 13.13, 277.39),
    "large-v1": (800, 6.7, 273.99),
    "umaze-dense-v1": (300, 68.537689, 193.66285642381482),
    "medium-dense-v1": (600, 44.264742, 297.4552547777125),
    "large-dense-v1": (800, 30.569041, 303.4857382709002),
}
ADROIT = {
    "pen": (45, 24, 100, 96.262799, 3076.8331017826877),
    "door": (39, 28, 200, -56.512833, 2880.5693087298737),
    "hammer": (46, 26, 200, -274.856578, 12794.134825156867),
    "relocate": (39, 30, 200, -6.425911, 4233.877797728884),
}
MAZES = "umaze umaze-diverse medium-play medium-diverse large-play large-diverse".split()
BODIES = {
    "halfcheetah": (17, 6, 1000, -280.178953, 12135.0),
    "hopper": (11, 3, 1000, -20.272305, 3234.3),
    "walker2d": (17, 6, 1000, 1.629008, 4592.3),
    "ant": (111, 8, 1000, -325.6, 3879.7),
}
TASKS = {
    **{f"antmaze-{m}-v2": (29, 8, 700 if "umaze" in m else 1000, 0.0, 1.0) for m in MAZES},
    **{f"maze2d-{maze}": (4, 2, *facts) for maze, facts in POINT.items()},
    **{f"{body}-medium-v2": facts for body, facts in BODIES.items()},
    **{f"kitchen-{data}-v0": (60, 9, 280, 0.0, 4.0) for data in ("complete", "partial", "mixed")},
    **{f"{task}-{d}-v1": ADROIT[task] for d in ("human", "cloned", "expert") for task in ADROIT},
}
FAMILIES = """antmaze-umaze-v2 antmaze-large-diverse-v2 maze2d-umaze-v1 halfcheetah-medium-v2
    hopper-medium-v2 walker2d-medium-v2
    pen-human-v1 door-human-v1 hammer-human-v1 relocate-human-v1
    kitchen-complete-v0 kitchen-mixed-v0""".split()


def innermost(env):
    """D4RL's own task under gym's wrappers and, for the ant, D4RL's."""
    return getattr(env.unwrapped, "_wrapped_env", env.unwrapped)


def episode_hash(env, seed: int, steps: int = 60) -> str:
    """A hash of the bits of an episode's goal, observations, rewards and dones."""
    generator = np.random.default_rng(seed)
    record = hashlib.sha256(np.asarray(d4rl_compat.reset(env, seed)).tobytes())
    record.update(np.asarray(getattr(innermost(env), "target_goal", 0.0)).tobytes())
    for _ in range(steps):
        action = generator.uniform(-1, 1, env.action_space.shape).astype(np.float32)
        observation, reward, done, _ = env.step(action)
        record.update(observation.tobytes() + np.float64(reward).tobytes() + bytes([done]))
        if done:
            break
    return record.hexdigest()


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    """Run `code` in a fresh interpreter that can import d4rl_compat."""
    path = os.pathsep.join([environment.pop("PYTHONPATH", ""), str(ROOT)]).strip(os.pathsep)
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
    )


# ---------------------------------------------------------------------------------- tasks


@pytest.mark.parametrize("name", TASKS)
def test_task_is_as_d4rl_documents_it(name):
    observation_dim, action_dim, time_limit, reference_min, reference_max = TASKS[name]
    env = d4rl_compat.make(name)
    observation = d4rl_compat.reset(env, seed=0)
    assert observation.shape == env.observation_space.shape == (observation_dim,)
    assert env.action_space.shape == (action_dim,)
    np.testing.assert_array_equal(env.action_space.low, -np.ones(action_dim))
    np.testing.assert_array_equal(env.action_space.high, np.ones(action_dim))
    assert env._max_episode_steps == time_limit
    assert env.get_normalized_score(reference_min) == 0.0
    assert env.get_normalized_score(reference_max) == 1.0
    next_observation, reward, done, info = env.step(np.full(action_dim, 0.5, np.float32))
    assert next_observation.shape == (observation_dim,) and np.isfinite(next_observation).all()
    assert not np.array_equal(next_observation, observation)
    assert np.isfinite(reward) and np.ndim(reward) == 0
    assert not done and isinstance(info, dict)


def test_antmaze_succeeds_at_its_goal():
    env = d4rl_compat.make("antmaze-medium-play-v2")
    d4rl_compat.reset(env, seed=1)
    _, reward, done, _ = env.step(np.zeros(8, np.float32))
    assert (reward, done) == (0.0, False)
    ant = innermost(env)
    ant.set_xy(np.asarray(ant.target_goal) + 0.1)
    _, reward, done, _ = env.step(np.zeros(8, np.float32))
    assert (reward, done) == (1.0, True)


def test_maze2d_rewards_its_goal_and_goes_on():
    env = d4rl_compat.make("maze2d-umaze-v1")
    d4rl_compat.reset(env, seed=1)
    point = innermost(env)
    for offset, expected in ((0.2, 1.0), (0.8, 0.0)):
        point.set_state(np.asarray(point.get_target()) + [0.0, offset], np.zeros(2))
        _, reward, done, _ = env.step(np.zeros(2, np.float32))
        assert (reward, done) == (expected, False)


def test_door_reports_goal_achieved():
    env = d4rl_compat.make("door-human-v1")
    d4rl_compat.reset(env, seed=1)
    door = innermost(env)
    hinge = door.model.jnt_qposadr[door.model.joint_name2id("door_hinge")]
    for angle, expected in ((1.0, False), (1.5, True)):
        qpos = door.data.qpos.copy()
        qpos[hinge] = angle
        door.set_state(qpos, np.zeros_like(door.data.qvel))
        _, reward, done, info = env.step(np.zeros(28, np.float32))
        assert (info["goal_achieved"], done) == (expected, False)
        assert (reward > 15.0) == expected  # the three bonuses for opening: 2 + 8 + 10


# --------------------------------------------------------------------------------- physics


@pytest.mark.parametrize("name, gain", [("antmaze-umaze-v2", 30.0), ("halfcheetah-medium-v2", 1.0)])
def test_moves_as_raw_mujoco(name, gain, monkeypatch):
    """Same file, same state, same torques: the positions and velocities of bare mj_step."""
    import mujoco_py

    files = []
    load = mujoco_py.load_model_from_path

    def reading_load(path):
        files.append(Path(path).read_text())
        return load(path)

    monkeypatch.setattr(mujoco_py, "load_model_from_path", reading_load)
    env = d4rl_compat.make(name)
    d4rl_compat.reset(env, seed=4)
    simulated = innermost(env).sim.data
    model = mujoco.MjModel.from_xml_string(files[0])
    data = mujoco.MjData(model)
    data.qpos[:], data.qvel[:] = simulated.qpos, simulated.qvel
    generator = np.random.default_rng(4)
    start = data.qpos.copy()
    for _ in range(100):
        action = generator.uniform(-1, 1, env.action_space.shape)
        innermost(env).step(gain * action)  # the wrapper would round the torques to float32
        data.ctrl[:] = gain * action
        mujoco.mj_step(model, data, nstep=5)
        np.testing.assert_allclose(simulated.qpos, data.qpos, rtol=0, atol=1e-12)
        np.testing.assert_allclose(simulated.qvel, data.qvel, rtol=0, atol=1e-12)
    assert np.abs(data.qpos - start).max() > 0.1


@pytest.mark.parametrize("body", ["hopper", "walker2d"])
def test_moves_and_ends_as_under_the_last_mujoco_with_global_coordinates(body):
    """What record_old_mujoco.py recorded of gym's own classes and models under MuJoCo 2.3.3."""
    with np.load(ROOT / "tests" / "old_mujoco.npz") as file:
        old = {name: file[f"{body}/{name}"] for name in ("actions", "observations", "rewards")}
        starts = list(zip(file[f"{body}/qpos"], file[f"{body}/qvel"]))
        dones = file[f"{body}/dones"]
    assert dones.shape == (20, 50) and 100 < dones.sum() < 900
    env = innermost(d4rl_compat.make(f"{body}-medium-v2"))
    found = []
    for start, actions in zip(starts, old["actions"].astype(float)):
        env.sim.reset()
        env.set_state(*start)
        found.append([env.step(action)[:3] for action in actions])
    observations, rewards, ends = (
        np.array([[step[i] for step in episode] for episode in found]) for i in range(3)
    )
    np.testing.assert_allclose(observations, old["observations"], rtol=0, atol=1e-9)
    np.testing.assert_allclose(rewards, old["rewards"], rtol=0, atol=1e-9)
    np.testing.assert_array_equal(ends, dones)


def test_old_models_are_updated_and_nothing_else_changes(tmp_path):
    (tmp_path / "parts").mkdir()
    (tmp_path / "old.xml").write_text(
        """<mujoco><include file="parts/defaults.xml"/><option apirate="200" timestep="0.004"/>
        <worldbody><include file="parts/body.xml"/><geom name="floor" type="plane" size="1 1 1"/>
        </worldbody></mujoco>"""
    )
    (tmp_path / "parts" / "defaults.xml").write_text(
        """<mujocoinclude><default class="tool"><geom contype="2" density="500"/>
        <default class="light"><geom density="50"/></default></default></mujocoinclude>"""
    )
    (tmp_path / "parts" / "body.xml").write_text(
        """<mujocoinclude><body name="a" childclass="tool"><freejoint/><geom size="0.1"/></body>
        <body name="b"><include file="parts/ball.xml"/></body></mujocoinclude>"""
    )
    (tmp_path / "parts" / "ball.xml").write_text(
        """<mujocoinclude><freejoint/><geom class="light" size="0.1"/></mujocoinclude>"""
    )
    with pytest.raises(ValueError):
        mujoco.MjModel.from_xml_path(str(tmp_path / "old.xml"))
    model = d4rl_compat.load_model_from_path(str(tmp_path / "old.xml"))
    assert model.opt.timestep == 0.004
    # A top-level class extended "main", so the floor, which names no class, gets its values too.
    np.testing.assert_array_equal(model.geom_contype, [2, 2, 2])
    volume = 4 / 3 * np.pi * 0.1**3
    np.testing.assert_allclose(model.body_mass, [0.0, 500 * volume, 50 * volume])


# --------------------------------------------------------------------------------- seeding


@pytest.fixture(scope="module")
def hashes_of_another_process() -> dict[str, str]:
    done = run_python(
        """
        import json
        import test_d4rl_compat as test
        names, make = reversed(test.FAMILIES), test.d4rl_compat.make
        print(json.dumps({name: test.episode_hash(make(name), 5) for name in names}))
        """,
        PYTHONPATH=str(ROOT / "tests"),
        PYTHONHASHSEED="17",
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", FAMILIES)
def test_episode_is_a_function_of_seed_and_actions(name, hashes_of_another_process):
    env = d4rl_compat.make(name)
    first = episode_hash(env, seed=5)
    assert episode_hash(env, seed=6, steps=90) != first
    episode_hash(env, seed=7, steps=13)
    np.random.uniform(size=5)
    assert episode_hash(env, seed=5) == first
    env.reset()  # D4RL's own reset in between, and another environment of the same task
    env.step(env.action_space.sample())
    assert episode_hash(env, seed=5) == first
    assert episode_hash(d4rl_compat.make(name), seed=5) == first
    assert hashes_of_another_process[name] == first


@pytest.mark.parametrize("name", ["antmaze-umaze-v2", "kitchen-complete-v0"])
def test_reset_leaves_the_global_generator_alone_and_takes_any_integer(name):
    env = d4rl_compat.make(name)
    np.random.seed(3)
    expected = np.random.uniform(size=3)
    np.random.seed(3)
    first = d4rl_compat.reset(env, seed=11)
    np.testing.assert_array_equal(np.random.uniform(size=3), expected)
    np.testing.assert_array_equal(d4rl_compat.reset(env, seed=np.int64(11)), first)
    with pytest.raises(ValueError, match="between 0 and"):
        d4rl_compat.reset(env, seed=-1)


# ------------------------------------------------------------------------- errors and output


@pytest.mark.parametrize(
    "name, words",
    [
        ("antmaze-umase-v2", ["'antmaze-umase-v2'", "antmaze-umaze-v2"]),
        ("qqqq", ["'qqqq'", "none"]),
    ],
)
def test_what_cannot_be_made_says_why_in_one_line(name, words):
    with pytest.raises(ValueError) as caught:
        d4rl_compat.make(name)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words)


def test_nothing_is_printed_and_no_file_is_left(tmp_path):
    (tmp_path / "tmp").mkdir()
    with h5py.File(tmp_path / "data.hdf5", "w") as file:
        file["observations"], file["actions"] = np.zeros((3, 29)), np.zeros((3, 8))
        file["rewards"], file["terminals"] = np.zeros(3), np.zeros(3, bool)
    done = run_python(
        """
        import os, sys
        from tasks import d4rl_compat
        for name in ("antmaze-umaze-v2", "maze2d-umaze-v1", "door-human-v1", "kitchen-mixed-v0"):
            env = d4rl_compat.make(name)
            d4rl_compat.reset(env, 0)
            for _ in range(3):
                env.reset()
                env.step(env.action_space.sample())
            if name.startswith("antmaze"):
                assert len(env.get_dataset(os.environ["DATA"])["rewards"]) == 3
        assert "pybullet" not in sys.modules
        """,
        DATA=str(tmp_path / "data.hdf5"),
        TMPDIR=str(tmp_path / "tmp"),
        PYTHONPYCACHEPREFIX=str(tmp_path / "compiled"),  # compiling again warns again
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="no /proc")
def test_making_mazes_leaks_no_file_descriptors():
    d4rl_compat.make("antmaze-umaze-v2")
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(5):
        d4rl_compat.make("antmaze-umaze-v2")
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_import_is_cheap_and_silent():
    done = run_python(
        """
        import sys
        from tasks import d4rl_compat
        heavy = {"gym", "d4rl", "torch", "dm_control", "matplotlib"} & set(sys.modules)
        assert not heavy, heavy
        import importlib.util, mujoco_py, mjrl.envs.mujoco_env
        assert importlib.util.find_spec("mujoco_py") and importlib.util.find_spec("mjrl.envs")
        """
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# ------------------------------------------------------------------- the real mujoco_py, if any


FAILING = """
import sys, mujoco_py.parts
print("compiling")
print("missing", file=sys.stderr)
raise Exception("no binary")
"""
INSTALLED = {
    "import mujoco_py.parts; __version__ = '2.1.2.14'": "mujoco_py 2.1.2.14 (MuJoCo 2.1) True True",
    FAILING: f"mujoco {mujoco.__version__} (through d4rl_compat) False False",
}


@pytest.mark.parametrize("code", INSTALLED, ids=["works", "fails"])
def test_an_installed_mujoco_py_is_used_where_it_works_and_leaves_no_trace_elsewhere(
    code, tmp_path
):
    (tmp_path / "mujoco_py").mkdir()
    (tmp_path / "mujoco_py" / "__init__.py").write_text(code)
    (tmp_path / "mujoco_py" / "parts.py").write_text("")
    report = """
    import sys
    from tasks import d4rl_compat
    import mujoco_py
    print(d4rl_compat.PHYSICS, hasattr(mujoco_py, "parts"), "mujoco_py.parts" in sys.modules)
    """
    done = run_python(report, PYTHONPATH=str(tmp_path))
    assert (done.stdout, done.stderr) == (INSTALLED[code] + "\n", "")
