"""Code in an interpreter of its own, where nothing has been imported yet."""

import subprocess
import sys


def run(code: str) -> str:
    """What ``code`` prints; it must end well."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
