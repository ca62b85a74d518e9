"""A real browser without a window, for what can only be seen."""

from __future__ import annotations

import shutil

NAMES = ("chromium", "chromium-browser", "google-chrome")


def find_browser() -> str | None:
    """Path of the first that is installed; `apt-get install chromium` brings one."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)
