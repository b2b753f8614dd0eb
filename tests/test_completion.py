"""The script of `xattn-video completion` completes commands, options and choices in a real shell."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from tests.cli_tools import run_command


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash here")
def test_bash_completes_commands_options_and_choices(capfd: pytest.CaptureFixture[str]) -> None:
    done = run_command(capfd, "completion", "bash")
    assert (done.code, done.err) == (0, "")

    def completed(*words: str) -> set[str]:
        ask = (
            f"COMP_WORDS=({' '.join(map(repr, ('xattn-video', *words)))})\nCOMP_CWORD={len(words)}\n"
            'function="$(complete -p xattn-video | sed "s/.*-F \\([^ ]*\\).*/\\1/")"\n$function\n'
            'printf "%s\\n" "${COMPREPLY[@]}"'
        )
        shell = subprocess.run(["bash"], input=f"{done.out}\n{ask}", capture_output=True, text=True, timeout=60)
        assert shell.returncode == 0, shell.stderr
        return set(shell.stdout.split())

    assert completed("com") == {"compare", "completion"}
    assert completed("generate", "--thr") == {"--threshold", "--threshold-ramp"}
    assert completed("sweep", "--thr") == {"--threshold-ramps", "--thresholds"}
    assert completed("compare", "--lpips-net", "") == {"alex", "vgg", "squeeze"}
