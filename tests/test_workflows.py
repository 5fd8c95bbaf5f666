"""What runs on every push: the same commands as here, with no more rights than needed, and a recipe that states what the package states."""

from __future__ import annotations

import re
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from torchprobe.common.messages import DISTRIBUTION
from torchprobe.common.version import VERSION

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
MAKEFILE = (ROOT / "Makefile").read_text()


def jobs(path: Path) -> dict[str, dict[str, Any]]:
    return yaml.safe_load(path.read_text())["jobs"]


def commands(path: Path) -> list[str]:
    return [step["run"] for job in jobs(path).values() for step in job["steps"] if "run" in step]


def matrix(path: Path, job: str) -> dict[str, Any]:
    return jobs(path)[job]["strategy"]["matrix"]


def test_the_three_are_there() -> None:
    assert [path.stem for path in WORKFLOWS] == ["docs", "tests", "wheels"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_commands_are_those_of_the_makefile(path: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", MAKEFILE, re.MULTILINE))
    for command in commands(path):
        if command.startswith("make "):
            target = command.split()[1].strip('"')
            wanted = {entry["target"] for entry in matrix(path, "torch")["include"]} if target == "$TARGET" else {target}
            assert wanted <= targets, command
        elif "pytest" in command:
            assert command in MAKEFILE.replace("$(WORKERS)", "2")
        else:
            assert command.startswith(("python -m pip install ", "python -m cibuildwheel ")), command


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_rights_are_few_and_actions_have_versions(path: Path) -> None:
    content = yaml.safe_load(path.read_text())
    assert content["permissions"] == {"contents": "read"} and content["concurrency"]["cancel-in-progress"]
    for job in content["jobs"].values():
        assert set(job.get("permissions", {})) <= {"id-token", "pages"}
        for step in job["steps"]:
            assert re.search(r"@(v\d+|release/v\d+)$", step["uses"]) if "uses" in step else step["run"]
            if step.get("uses", "").startswith("actions/checkout"):
                assert step["with"]["persist-credentials"] is False
    assert "secrets." not in path.read_text()  # publishing is trusted, without a token


def test_every_python_and_the_oldest_and_newest_torch() -> None:
    tests = ROOT / ".github" / "workflows" / "tests.yml"
    about = metadata.metadata(DISTRIBUTION)
    named = {line.rpartition(" ")[2] for line in about.get_all("Classifier", []) if re.search(r"Python :: 3\.\d+$", line)}
    assert set(matrix(tests, "linux")["python"]) == named
    torch = next(Requirement(line) for line in metadata.requires(DISTRIBUTION) or [] if Requirement(line).name == "torch")
    versions = [entry["torch"] for entry in matrix(tests, "torch")["include"]]
    (oldest,) = [str(one.version) for one in torch.specifier]
    assert versions[0].startswith(f"torch=={oldest}.0 ") and versions[-1].startswith("--pre torch ")
    setup = (ROOT / "setup.py").read_text()
    assert "KERNELS_FROM = (2, 10)" in setup and any(version.startswith("torch==2.10.0 ") for version in versions)


@pytest.mark.parametrize("linter", [["zizmor", "--offline", ".github"], ["actionlint"]], ids=lambda command: command[0])
def test_linters_are_quiet(linter: list[str]) -> None:
    if shutil.which(linter[0]) is None:
        pytest.skip(f"{linter[0]} is not installed")
    done = subprocess.run(linter, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_recipe_states_what_the_package_states() -> None:
    recipe = yaml.safe_load((ROOT / "recipe" / "recipe.yaml").read_text())
    assert recipe["context"]["version"] == VERSION and Version(VERSION)
    wanted = {}
    for line in metadata.requires(DISTRIBUTION) or []:
        requirement = Requirement(line)
        if "extra" not in str(requirement.marker):
            wanted["pytorch" if requirement.name == "torch" else requirement.name] = str(requirement.specifier)
    stated = dict((line if isinstance(line, str) else line["then"]).partition(" ")[::2] for line in recipe["requirements"]["run"])
    assert stated.pop("python") == ""
    assert stated.pop("pytorch") == ">=2.10" and wanted.pop("pytorch") == ">=2.6"  # with kernels, and without
    assert stated == wanted
