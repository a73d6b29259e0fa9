"""Say whether the browser tests can run, and install Chromium first where that is allowed (Debian or Ubuntu,
as root).
"""

import os
import shutil
import subprocess
import sys

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def find() -> str | None:
    """The path of a Chromium or Chrome on this machine: CHROMIUM if set, else the first on PATH."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


def install() -> None:
    if not (sys.platform == "linux" and os.geteuid() == 0 and shutil.which("apt-get")):
        return
    print("Installing Chromium for the browser tests ...", flush=True)
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["apt-get", "update", "-qq"], ["apt-get", "install", "-y", "-qq", "chromium"]):
        done = subprocess.run(command, env=environment, text=True, capture_output=True)
        if done.returncode:
            print(f"{' '.join(command)} failed: {done.stderr.strip()[-300:]}", file=sys.stderr)
            return


if __name__ == "__main__":
    if not find():
        install()
    if not find():
        print(
            "The browser tests will be skipped: there is no Chromium or Chrome here. Install one, or set CHROMIUM to "
            "its path.",
            file=sys.stderr,
        )
