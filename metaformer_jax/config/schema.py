"""What an experiment is: frozen dataclasses, each value with its limits.

The one place where defaults live. `config` makes an `Experiment` of a
`ConfigDict` and checks it; whatever a run reads, it reads from here.
"""

import dataclasses
from typing import Any


def option(default, help_text, *, low=None, high=None, above=None, choices=None,
           length=None, each=None):
  """A dataclass field with its meaning and limits.

  Args:
    default: the value where a config says nothing.
    help_text: what it is, and its unit.
    low, high: inclusive bounds of a number, or of each number of a tuple.
    above: exclusive lower bound.
    choices: the valid values of a string, or of each string of a tuple.
    length: of a tuple.
    each: `"odd"` for odd numbers only.
  """
  return dataclasses.field(default=default, metadata={
      "help": help_text, "low": low, "high": high, "above": above,
      "choices": choices, "length": length, "each": each})


@dataclasses.dataclass(frozen=True)
class Model:
  """The network. Hyper-parameters left at None are as the named model's."""

  name: str = option("poolformer_s12", "a name of metaformer_jax.list_models()")
  num_classes: int = option(1000, "outputs of the head", low=1)
  drop_path_rate: float = option(
      0.0, "stochastic depth of the last block", low=0, high=0.999)
  dtype: str = option("float32", "of the computation; parameters are float32",
                      choices=("float32", "bfloat16"))
  depth: int | None = option(None, "blocks, of a model of one stage", low=1)
  depths: tuple[int, ...] | None = option(None, "blocks of each stage", low=1)
  dims: tuple[int, ...] | None = option(None, "channels of each stage", low=1)
  token_mixers: tuple[str, ...] | None = option(
      None, "mixer of each stage", choices=(
          "attention", "depthwise_conv", "identity", "pooling", "random",
          "sepconv", "spatial_fc"))
  pool_size: int | None = option(
      None, "window side of pooling", low=1, each="odd")
  pool_subtract: bool | None = option(None, "pooling subtracts its input")
  conv_kernel_size: int | None = option(
      None, "of depthwise_conv and sepconv", low=1, each="odd")
  attention_proj_bias: bool | None = option(None, "attention ends with a bias")
  position_embeddings: tuple[int, ...] | None = option(
      None, "stages, from 1, that begin by adding one", low=1)
  norm: str | None = option(None, "of the blocks", choices=(
      "batch_norm", "group_norm", "layer_norm", "none"))
  norm_eps: float | None = option(None, "epsilon of the norms", above=0)
  norm_bias: bool | None = option(None, "the norms have a bias")
  activation: str | None = option(None, "of MLPs and sepconv", choices=(
      "gelu", "relu", "silu", "squared_relu", "star_relu"))
  mlp_ratio: float | None = option(
      None, "hidden / outer channels; 0: no MLP", low=0)
  mlp_bias: bool | None = option(None, "the MLPs have biases")
  residual: bool | None = option(None, "blocks add to their input")
  layer_scale_init: float | None = option(
      None, "first value of LayerScale; 0: none")
  res_scale_init: tuple[float, ...] | None = option(
      None, "first value of ResScale in each stage, 0: none; empty: none")
  in_patch_size: int | None = option(None, "kernel of the stem", low=1)
  in_stride: int | None = option(None, "stride of the stem", low=1)
  in_pad: int | None = option(None, "padding of the stem", low=0)
  downsample_norm: bool | None = option(
      None, "LayerNorm after the stem and before the other downsamplings")
  conv_init: str | None = option(None, "first weights of the convolutions",
                                 choices=("torch", "trunc_normal"))
  head_norm_first: bool | None = option(
      None, "the head's norm comes before the mean over pixels")
  head: str | None = option(None, "classifier", choices=("linear", "mlp"))
  head_drop_rate: float | None = option(
      None, "dropout of the head", low=0, high=0.999)

  def overrides(self) -> dict[str, Any]:
    """The hyper-parameters that are set: keywords for `create_model`."""
    common = ("name", "num_classes", "drop_path_rate", "dtype")
    return {k: v for k, v in dataclasses.asdict(self).items()
            if k not in common and v is not None}


