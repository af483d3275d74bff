"""Short trainings that PyTorch and this package repeat. No torch, no jax.

`golden/make_lockstep.py` runs them in PyTorch and writes a file for each; the
tests run them here and compare with the files. Weights and images are drawn as
in `parity_cases`.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import parity_cases

LABEL_SMOOTHING = 0.1


@dataclasses.dataclass(frozen=True)
class Run:
  """A training without randomness.

  Attributes:
    name: of the run, and the stem of its file.
    case: the model, and the layout in which its weights are compared.
    optim: fields of `schema.Optim`; the rate changes every epoch.
    peak: the highest rate.
    epochs: before the cool-down.
    ema_decay: of the moving average of everything.
    idle: regular expression of keys whose true gradient is 0. What is left of
      it is rounding, of which Adam makes steps: they are not compared.
    loss_tolerance: largest relative difference of a loss.
    tolerance: largest difference of a tensor at the end, over how far it has
      come.
    batch_size, n_batches: images of a step, steps of an epoch.
    size: side of the images.
  """

  name: str
  case: parity_cases.Case
  optim: Mapping[str, Any]
  peak: float
  epochs: int
  ema_decay: float
  idle: str = "$^"
  loss_tolerance: float = 1e-4
  tolerance: float = 2e-3
  batch_size: int = 8
  n_batches: int = 2
  size: int = 64

  @property
  def n_steps(self) -> int:
    return self.n_batches * (self.epochs + self.optim["cooldown_epochs"])


# The recipes' (arXiv 2111.11418, 2210.13452), the peaks being those of batches
# of 1024 and 512: at those of 4096 these small ones diverge, and what rounding
# makes different with them.
_ADAMW = {"name": "adamw", "weight_decay": 0.05}, 1e-3
_LAMB = {"name": "lamb", "weight_decay": 0.05}, 1e-3
# With decay enough to tell where it enters.
_SGD = {"name": "sgd", "weight_decay": 2e-2}, 5e-3
_POOLING = r"\.norm1\.bias$"  # Pooling less the identity has no use for it.


def _run(suffix, case, optim, epochs, warmup, cooldown, ema_decay, **kwargs):
  case, (optim, peak) = parity_cases.CASES[case], optim
  return Run(f"{case.model}-{optim['name']}{suffix}", case, {
      **optim, "schedule": "cosine", "min_lr": 1e-5, "warmup_lr": 1e-6,
      "warmup_epochs": warmup, "cooldown_epochs": cooldown,
  }, peak, epochs, ema_decay, **kwargs)


SMALL = (
    _run("", "poolformer_s12-official", _ADAMW, 3, 1, 1, 0.8, idle=_POOLING),
    _run("", "caformer_s18-official", _LAMB, 3, 1, 1, 0.8),
    # Some value lies within rounding of ReLU's kink.
    _run("", "resnet18-timm", _SGD, 3, 1, 1, 0.8, loss_tolerance=1e-3,
         tolerance=3e-2),
)
FULL = (
    _run("-full", "poolformer_s12-official-full", _ADAMW, 20, 5, 5, 0.95,
         idle=_POOLING, tolerance=2e-2),
    _run("-full", "caformer_s18-official-full", _LAMB, 20, 5, 5, 0.95,
         tolerance=2e-2),
)


def batches(run: Run) -> list[tuple[np.ndarray, np.ndarray]]:
  """The batches of an epoch: images, uint8 [B, H, W, 3], and labels [B]."""
  n = run.batch_size * run.n_batches
  x = parity_cases.images(n, run.size, run.size)
  x = np.clip(np.round(128 + 50 * x), 0, 255).astype(np.uint8)
  y = parity_cases.labels(n, run.case.num_classes).astype(np.int32)
  return [(x[i::run.n_batches], y[i::run.n_batches])
          for i in range(run.n_batches)]


def movement(key: str, first: np.ndarray, last: np.ndarray) -> np.ndarray:
  """Norm at the end, and the `sketch` of how far it has come [4]."""
  first, last = (np.asarray(x, np.float64) for x in (first, last))
  return np.concatenate([[np.linalg.norm(last)],
                         parity_cases.sketch(key, last - first)])


@dataclasses.dataclass(frozen=True)
class Trajectory:
  """PyTorch's result of a run.

  Attributes:
    meta: versions.
    shapes: of the state dict.
    losses, rates: of each step.
    state: `movement` by key, of the floats of the state dict.
    ema: likewise, of the moving average.
  """

  meta: dict[str, Any]
  shapes: dict[str, tuple[int, ...]]
  losses: np.ndarray
  rates: np.ndarray
  state: dict[str, np.ndarray]
  ema: dict[str, np.ndarray]

  def save(self, path) -> None:
    header = {"meta": self.meta, "shapes": self.shapes,
              "keys": list(self.state)}
    np.savez_compressed(
        path, header=np.array(json.dumps(header)), losses=self.losses,
        rates=self.rates, state=np.array(list(self.state.values())),
        ema=np.array([self.ema[k] for k in self.state]))

  @classmethod
  def load(cls, path) -> "Trajectory":
    with np.load(path) as arrays:
      header = json.loads(str(arrays["header"]))
      keys = header["keys"]
      return cls(header["meta"],
                 {k: tuple(v) for k, v in header["shapes"].items()},
                 arrays["losses"], arrays["rates"],
                 dict(zip(keys, arrays["state"], strict=True)),
                 dict(zip(keys, arrays["ema"], strict=True)))
