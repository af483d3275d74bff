"""What an experiment is: frozen dataclasses, each value with its limits.

Defaults are declared here, in `config.tasks` and in `models.settings`, and
nowhere else. `resolve` makes an `Experiment` of a `ConfigDict`. Values that are
None follow from others: from the model or `init` (`derived`), or from the data
(`tasks.create`).
"""

import dataclasses
from typing import Any

from metaformer_jax import errors
from metaformer_jax.config import tasks
from metaformer_jax.config.model import Model
from metaformer_jax.models.compiling import Compile
from metaformer_jax.models.options import option


@dataclasses.dataclass(frozen=True)
class Data:
  """The data set: where it is, and how it is read."""

  source: str = option("folder", "kind of data set", own=True,
                       choices=("ade20k", "array_record", "coco", "digits",
                                "folder", "idx", "label_maps", "scenes",
                                "tfds"))
  path: str | None = option(
      None, "folder: has a folder per split, with a folder per class, or with "
      "eval_fraction a folder per class; ade20k: ADEChallengeData2016 or its "
      "parent; label_maps: has images/SPLIT, annotations/SPLIT, classes.txt; "
      "coco: has annotations/instances_SPLIT.json and SPLIT/; "
      "array_record: what tools.prepare wrote; idx: has the four files; tfds: "
      "the data_dir, None: TFDS' default")
  name: str | None = option(None, "tfds: name of the data set")
  train_split: str | None = option(
      None, "folder, ade20k, label_maps, coco: its name; tfds: the split; "
      'scenes: "train[:32]" for the first 32; None: the source\'s default')
  eval_split: str | None = option(None, "as train_split")
  eval_fraction: float | None = option(
      None, "folder, label_maps, coco: without an evaluation split, this part "
      "of the images, of each class in folder, is held out for it", above=0,
      high=0.99)
  eval_seed: int = option(0, "of the choice of these images", low=0)
  mean: tuple[float, ...] | None = option(
      None, "of R, G, B in [0, 1]; None: the model's", low=0, high=1, length=3)
  std: tuple[float, ...] | None = option(
      None, "of R, G, B in [0, 1]; None: the model's", above=0, length=3)
  max_pixels: int = option(
      50_000_000, "an image with more pixels counts as bad and is not decoded",
      low=1)
  max_bad_fraction: float = option(
      0.001, "bad images are replaced; the run ends when their fraction of an "
      "epoch, or of the images so far, is larger", low=0, high=1)
  workers: int = option(
      0, "processes that prepare batches; 0: threads of this process; -1: one "
      "per core", low=-1, high=1024)
  threads: int = option(4, "reading threads of each process", low=1, high=256)
  augment_on: str = option(
      "host", "classification: where task.auto_augment and color_jitter are "
      "computed: host: by the workers; device: in the training step, from "
      "draws of the same distributions", choices=("device", "host"))


@dataclasses.dataclass(frozen=True)
class Optim:
  """The optimizer and its schedule."""

  name: str = option("adamw", "the optimizer; sgd has coupled weight decay",
                     choices=("adamw", "lamb", "sgd"))
  base_lr: float = option(
      1e-3, "peak learning rate for a batch of 1024; scales with batch_size",
      above=0)
  schedule: str = option("cosine", "shape of the learning rate's decay",
                         choices=("constant", "cosine", "poly", "step"))
  schedule_per: str = option("step", "the learning rate is updated every",
                             choices=("epoch", "step"))
  min_lr: float = option(1e-5, "learning rate at the end: cosine, poly", low=0)
  warmup_lr: float = option(1e-6, "learning rate at the start", low=0)
  warmup_epochs: float = option(5.0, "linear warm-up; 0: none", low=0)
  cooldown_epochs: float = option(
      0.0, "epochs after train.epochs at the last learning rate; not used with "
      "train.steps", low=0)
  poly_power: float = option(0.9, "poly: exponent", above=0)
  step_epochs: tuple[float, ...] = option(
      (30.0, 60.0, 90.0), "step: epochs at which the rate falls", low=0)
  step_factor: float = option(0.1, "step: by this factor", above=0, high=1)
  weight_decay: float = option(
      0.05, "not applied to biases, norms and other vectors, nor to ViT's "
      "position embedding and tokens, unless decay_all", low=0)
  decay_all: bool = option(
      False, "weight decay of all parameters, as in mmsegmentation and "
      "mmdetection")
  beta1: float = option(0.9, "adamw, lamb: decay of the first moment", low=0,
                        high=0.9999)
  beta2: float = option(0.999, "of the second", low=0, high=0.999999)
  eps: float | None = option(
      None, "adamw, lamb: epsilon; None: 1e-8 and 1e-6", above=0)
  momentum: float = option(0.9, "sgd: momentum", low=0, high=0.9999)
  nesterov: bool = option(True, "sgd: Nesterov's momentum")
  layer_decay: float = option(
      1.0, "learning rate of a block relative to the next; 1: none", above=0,
      high=1)
  clip_norm: float | None = option(
      None, "largest global norm of the gradient; None: 1 for lamb, else none",
      above=0)


