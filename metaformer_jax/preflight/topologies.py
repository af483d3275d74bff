"""TPU slices by the names that users know, and the rates of their chips."""

import math
import re
from importlib import util
from typing import NamedTuple

from metaformer_jax import errors


class Generation(NamedTuple):
  """A kind of TPU; rates are per chip, as Google publishes them.

  Attributes:
    flops: peak of bfloat16 matrix products, 1/s; float32 products are computed
      from several of these.
    hbm: memory bandwidth, bytes/s.
    links: bandwidth out of the chip over all links to other chips, bytes/s.
    n_axes: number of axes of the grid of chips.
    n_devices: jax devices per chip.
    counts_cores: whether the number in a slice's name counts cores, two per
      chip.
    most: number of chips of the largest slice.
    chip_config: libtpu's name for how a chip's cores are used.
  """

  flops: float
  hbm: float
  links: float
  n_axes: int
  n_devices: int
  counts_cores: bool
  most: int
  chip_config: str

  def least_seconds(self, flops: float, accessed: float,
                    sent: float) -> dict[str, float]:
    """Lower bounds on a step's seconds, by the resource that limits it.

    "compute": matrix products at the published rate; "memory": the bytes that
    the compiler counts, at the published bandwidth; "links": the bytes that a
    device must send. Some of the bytes counted as "memory" may stay on the
    chip, so only "compute" and "links" are strict bounds.

    Args:
      flops: of matrix products, on a device.
      accessed: bytes that a device reads and writes.
      sent: bytes that a device sends to others.
    """
    return {"compute": flops * self.n_devices / self.flops,
            "memory": accessed * self.n_devices / self.hbm,
            "links": sent * self.n_devices / self.links}


# Sources: cloud.google.com/tpu/docs/v2, v3, v4, v5e, v5p, v6e, tpu7x; links of
# v2 and v3: doi.org/10.1145/3360307, table 3.
GENERATIONS = {
    "v2": Generation(46e12, 700e9, 248e9, 2, 2, True, 256, "default"),
    "v3": Generation(123e12, 900e9, 328e9, 2, 2, True, 1024, "default"),
    "v4": Generation(275e12, 1228e9, 300e9, 3, 1, True, 4096, "megacore"),
    "v5e": Generation(197e12, 819e9, 200e9, 2, 1, False, 256, "default"),
    "v5p": Generation(459e12, 2765e9, 600e9, 3, 1, True, 8960, "megacore"),
    "v6e": Generation(918e12, 1640e9, 448e9, 2, 1, False, 256, "default"),
    "tpu7x": Generation(2307e12, 7380e9, 600e9, 3, 2, True, 9216, "default"),
}
# Other names for the same generations.
_SYNONYMS = {"v5litepod": "v5e", "v5lite": "v5e", "v7x": "tpu7x"}

# Powers of two for which there is no slice.
_ABSENT = {"v2": (16, 64), "v3": (16,)}

# Keeps jax from using a TPU, and libtpu from looking for one or waiting for its
# lock. Must be set before jax is imported.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost"}


class Slice(NamedTuple):
  """A TPU slice.

  Attributes:
    name: as given by the user.
    generation: a key of `GENERATIONS`.
    shape: number of chips along each axis of the grid.
  """

  name: str
  generation: str
  shape: tuple[int, ...]

  @property
  def topology(self) -> str:
    """libtpu's name for it: "v5e:2x4"."""
    return f"{self.generation}:{'x'.join(map(str, self.shape))}"

  @property
  def n_chips(self) -> int:
    return math.prod(self.shape)

  @property
  def host_shape(self) -> tuple[int, int, int]:
    """Chips per host along three axes."""
    if self.generation in ("v5e", "v6e") and self.n_chips in (1, 8):
      return (*self.shape, 1)
    return (2, 2, 1)


def parse(name: str, flag: str = "--topology") -> Slice:
  """Parses the value of a flag: "v5litepod-8", "v5e-1", "v4-32", "v5p:4x4x12".

  After a hyphen comes the number of chips (of cores for v2 to v4, v5p and
  tpu7x), after a colon the shape.

  Raises:
    ConfigError: there is no such slice.
  """
  match = re.fullmatch(r"([a-z0-9]+?)(?:-(\d+)|:(\d+(?:x\d+){1,2}))",
                       name.lower())
  if not match:
    raise errors.ConfigError(
        f"{flag}: {name!r} is not the name of a slice, e.g. v5litepod-8, "
        "v4-32, v6e-16 or v5p:4x4x12")
  kind, number, shape = match.groups()
  kind = _SYNONYMS.get(kind, kind)
  if kind not in GENERATIONS:
    raise errors.ConfigError(
        f"{flag}: {name!r} is not a known generation of TPU"
        f"{errors.did_you_mean(kind, GENERATIONS)}")
  if number:
    shape = _shape(name, kind, int(number), flag)
  else:
    shape = tuple(map(int, shape.split("x")))
  generation = GENERATIONS[kind]
  found = Slice(name, kind, shape)
  if len(shape) != generation.n_axes or not (
      0 < found.n_chips <= generation.most) or any(
          side % part for side, part in zip(shape, found.host_shape)):
    raise errors.ConfigError(
        f"{flag}: there is no {name}: a {kind} slice has up to "
        f"{generation.most} chips on {generation.n_axes} axes, and hosts of "
        f"{'x'.join(map(str, found.host_shape))} chips")
  return found


def _shape(name: str, kind: str, number: int, flag: str) -> tuple[int, ...]:
  """The shape of the slice named by a number of chips or cores."""
  generation = GENERATIONS[kind]
  cores = 2 if generation.counts_cores else 1
  valid = [n for n in (2**i for i in range(2, 15))
           if 4 * cores <= n <= cores * generation.most
           and n not in _ABSENT.get(kind, ())]
  if not generation.counts_cores:
    valid = [1, *valid]
  if number not in valid:
    nearest = min(valid, key=lambda n: abs(math.log((number or 1) / n)))
    raise errors.ConfigError(
        f"{flag}: there is no {name}; nearest: "
        f"{name.rpartition('-')[0]}-{nearest}; or give a shape, e.g. "
        f"{kind}:{'x'.join('4' * generation.n_axes)}")
  n_chips = number // cores
  if n_chips == 1:
    return (1, 1)
  # Start from one host and double the shortest side; of equals, the last.
  shape = [2, 2, 1][:generation.n_axes]
  while math.prod(shape) < n_chips:
    least = min(shape)
    shape[len(shape) - 1 - shape[::-1].index(least)] *= 2
  return tuple(shape)


def devices(found: Slice) -> list:
  """The jax devices of a slice: programs can be compiled for them, not run.

  With `ENVIRONMENT` set, libtpu does not complain that there is no TPU.

  Raises:
    ConfigError: libtpu is not installed, or does not know the slice.
  """
  if util.find_spec("libtpu") is None:
    raise errors.ConfigError(
        "libtpu: the TPU's compiler, is not installed; pip install "
        "'metaformer-jax[tpu]'")
  import jax  # noqa: PLC0415  Parsing names works without jax.
  from jax.experimental import topologies  # noqa: PLC0415

  generation = GENERATIONS[found.generation]
  try:
    description = topologies.get_topology_desc(
        platform="tpu", topology_name=found.topology,
        chip_config_name=generation.chip_config,
        chips_per_host_bounds=found.host_shape)
  except jax.errors.JaxRuntimeError as e:
    raise errors.ConfigError(
        f"libtpu: does not accept {found.topology}: {e}") from e
  return list(description.devices)
