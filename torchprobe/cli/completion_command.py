"""``torchprobe completion``: completes commands and options in a shell, as click does it."""

from __future__ import annotations

import click

from torchprobe.cli.tools import exit_codes

SHELLS = ("bash", "zsh", "fish")
VARIABLE = "_TORCHPROBE_COMPLETE"


@click.command(epilog=exit_codes(), short_help="Print a script that completes commands in your shell.")
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print a script that completes the commands and options of torchprobe in SHELL.

    \b
    Put it where your shell reads it:
      torchprobe completion bash >> ~/.bashrc
      torchprobe completion zsh >> ~/.zshrc
      torchprobe completion fish > ~/.config/fish/completions/torchprobe.fish

    bash must be 4.4 or newer. Each completion starts Python and PyTorch, so it takes a moment.
    """
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None  # click knows these three
    # The source alone: source() would run bash to see its version, and fail where there is none.
    one = kind(context.find_root().command, {}, "torchprobe", VARIABLE)
    click.echo(one.source_template % one.source_vars())
