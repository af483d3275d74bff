"""How a model is compiled: the section `config.compile`. No jax.

It changes neither what a model computes, beyond rounding, nor its variables.
"""

import dataclasses
from collections.abc import Iterator

from metaformer_jax.models import settings as settings_lib
from metaformer_jax.models.options import option

# Of blocks whose branches have kernels.
_NORMS = ("group_norm", "layer_norm")


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
      "branches of a block that have one (pooling after GroupNorm; the MLP "
      "after GroupNorm or LayerNorm), in training without masks; not yet "
      "measured on a TPU",
      choices=("xla", "pallas"))

  def remat_of(self, n_stages: int) -> tuple[str, ...]:
    """`remat` for each of the stages.

    Raises:
      ValueError: it is for another number of stages.
    """
    for problem in self._check_number(n_stages):
      raise ValueError(problem)
    return self.remat * n_stages if len(self.remat) == 1 else self.remat

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