@dataclasses.dataclass(frozen=True)
class Data:
  """Where images come from and how they become a batch."""

  source: str = option("folder", "kind of data set",
                       choices=("digits", "folder", "idx", "tfds"))
  path: str | None = option(
      None, "folder: with a folder per split, of class folders; idx: with the "
      "four files; tfds: the data_dir, None for TFDS' own")
  name: str | None = option(None, "tfds: name of the data set")
  train_split: str | None = option(
      None, "folder: name of its folder; tfds: split; None: by the source")
  eval_split: str | None = option(None, "as train_split")
  image_size: int = option(224, "side of the square input, pixels", low=1)
  crop_pct: float = option(
      0.9, "evaluation: shorter side to floor(image_size / crop_pct), then "
      "centre crop", low=0.1, high=1)
  interpolation: str = option("bicubic", "of the evaluation's resize",
                              choices=("bilinear", "bicubic"))
  train_interpolation: str = option(
      "random", "of the training crop's resize; random: either, by image",
      choices=("bilinear", "bicubic", "random"))
  crop_area: tuple[float, ...] = option(
      (0.08, 1.0), "RandomResizedCrop: area over the image's",
      above=0, high=1, length=2)
  crop_ratio: tuple[float, ...] = option(
      (3 / 4, 4 / 3), "RandomResizedCrop: width over height", above=0, length=2)
  flip: float = option(0.5, "probability of a left-right flip", low=0, high=1)
  auto_augment: str = option(
      "", "after crop and flip, in timm's words: rand-m9-mstd0.5-inc1; 3a; "
      "empty: nothing")
  color_jitter: float = option(
      0.0, "brightness, contrast and saturation change by up to this; inert "
      "with rand", low=0)
  repeats: int = option(
      1, "an image comes so often in a row, differently augmented; of "
      "an epoch's images, the others are left out", low=1)
  mean: tuple[float, ...] = option(
      (0.485, 0.456, 0.406), "of R, G, B in [0, 1]", low=0, high=1, length=3)
  std: tuple[float, ...] = option(
      (0.229, 0.224, 0.225), "of R, G, B in [0, 1]", above=0, length=3)
  max_pixels: int = option(
      50_000_000, "an image with more is taken for a bad one, not decoded",
      low=1)
  max_bad_fraction: float = option(
      0.001, "bad images are replaced; the run ends when there are more than "
      "this, of an epoch or of the images so far", low=0, high=1)
  workers: int = option(
      0, "processes that prepare batches; 0: threads of this one; -1: one for "
      "each core", low=-1, high=1024)
  threads: int = option(4, "reading threads of each process", low=1, high=256)


@dataclasses.dataclass(frozen=True)
class Optim:
  """The optimizer and its schedule."""

  name: str = option("adamw", "the optimizer; sgd is with coupled decay",
                     choices=("adamw", "lamb", "sgd"))
  base_lr: float = option(
      1e-3, "peak learning rate for a batch of 1024; scales with batch_size",
      above=0)
  schedule: str = option("cosine", "how the learning rate falls",
                         choices=("constant", "cosine", "poly", "step"))
  schedule_per: str = option("step", "the learning rate is set anew at each",
                             choices=("epoch", "step"))
  min_lr: float = option(1e-5, "learning rate at the end: cosine, poly", low=0)
  warmup_lr: float = option(1e-6, "learning rate at the start", low=0)
  warmup_epochs: float = option(5.0, "linear warm-up; 0: none", low=0)
  cooldown_epochs: float = option(
      0.0, "how long the run goes on after train.epochs, at the last learning "
      "rate; train.steps leaves it out", low=0)
  poly_power: float = option(0.9, "poly: exponent", above=0)
  step_epochs: tuple[float, ...] = option(
      (30.0, 60.0, 90.0), "step: when the learning rate falls", low=0)
  step_factor: float = option(0.1, "step: by which it falls", above=0, high=1)
  weight_decay: float = option(
      0.05, "norms, biases and other vectors are exempt, and ViT's embeddings "
      "that are parameters", low=0)
  beta1: float = option(0.9, "adamw, lamb: decay of the first moment", low=0,
                        high=0.9999)
  beta2: float = option(0.999, "of the second", low=0, high=0.999999)
  eps: float | None = option(
      None, "adamw, lamb: epsilon; None: 1e-8 and 1e-6", above=0)
  momentum: float = option(0.9, "sgd: momentum", low=0, high=0.9999)
  nesterov: bool = option(True, "sgd: Nesterov's momentum")
  layer_decay: float = option(
      1.0, "learning rate of a block over that of the next; 1: none", above=0,
      high=1)
  clip_norm: float | None = option(
      None, "largest global norm of the gradient; None: 1 for lamb, else none",
      above=0)


