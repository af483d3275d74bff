"""Names of TPU slices: the devices that libtpu returns, and errors."""

import sys

import pytest

from metaformer_jax import errors
from metaformer_jax.preflight import topologies


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
  for key, value in topologies.ENVIRONMENT.items():
    monkeypatch.setenv(key, value)


# Chips and hosts: cloud.google.com/tpu/docs/v5e and the pages of the others. In
# slices of several hosts, each has four chips.
@pytest.mark.parametrize("name,topology,devices,hosts,kind", [
    ("v5e-1", "v5e:1x1", 1, 1, "TPU v5 lite"),
    ("v5litepod-4", "v5e:2x2", 4, 1, "TPU v5 lite"),
    ("v5litepod-8", "v5e:2x4", 8, 1, "TPU v5 lite"),
    ("V5E-16", "v5e:4x4", 16, 4, "TPU v5 lite"),
    ("v5litepod-32", "v5e:4x8", 32, 8, "TPU v5 lite"),
    ("v5e-256", "v5e:16x16", 256, 64, "TPU v5 lite"),
    ("v6e-8", "v6e:2x4", 8, 1, "TPU v6 lite"),
    ("v6e-16", "v6e:4x4", 16, 4, "TPU v6 lite"),
    ("v4-8", "v4:2x2x1", 4, 1, "TPU v4"),
    ("v4-32", "v4:2x2x4", 16, 4, "TPU v4"),
    ("v4-64", "v4:2x4x4", 32, 8, "TPU v4"),
    ("v4-512", "v4:4x8x8", 256, 64, "TPU v4"),
    ("v5p-8", "v5p:2x2x1", 4, 1, "TPU v5"),
    ("v5p:4x4x12", "v5p:4x4x12", 192, 48, "TPU v5"),
    # Two devices per chip, one for each core.
    ("v2-8", "v2:2x2", 8, 1, "TPU v2"),
    ("v3-32", "v3:4x4", 32, 4, "TPU v3"),
    ("tpu7x-8", "tpu7x:2x2x1", 8, 1, "TPU7x"),
])
def test_names(name, topology, devices, hosts, kind):
  found = topologies.parse(name)
  assert found.topology == topology
  made = topologies.devices(found)
  assert len(made) == devices
  assert len({d.process_index for d in made}) == hosts
  assert {d.device_kind for d in made} == {kind}
  assert len(made) == found.n_chips * topologies.GENERATIONS[
      found.generation].n_devices


def test_the_shape_for_every_power_of_two_has_that_many_chips():
  for kind, generation in topologies.GENERATIONS.items():
    cores = 2 if generation.counts_cores else 1
    for number in (2**i for i in range(15)):
      try:
        found = topologies.parse(f"{kind}-{number}")
      except errors.ConfigError:
        assert number > cores * generation.most or number < 4 * cores or (
            kind in ("v2", "v3")), (kind, number)
        continue
      assert found.n_chips * cores == number
      # As close to a cube, or a square, as possible.
      assert max(found.shape) <= 4 * min(found.shape)
      assert list(found.shape) == sorted(found.shape) or number == 4 * cores


@pytest.mark.parametrize("name,says", [
    ("v5e-12", "nearest: v5e-16"), ("v5litepod-512", "nearest: v5litepod-256"),
    ("v5e-2", "nearest: v5e-"), ("v4-4", "nearest: v4-8"),
    ("v2-16", "nearest: v2-"), ("v5e-0", "nearest: v5e-1"),
    ("v5p-99999999999999999999", "nearest: v5p-16384"),
    ("v9-8", "valid: tpu7x, v2, v3"), ("gpu-8", "is not a known generation"),
    ("v5e", "is not the name of a slice"), ("v5e-", "is not the name"),
    ("v5e:2x4:1", "is not the name"), ("", "is not the name"),
    ("v5e:3x5", "hosts of 2x2"), ("v5p:2x4", "on 3 axes"),
    ("v5e:2x2x1", "on 2 axes"), ("v5e:0x4", "up to 256"),
    ("v5p:64x64x64", "up to 8960")])
def test_invalid_names(name, says):
  with pytest.raises(errors.ConfigError, match=says) as e:
    topologies.parse(name)
  assert "--topology" in str(e.value)


def test_without_libtpu_the_extra_is_named(monkeypatch):
  monkeypatch.setitem(sys.modules, "libtpu", None)
  with pytest.raises(errors.ConfigError, match="metaformer-jax\\[tpu\\]"):
    topologies.devices(topologies.parse("v5e-4"))


def test_a_topology_that_libtpu_does_not_accept_is_a_config_error():
  unknown = topologies.Slice("x", "v6e", (3, 4))
  with pytest.raises(errors.ConfigError, match="does not accept v6e:3x4"):
    topologies.devices(unknown)
