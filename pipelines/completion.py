"""`xattn-video completion`: a script that completes commands and options in a shell."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from xattn_video_pipelines.common.settings import Option, Settings

EXAMPLE = """\
example:
  xattn-video completion bash > ~/.local/share/bash-completion/completions/xattn-video
  xattn-video completion zsh > ~/.zfunc/_xattn-video
  xattn-video completion fish > ~/.config/fish/completions/xattn-video.fish
the script knows the commands and options of this version; make it again after an update
"""


@dataclass(frozen=True)
class CompletionSettings(Settings):
    """For which shell."""

    shell: Annotated[Literal["bash", "zsh", "fish"], Option("the shell that reads the script", metavar="SHELL")]


def command(settings: CompletionSettings) -> int:
    """`xattn-video completion`: print the script; returns 0."""
    # The script has the options of all commands, which only the table of commands knows.
    from xattn_video_pipelines.cli import build_whole_app

    print(build_whole_app().generate_completion(shell=settings.shell), end="")
    return 0
