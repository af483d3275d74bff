"""A disk that is soon full."""

import contextlib
import subprocess

import pytest


@contextlib.contextmanager
def mounted(folder):
  """Mounts 4 MiB at a folder; skips the test if that is not permitted."""
  done = subprocess.run(
      ["mount", "-t", "tmpfs", "-o", "size=4m", "none", folder],
      capture_output=True, check=False)
  if done.returncode:
    pytest.skip("this user cannot mount a disk")
  try:
    yield
  finally:
    subprocess.run(["umount", folder], check=True)