@dataclasses.dataclass(frozen=True)
class Train:
  """How long, how large, how regularised."""

  batch_size: int = option(1024, "images of a step, over all devices", low=1,
                           high=2**24)
  epochs: float = option(
      300.0, "length of the run, but for optim.cooldown_epochs", above=0)
  steps: int | None = option(
      None, "length of the run, instead of epochs", low=1)
  accumulate: int = option(1, "micro-batches of a step", low=1)
  max_skipped: int = option(
      10, "a step whose loss or gradient is not finite changes nothing; the "
      "run ends after so many in a row", low=1)
  loss: str = option(
      "ce", "ce: cross-entropy of the softmax; bce: binary, of each class",
      choices=("bce", "ce"))
  bce_threshold: float = option(
      0.0, "bce: targets above are 1, the others 0; 0: left as they are",
      low=0, high=0.999)
  label_smoothing: float = option(0.1, "mass on all classes", low=0, high=0.999)
  mixup: float = option(
      0.0, "alpha of mixup's beta distribution; 0: none", low=0)
  cutmix: float = option(
      0.0, "alpha of cutmix's beta distribution; 0: none", low=0)
  mixup_prob: float = option(
      1.0, "probability that a micro-batch is mixed", low=0, high=1)
  mixup_switch_prob: float = option(
      0.5, "that of cutmix, where both are on", low=0, high=1)
  erasing: float = option(
      0.0, "probability that a box of an image becomes noise", low=0, high=1)
  ema_decay: float = option(
      0.0, "moving average of the parameters and BatchNorm's statistics, used "
      "to evaluate; 0: none", low=0, high=0.999999)


@dataclasses.dataclass(frozen=True)
class Eval:
  """Evaluation, on the whole evaluation split; always at the end."""

  batch_size: int = option(1024, "images, over all devices", low=1)
  every_epochs: float = option(1.0, "how often", above=0, high=1e6)
  labels: str = option(
      "split", "split: the evaluation split's own; real: ImageNet-ReaL's; "
      "number: a folder's name is its class, as in ImageNet-V2",
      choices=("number", "real", "split"))
  real_path: str | None = option(None, "labels=real: its real.json")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """One is saved every so often, after each evaluation, and at the end."""

  every_steps: int = option(1000, "how often", low=1)
  keep_last: int = option(2, "newest ones kept", low=1)
  keep_best: int = option(1, "best ones kept besides", low=0)
  best_metric: str = option(
      "top1", "the evaluation's measure of which the highest is the best")


@dataclasses.dataclass(frozen=True)
class Mesh:
  """Devices as a grid; the batch is split over both axes."""

  data: int = option(-1, "devices that hold a copy; -1: what is left", low=-1)
  fsdp: int = option(1, "devices that share a copy; -1: what is left", low=-1)
  min_size: int = option(
      2**16, "arrays with fewer values than this are not split", low=0)
  rules: tuple[tuple[Any, ...], ...] = option(
      (), "(regular expression of a parameter's path, axis to split or -1)")
  heartbeat_seconds: int = option(
      30, "a process that is silent for so long is taken for dead", low=5)


@dataclasses.dataclass(frozen=True)
class Log:
  """What a run writes besides checkpoints."""

  every_steps: int = option(50, "how often metrics are written", low=1)
  tensorboard: bool = option(True, "write TensorBoard events")
  hang_seconds: float = option(
      600.0, "when no step ends for so long, what every thread does is written "
      "to stderr", low=1, high=1e6)
  compilation_cache: str = option(
      "~/.cache/metaformer_jax", "folder of compiled programs; empty: none")


@dataclasses.dataclass(frozen=True)
class Experiment:
  """A whole run; every value of it is one `--config.section.key=value`."""

  task: str = option("classification", "what is learned",
                     choices=("classification",))
  init: str | None = option(
      None, "weights to start from: safetensors, .pth or a run's folder")
  seed: int = option(0, "of initialisation, order, augmentation", low=0,
                     high=2**31 - 1)
  model: Model = dataclasses.field(default_factory=Model)
  data: Data = dataclasses.field(default_factory=Data)
  optim: Optim = dataclasses.field(default_factory=Optim)
  train: Train = dataclasses.field(default_factory=Train)
  eval: Eval = dataclasses.field(default_factory=Eval)
  checkpoint: Checkpoint = dataclasses.field(default_factory=Checkpoint)
  mesh: Mesh = dataclasses.field(default_factory=Mesh)
  log: Log = dataclasses.field(default_factory=Log)
