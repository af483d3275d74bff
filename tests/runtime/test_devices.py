"""How jax starts on several virtual devices of a CPU."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]

COUNT = """
import os, pathlib, jax
from metaformer_jax.runtime import devices
{before}
devices.configure("")
jax.devices()
names = [p.read_text() for p in pathlib.Path("/proc/self/task").glob("*/comm")]
print(len(jax.devices()), sum("XLAEigen" in name for name in names))
"""


@pytest.mark.parametrize("flags, before, nproc, expected", [
    ("--xla_force_host_platform_device_count=4", "", None, (4, 64)),
    ("--xla_force_host_platform_device_count=8 "
     "--xla_force_host_platform_device_count=3", "", None, (3, 48)),
    ("", "jax.config.update('jax_num_cpu_devices', 2)", None, (2, 32)),
    ("--xla_force_host_platform_device_count=4", "", "5", (4, 5)),
    ("--xla_force_host_platform_device_count=1", "", None,
     (1, len(os.sched_getaffinity(0))))])
def test_virtual_devices_have_threads_for_their_collectives(
    flags, before, nproc, expected):
  """As many threads as devices are too few; see `devices.configure`."""
  env = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
  del env["PJRT_NPROC"]
  if nproc:
    env["PJRT_NPROC"] = nproc
  found = subprocess.run(
      [sys.executable, "-c", COUNT.format(before=before)], env=env,
      check=True, capture_output=True, text=True).stdout
  assert tuple(map(int, found.split())) == expected
