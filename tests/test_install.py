"""The requirement files name what is imported here and what packages without dependencies need."""

import ast
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
FOLDERS = ". tasks runs tools tools/recipes examples tests".split()
PYTHON_FILES = [path for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.py"))]
OURS = {path.stem for path in PYTHON_FILES} | set(FOLDERS)
NOT_LISTED = {"mujoco_py", "mjrl"}  # d4rl_compat has stand-ins
NOT_LISTED |= {"gym_notices", "pyarrow"}  # gym brings it; only files in arrow format need it
LEFT_OUT = {"mujoco-py", "pybullet", "labmaze"}
NO_DEPS = "requirements-no-deps.txt"
PACKAGES = metadata.packages_distributions()
INSTALL = re.compile(rf"pip install (.* )?-r requirements(-\w+)?.txt.*&&.*pip install .*{NO_DEPS}")


def listed(*files: str) -> dict[str, Requirement]:
    """What the requirement files, and those that they include, ask for on this Python, by name."""
    found = {}
    for file in files:
        for line in (ROOT / file).read_text().splitlines():
            line = re.sub(r"(^| )#.*", "", line)
            if line.startswith("-r "):
                found |= listed(line.removeprefix("-r "))
            elif line and ((one := Requirement(line)).marker is None or one.marker.evaluate()):
                found[canonicalize_name(one.name)] = one
    return found


RUN = listed("requirements-gymnasium.txt", NO_DEPS)
DEVELOP = listed("requirements-dev.txt", NO_DEPS)


def imported(path: Path) -> set[str]:
    """The packages that a file of ours imports at any place, by the names that they install by."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            modules.add(node.module.split(".")[0])
    modules -= OURS | NOT_LISTED | set(sys.stdlib_module_names)
    return {canonicalize_name(PACKAGES.get(module, [module])[0]) for module in modules}


@pytest.mark.parametrize("path", PYTHON_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_is_imported_is_listed(path: Path) -> None:
    assert imported(path) <= set(DEVELOP if path.parent.name == "tests" else RUN)


@pytest.mark.parametrize("name", listed(NO_DEPS))
def test_what_a_package_without_dependencies_asks_for_is_listed(name: str) -> None:
    asked = [Requirement(text) for text in metadata.requires(name)]
    asked = [one for one in asked if one.marker is None or one.marker.evaluate({"extra": ""})]
    assert {canonicalize_name(one.name) for one in asked} - set(RUN) <= LEFT_OUT
    for one in asked:
        if one.name not in LEFT_OUT:
            assert one.specifier.contains(metadata.version(one.name)), one


def test_the_same_commands_install_everywhere() -> None:
    readme = (ROOT / "README.md").read_text().splitlines()
    commands = [line for line in readme if line.startswith("python3 -m venv")]
    dockerfile = (ROOT / "Dockerfile").read_text().replace("\\\n", "")
    commands += re.findall("^RUN (pip install .*)", dockerfile, re.MULTILINE)
    assert len(commands) == 3 and all(INSTALL.search(command) for command in commands)


@pytest.mark.parametrize("module", ["d4rl", "ogbench"])
def test_a_package_that_is_missing_is_named_with_its_file(module: str) -> None:
    task = {"d4rl": "maze2d-umaze-v1", "ogbench": "cube-single-play-singletask-v0"}[module]
    code = f"import sys; sys.modules[{module!r}] = None; import tasks; tasks.make({task!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    line = done.stderr.splitlines()[-1]
    assert module in line and NO_DEPS in line
