"""How jax starts on several virtual devices of a CPU."""

import os

import command_line
import pytest

COUNT = """
import os, pathlib, jax
from metaformer_jax.runtime import devices
del os.environ["PJRT_NPROC"]
{before}
devices.configure("")
jax.devices()
names = [p.read_text() for p in pathlib.Path("/proc/self/task").glob("*/comm")]
print(len(jax.devices()), sum("XLAEigen" in name for name in names))
"""
FLAG = "--xla_force_host_platform_device_count"


@pytest.mark.parametrize("flags, before, expected", [
    (f"{FLAG}=4", "", (4, 64)), (f"{FLAG}=8 {FLAG}=3", "", (3, 48)),
    ("", "jax.config.update('jax_num_cpu_devices', 2)", (2, 32)),
    (f"{FLAG}=4", "os.environ['PJRT_NPROC'] = '5'", (4, 5)),
    (f"{FLAG}=1", "", (1, len(os.sched_getaffinity(0))))])
def test_virtual_devices_have_threads_for_their_collectives(
    flags, before, expected):
  """As many threads as devices are too few; see `devices.configure`."""
  done = command_line.python(["-c", COUNT.format(before=before)],
                             environment={"XLA_FLAGS": flags})
  assert tuple(map(int, done.stdout.split())) == expected, done.stderr
