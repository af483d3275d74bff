r"""Fine-tunes published weights, or a run's, on a folder of one's own images.

    python -m metaformer_jax.main --config=configs/finetune.py \
        --config.data.path=photos --config.init=caformer_s18

`photos` has a folder of images for each class; or train/ and val/ with these.
Without val/, a fifth of each class's images is held out for the evaluation.
`config.init` is the name of a model with published weights, a file of weights
or a run's workdir; the model, the image size and the preprocessing are its own.
For a file that does not record its model, add `--config.model.name`.

`configs/finetune.py:probe` trains the head only, on the features as they are.

Hardware: a GPU, or a few hundred images on a CPU; `--config.train.batch_size`
changes the learning rate in proportion.
Expected: see docs/results.md for what it gives on small data sets.
"""

from metaformer_jax import recipes
from metaformer_jax.config import default

# Base learning rate, decay from block to block, what is not trained.
_SETTINGS = {
    "all": (1.6e-2, 0.85, ()),
    "probe": (1.6e-1, 1.0, ("backbone",)),
}


def get_config(variant="all"):
  base_lr, layer_decay, freeze = recipes.variant(_SETTINGS, variant)
  config = default()
  config.init = "caformer_s18"
  config.train.freeze = freeze
  config.optim.base_lr = base_lr
  config.optim.layer_decay = layer_decay
  config.optim.min_lr = 0.0
  config.optim.warmup_lr = 0.0
  config.optim.warmup_epochs = 0.5
  config.train.batch_size = 32
  config.train.epochs = 30.0
  config.model.drop_path_rate = 0.1
  config.data.eval_fraction = 0.2
  # Of one's own few images, one in twenty may be unreadable.
  config.data.max_bad_fraction = 0.05
  config.task.crop_area = (0.4, 1.0)
  config.task.color_jitter = 0.2
  config.eval.batch_size = 32
  config.checkpoint.best_metric = "top1"
  return config
