"""How a model is compiled: the section `config.compile`. No jax.

It changes neither what a model computes, beyond rounding, nor its variables.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator

from metaformer_jax import errors
from metaformer_jax.models import settings as settings_lib
from metaformer_jax.models.options import option

# Of blocks whose branches have kernels.
_NORMS = ("group_norm", "layer_norm")


@dataclasses.dataclass
class Branches:
  """Which branches of blocks are kernels, of what is traced for a TPU.

  Attributes:
    n_kernels: how many are.
    others: those whose shape has no kernel, by the reason.
  """

  n_kernels: int = 0
  others: dict[str, list[str]] = dataclasses.field(default_factory=dict)

  def note(self, name: str, problem: str | None) -> None:
    """Counts a branch; `name` has its shape, and blocks alike have the same."""
    if problem is None:
      self.n_kernels += 1
    elif name not in self.others.setdefault(problem, []):
      self.others[problem].append(name)

  def warnings(self) -> Iterator[str]:
    """A line for each reason, with shapes [B, H, W, C] on a device."""
    for problem, names in self.others.items():
      yield ("config.compile.kernels: there is no kernel for "
             f"{', '.join(names)}: {problem}")

  def require(self) -> None:
    """Raises a ConfigError if none of the branches is a kernel."""
    if not self.n_kernels:
      reason = "; ".join(self.others) or (
          "they are for attention, pooling after group_norm, and separable "
          f"convolutions and MLPs after {' or '.join(_NORMS)}, with a "
          "shortcut, without dropout and padded images")
      raise errors.ConfigError(
          "config.compile.kernels: pallas has no kernel for any branch of this "
          f"model: {reason}; nearest: xla")


_TRACED: contextvars.ContextVar[Branches | None] = contextvars.ContextVar(
    "traced", default=None)


def note(name: str, problem: str | None) -> None:
  """Notes a branch that is being traced: `Branches.note`."""
  branches = _TRACED.get()
  if branches is not None:
    branches.note(name, problem)


@dataclasses.dataclass(frozen=True)
class Compile:
  """How the model is compiled; nothing here changes a result or a weight."""

  scan: bool = option(
      False, "metaformer: the blocks of a stage are compiled once and run as a "
      "loop, which compiles faster, and needs more memory unless remat is dots "
      "or block; no dropout in the blocks (model.drop_rate)")
  remat: tuple[str, ...] = option(
      ("none",), "metaformer: what the gradient computes again instead of "
      "keeping it in memory, one value for all stages or one for each: none; "
      "dots: all of a block but its matrix products; block: the whole block",
      choices=("none", "dots", "block"))

  kernels: str = option(
      "xla", "metaformer: pallas: kernels for TPUs take the place of the "
      "branches of a block that have one (pooling after GroupNorm; separable "
      "convolutions and the MLP after GroupNorm or LayerNorm), and of "
      "attention, in training without masks; not yet measured on a TPU",
      choices=("xla", "pallas"))

  def remat_of(self, n_stages: int) -> tuple[str, ...]:
    """`remat` for each of the stages.

    Raises:
      ValueError: it is for another number of stages.
    """
    for problem in self._check_number(n_stages):
      raise ValueError(problem)
    return self.remat * n_stages if len(self.remat) == 1 else self.remat

  @contextlib.contextmanager
  def traced(self) -> Iterator[Branches]:
    """Gives the branches with `kernels` "pallas" that are traced within it."""
    branches = Branches()
    token = _TRACED.set(branches)
    try:
      yield branches
    finally:
      _TRACED.reset(token)

  def check(self, model: str,
            settings: settings_lib.Family | None) -> Iterator[str]:
    """Yields "key: reason; nearest: value" for what a model cannot have.

    Args:
      model: its name.
      settings: its hyper-parameters; None if it is a user's own.
    """
    if not isinstance(settings, settings_lib.MetaFormer):
      yield from self._check_unused(model, settings)
      return
    yield from self._check_number(len(settings.depths))
    if self.scan and settings.drop_rate:
      yield (f"scan: True is not for config.model.drop_rate = "
             f"{settings.drop_rate}, as dropout in the blocks draws in each of "
             "them; nearest: False")

    if self.kernels == "pallas" and settings.norm not in _NORMS:
      yield (f"kernels: pallas has no kernels for config.model.norm = "
             f"{settings.norm!r}, only for {' and '.join(_NORMS)}; nearest: "
             "xla")

  def _check_unused(self, model, settings) -> Iterator[str]:
    family = next((name for name, cls in settings_lib.FAMILIES.items()
                   if isinstance(settings, cls)), "a user's own")
    for key, default in (("scan", False), ("remat", ("none",)),
                         ("kernels", "xla")):
      value = getattr(self, key)
      if value != default:
        yield (f"{key}: {value} is for models of the family metaformer, and "
               f"{model} is {family}; nearest: {default}")

  def _check_number(self, n_stages: int) -> Iterator[str]:
    remat = self.remat
    if len(remat) not in (1, n_stages):
      nearest = (*remat[:n_stages],
                 *(remat[-1:] or ("none",)) * (n_stages - len(remat)))
      yield (f"remat: {remat} has {len(remat)} values for {n_stages} stages; "
             f"nearest: {nearest}")
