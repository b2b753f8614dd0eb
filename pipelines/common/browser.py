"""Show a page that was written to the user."""

from __future__ import annotations

from pathlib import Path

from xattn_video_pipelines.common.terminal import say


def show_page(page: Path) -> None:
    """Open an HTML file in the user's browser; where there is none, say so and name the file."""
    import webbrowser

    if not webbrowser.open(page.resolve().as_uri()):
        say(f"no browser could be started; open {page} in one")
