"""What of optimizers and schedules is compared with timm. No torch, no jax."""

import zlib

import numpy as np

_OFFICIAL = {"sched": "cosine", "min_lr": 1e-5, "warmup_lr": 1e-6,
             "warmup_epochs": 5, "cooldown_epochs": 10, "epochs": 300,
             "decay_rate": 0.1}

# The arguments of timm's `create_scheduler`. schedules.npz has, by these names,
# the rate of each epoch of the run, float64.
SCHEDULES: dict[str, dict] = {
    # arXiv 2111.11418, 2210.13452: their repositories' scripts.
    "poolformer": {**_OFFICIAL, "lr": 4e-3},
    "convformer": {**_OFFICIAL, "lr": 4e-3, "warmup_epochs": 20},
    "caformer": {**_OFFICIAL, "lr": 8e-3, "warmup_epochs": 20},
    "convformer-384": {**_OFFICIAL, "lr": 5e-5, "epochs": 30, "sched": "None"},
    "caformer-384": {**_OFFICIAL, "lr": 1e-4, "epochs": 30, "sched": "None"},
    # What the other configs have.
    "convformer-21k": {**_OFFICIAL, "lr": 4e-3, "epochs": 90,
                       "cooldown_epochs": 0},
    "caformer-21k": {**_OFFICIAL, "lr": 8e-3, "epochs": 90,
                     "cooldown_epochs": 0},
    "deit-pvt": {**_OFFICIAL, "lr": 1e-3},
    "resmlp": {**_OFFICIAL, "lr": 5e-3, "epochs": 400},
    "resnet": {**_OFFICIAL, "lr": 5e-3, "cooldown_epochs": 0},
    # The other curves.
    "poolformer-3000": {**_OFFICIAL, "lr": 4e-3, "epochs": 3000},
    "no-warmup": {**_OFFICIAL, "lr": 1e-3, "warmup_epochs": 0, "epochs": 20},
    "poly": {**_OFFICIAL, "lr": 2e-4, "sched": "poly", "epochs": 40,
             "decay_rate": 0.9, "warmup_epochs": 3, "cooldown_epochs": 4},
    "step": {**_OFFICIAL, "lr": 8e-3, "sched": "step", "epochs": 100,
             "decay_epochs": 30},
}

# Arguments of the optimizers; optim.npz has under "case/parameter" what the
# parameter is after each step.
OPTIMIZERS: dict[str, dict] = {
    "adamw": {"name": "adamw", "weight_decay": 0.05},
    "lamb": {"name": "lamb", "weight_decay": 0.05},
    "lamb-no-decay": {"name": "lamb", "weight_decay": 0.0},
    "lamb-eps": {"name": "lamb", "weight_decay": 0.3, "eps": 1e-2},
    "sgd": {"name": "sgd", "weight_decay": 0.05, "momentum": 0.9},
    "nesterov": {"name": "sgd", "weight_decay": 0.05, "momentum": 0.8,
                 "nesterov": True},
}
RATE = 0.02
_SHAPES = {"kernel": (5, 7), "conv": (2, 3, 3, 4), "bias": (7,), "scale": (1,),
           "zero": (3, 4), "idle": (2, 2)}


def _normal(*keys):
  seed = zlib.crc32("/".join(map(str, keys)).encode())
  return np.random.default_rng(seed).standard_normal


def parameters() -> dict[str, np.ndarray]:
  """The first values, float32; "zero" has the norm 0."""
  return {name: (_normal(name)(shape) * (name != "zero")).astype(np.float32)
          for name, shape in _SHAPES.items()}


def gradients() -> list[dict[str, np.ndarray]]:
  """Those of each step: their norm is below 1, above, and 0 of "idle"."""
  return [{name: (scale * (name != "idle") * _normal(name, i)(shape)).astype(
      np.float32) for name, shape in _SHAPES.items()}
          for i, scale in enumerate((0.01, 3.0, 0.1, 1e-6, 0.05, 30.0))]
