"""From a ConfigDict to an `Experiment`: typed, completed, checked."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from metaformer_jax.config import checks, derived, own, typed
from metaformer_jax.config.schema import Experiment

# More checks for `resolve`: (experiment, files) -> a line per mistake.
Check = Callable[[Experiment, bool], Iterable[str]]


def resolve(config: Mapping[str, Any], files: bool = True,
            also: Check = lambda cfg, files: (),
            allowed: own.Allowed = ()) -> Experiment:
  """Checks a config and returns it as dataclasses.

  Args:
    config: a ConfigDict, or a dict of the same shape; absent keys take their
      defaults.
    files: whether the data, the weights and the folders that it names must be
      on this machine.
    also: what rooms above this one check, as the data's sources.
    allowed: modules that the files of `config.init` may name in import paths.

  Raises:
    ConfigError: one line that names every wrong key, its value, the reason and
      the nearest valid choice.
  """
  cfg = derived.fill(typed.typed(config), allowed)
  typed.refuse([*checks.check(cfg, files), *also(cfg, files)])
  return cfg