@dataclasses.dataclass(frozen=True)
class Train:
  """Length, batch size and averaging."""

  batch_size: int = option(1024, "images per step, over all devices", low=1,
                           high=2**24)
  epochs: float = option(
      300.0, "length of the run, without optim.cooldown_epochs", above=0)
  steps: int | None = option(
      None, "length of the run in steps, instead of epochs", low=1)
  accumulate: int = option(1, "micro-batches per step", low=1)
  max_skipped: int = option(
      10, "steps whose loss or gradient is not finite are skipped; the run "
      "ends after this many in a row", low=1)
  freeze: tuple[str, ...] = option(
      (), "parameters that are not trained, as patterns of their paths, or of "
      "what they are in: stage1, stage*/block1, **/norm1 (* is within a name, "
      "** any number of names); backbone: all that weights can be loaded into "
      "but the head")
  ema_decay: float = option(
      0.0, "decay of the moving average of the parameters and BatchNorm's "
      "statistics, which is what is evaluated; 0: none", low=0, high=0.999999)


@dataclasses.dataclass(frozen=True)
class Eval:
  """Evaluation on the whole evaluation split; the last step always has one."""

  batch_size: int = option(1024, "images per step, over all devices", low=1)
  every_epochs: float = option(1.0, "interval in epochs", above=0,
                               high=1e6)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """One is saved every `every_steps`, after each evaluation, and at the end."""

  every_steps: int = option(1000, "interval in steps", low=1)
  keep_last: int = option(2, "newest checkpoints to keep", low=1)
  keep_best: int = option(1, "best checkpoints to keep as well", low=0)
  best_metric: str | None = option(
      None, "measure by which the best is chosen; None: the task's first")
  allow_other_data: bool = option(
      False, "resume although the data set is not the one that the checkpoint "
      "was trained on")


@dataclasses.dataclass(frozen=True)
class Mesh:
  """Devices as a grid; the batch is split over both axes."""

  data: int = option(
      -1, "copies of the state; -1: the remaining devices", low=-1)
  fsdp: int = option(
      1, "devices that share one copy; -1: the remaining devices", low=-1)
  min_size: int = option(
      2**16, "arrays with fewer values are not split over fsdp", low=0)
  rules: tuple[tuple[Any, ...], ...] = option(
      (), "pairs (pattern of parameter paths, axis to split or -1), with "
      "patterns as in train.freeze")
  heartbeat_seconds: int = option(
      30, "a process that is silent for longer is considered dead", low=5)
  connect_seconds: int = option(
      120, "at the start, a process waits this long for the others", low=1,
      high=86400)


@dataclasses.dataclass(frozen=True)
class Log:
  """What a run writes besides checkpoints."""

  every_steps: int = option(
      50, "interval of the training metrics in steps", low=1)
  tensorboard: bool = option(True, "write TensorBoard events")
  wandb: str | None = option(
      None, "project, or ENTITY/PROJECT, of Weights & Biases that the metrics "
      "are sent to, too; needs the extra wandb; None or empty: none")
  hang_seconds: float = option(
      600.0, "when no step ends for this long, the stack of every thread is "
      "written to stderr", low=1, high=1e6)
  exit_after_seconds: float | None = option(
      1800.0, "when no step and no batch of an evaluation ends for this long, "
      "the run ends with exit code 1, without saving; compilations, "
      "checkpoints and downloads may take any time; None or 0: it waits for "
      "ever", low=0, high=1e6)
  compilation_cache: str = option(
      "~/.cache/metaformer_jax", "folder of the compiled programs; empty: none")


@dataclasses.dataclass(frozen=True)
class Experiment:
  """A whole run; each value can be set by `--config.section.key=value`."""

  task: tasks.Task = dataclasses.field(default_factory=tasks.Classification)
  init: str | None = option(
      None, "initial weights: the name of a model for its published ones, "
      "safetensors, .pth or the workdir of a run; the model is theirs if "
      "model.name is None")
  seed: int = option(0, "of initialisation, data order and augmentation",
                     low=0, high=2**31 - 1)
  model: Model = dataclasses.field(default_factory=Model)
  data: Data = dataclasses.field(default_factory=Data)
  optim: Optim = dataclasses.field(default_factory=Optim)
  train: Train = dataclasses.field(default_factory=Train)
  eval: Eval = dataclasses.field(default_factory=Eval)
  checkpoint: Checkpoint = dataclasses.field(default_factory=Checkpoint)
  mesh: Mesh = dataclasses.field(default_factory=Mesh)
  compile: Compile = dataclasses.field(default_factory=Compile)
  log: Log = dataclasses.field(default_factory=Log)

  @property
  def best_measure(self) -> tasks.Measure:
    """The measure by which the best checkpoint is chosen.

    Raises:
      ConfigError: the task does not report `checkpoint.best_metric`.
    """
    measures = {measure.name: measure for measure in self.task.MEASURES}
    name = self.checkpoint.best_metric
    if name is None:
      return self.task.MEASURES[0]
    if name not in measures:
      raise errors.ConfigError(
          f"config.checkpoint.best_metric: {name!r} is not a measure of "
          f"{self.task.name}{errors.did_you_mean(name, measures)}")
    return measures[name]
