"""The parts of a model that are a user's own, checked before a run starts."""

import jax
import jax.numpy as jnp

from metaformer_jax import errors, imports
from metaformer_jax.config import own
from metaformer_jax.config.schema import Experiment
from metaformer_jax.models import check_mixer, registry

# What training would fail by, or a dense task be wrong by.
_CHECKS = ("shape", "dtype", "gradient", "mask")


def check(cfg: Experiment) -> None:
  """Tries the mixers, norm, activation and model of the user's own.

  Raises:
    ConfigError: one of them does not keep its contract.
  """
  paths = own.paths(cfg)
  if not any(key.startswith("config.model.") for key in paths):
    return
  for name, dim in _mixers(cfg).items():
    try:
      check_mixer.check_mixer(name, dim=dim, dtype=jnp.dtype(cfg.model.dtype),
                              checks=_CHECKS)
    except ValueError as e:
      raise errors.ConfigError(f"config.model.token_mixers: {e}") from e
  _check_whole(cfg, ", ".join(f"{key} = {', '.join(dict.fromkeys(names))}"
                              for key, names in paths.items()))


def _mixers(cfg: Experiment) -> dict[str, int]:
  """The import paths of mixers, and the channels of the stage of each."""
  found = own.paths(cfg).get("config.model.token_mixers", ())
  if imports.is_path(cfg.model.name) or not found:
    return {}
  settings = registry.get_spec(cfg.model.name).override(
      **cfg.model.overrides())
  return {name: dim for name, dim in zip(settings.token_mixers, settings.dims)
          if name in found}


def _check_whole(cfg: Experiment, what: str) -> None:
  """Traces the whole model, in training, for one image."""
  n = cfg.task.num_classes or 2
  images = jax.ShapeDtypeStruct((1, *cfg.task.input_size, 3), jnp.float32)
  names = ("params", "dropout", "drop_path")

  def logits(images):
    model = registry.create_model(cfg.model.name, num_classes=n,
                                  dtype=jnp.dtype(cfg.model.dtype),
                                  compile=cfg.compile,
                                  **cfg.model.overrides())
    rngs = dict(zip(names, jax.random.split(jax.random.key(0), len(names))))
    variables = model.init(rngs, images)
    found, _ = model.apply(variables, images, train=True, rngs=rngs,
                           mutable=["batch_stats"])
    return found

  try:
    found = jax.eval_shape(logits, images)
  except errors.UserError:
    raise
  except Exception as e:  # The parts are programs of the user's.
    raise errors.ConfigError(
        f"{what}: the model cannot be traced: {type(e).__name__}: "
        f"{errors.one_line(e)[:500]}; a norm is norm(x, mask=None, "
        "train=False), an activation activation(x), a model model(images, *, "
        "train=False) -> logits") from e
  if getattr(found, "shape", None) != (1, n):
    raise errors.ConfigError(
        f"{what}: the model's output for 1 image and {n} classes is "
        f"{getattr(found, 'shape', found)}, not (1, {n})")
