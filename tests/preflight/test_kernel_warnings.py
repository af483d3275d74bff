"""What a run is told of branches without a kernel, before it is compiled."""

import preflight_cases as cases
import pytest

from metaformer_jax import errors, tasks
from metaformer_jax.config import resolve
from metaformer_jax.preflight import compilation, report, topologies
from metaformer_jax.runtime import devices


def lowered(platform="tpu", **changes):
  config = cases.small_experiment()
  config.compile.kernels = "pallas"
  config.train.batch_size = 64
  config.model.update(
      {"depths": (2, 1), "dims": (32, 16),
       "token_mixers": ("pooling", "pooling")} | changes)
  cfg, task = tasks.create(resolve.resolve(config), files=False)
  chips = (topologies.devices(topologies.parse("v5e-8"))
           if platform == "tpu" else None)
  mesh = devices.make_mesh(cfg, chips)
  return compilation.lower_steps(cfg, task, mesh, n_examples=100)


@pytest.fixture(autouse=True)
def environment(monkeypatch):
  for key, value in topologies.ENVIRONMENT.items():
    monkeypatch.setenv(key, value)


def test_each_reason_is_named_once():
  (found,) = lowered()
  assert found.step.as_text().count("@tpu_custom_call") == 2 * 2 * 2
  assert list(found.warnings) == [
      "config.compile.kernels: there is no kernel for the token mixer of stage2"
      " [8, 4, 4, 16]: 4 pixels of 16 channels are not a multiple of 128 lanes",
      "config.compile.kernels: there is no kernel for the MLP of stage2 "
      "[8, 4, 4, 16]: 64 hidden channels are not a multiple of 128 lanes"]
  subject = cases.subject_of(lowering=found.warnings)
  assert set(found.warnings) <= set(
      report.warnings(subject, cases.compiled_of()))


def test_no_kernel_at_all_is_an_error():
  with pytest.raises(errors.ConfigError, match=r"64 hidden channels.*: xla"):
    lowered(dims=(16, 16), token_mixers=("identity", "pooling"))
  with pytest.raises(errors.ConfigError, match=r"any branch.*: xla"):
    lowered(residual=False)


def test_other_platforms_are_told_that_kernels_are_for_tpus():
  (found,) = lowered("cpu")
  line, = found.warnings
  assert "kernels: pallas is for TPUs" in line
