"""``torchprobe completion``, and help that fits a terminal of 80 columns."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from torchprobe import cli


def commands(command: click.Command, name: str = "torchprobe") -> Iterator[tuple[str, click.Command]]:
    yield name, command
    if isinstance(command, click.Group):
        for one, sub in command.commands.items():
            yield from commands(sub, f"{name} {one}")


ALL = dict(commands(cli.cli))


@pytest.mark.parametrize("name", ALL)
def test_help_fits_80_columns(name: str) -> None:
    context = click.Context(ALL[name], info_name=name, terminal_width=80, max_content_width=80)
    lines = ALL[name].get_help(context).splitlines()
    assert [line for line in lines if len(line) > 80] == []


def test_summaries_are_whole_in_80_columns() -> None:
    for name, command in ALL.items():
        if isinstance(command, click.Group):
            context = click.Context(command, info_name=name, terminal_width=80, max_content_width=80)
            listed = command.get_help(context).partition("Commands:\n")[2].partition("\n\n")[0]
            assert "..." not in listed and listed.count("\n") + 1 == len(command.commands), name


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_of_a_shell(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["completion", shell])
    script = capsys.readouterr().out
    assert ended.value.code == 0 and f"_TORCHPROBE_COMPLETE={shell}_complete" in script
    if shutil.which(shell):
        assert subprocess.run([shell, "-n"], input=script, text=True, capture_output=True).returncode == 0


def test_another_shell_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["completion", "tcsh"])
    assert ended.value.code == 2 and "'bash', 'zsh', 'fish'" in capsys.readouterr().err


def test_a_command_is_completed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What the script asks for when the user types ``torchprobe sc``."""
    monkeypatch.setenv("_TORCHPROBE_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", "torchprobe sc")
    monkeypatch.setenv("COMP_CWORD", "1")
    with pytest.raises(SystemExit):
        cli.main([])
    assert capsys.readouterr().out.split() == ["plain,scan"]


def test_the_module_is_the_command() -> None:
    found = subprocess.run([sys.executable, "-m", "torchprobe", "--version"], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert found.returncode == 0 and found.stdout.startswith("torchprobe ")
