"""Eight fake devices, and strictness, for every test; set before jax starts."""

import contextlib
import gc
import os
import tempfile

import fake_gcs
import fast_compilation
import pytest

os.environ["XLA_FLAGS"] = " ".join(
    [os.environ.get("XLA_FLAGS", ""),
     "--xla_force_host_platform_device_count=8",
     # On a busy machine a device may keep the others waiting for long; XLA
     # would end the process after 40 seconds.
     "--xla_cpu_collective_call_terminate_timeout_seconds=600",
     fast_compilation.XLA_FLAGS]).strip()
# Programs are many small objects that stay: collecting more often takes a
# quarter of the time.
gc.set_threshold(50_000, 20, 100)

# Processes that tests start need not compile the package again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

os.environ["JAX_PLATFORMS"] = "cpu"
# As `runtime.devices.configure` does: collectives of eight devices can
# deadlock with only eight threads.
os.environ["PJRT_NPROC"] = "128"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"

# Programs compiled by one test serve the others, and no later session. Workers
# have the folder of the process that has started them.
_CACHE = contextlib.ExitStack()
if "PYTEST_XDIST_WORKER" not in os.environ:
  os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE.enter_context(
      tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"


def pytest_addoption(parser):
  parser.addoption("--golden", default="golden_full",
                   help="folder of the full-size files, for -m parity")


def pytest_xdist_auto_num_workers():
  # One more than there are cores: many tests wait for processes of their own.
  return len(os.sched_getaffinity(0)) + 1


def pytest_collection_finish():
  fast_compilation.share_contexts()


@pytest.fixture(scope="module")
def cloud():
  """Object storage on the loopback: `fake_gcs.serving`."""
  with fake_gcs.serving() as found:
    yield found


@pytest.fixture
def proxy(cloud):
  """The proxy of `cloud`, without faults and without what it has counted."""
  yield cloud[1]
  cloud[1].faults, cloud[1].is_away = iter(()), False
  cloud[1].counts, cloud[1].requests = False, []


def pytest_unconfigure():
  _CACHE.close()
