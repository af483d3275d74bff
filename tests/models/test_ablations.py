"""The papers' ablations as settings: costs, configs, initial values, errors.

Rows: table 5 of arXiv 2111.11418, and what arXiv 2210.13452 varies, all as
overrides of `poolformer_s12`. tests/models/test_blocks.py has their equations,
tests/training/test_ablation_runs.py trains some.
"""

import ast
import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import metaformer_jax
from metaformer_jax import errors
from metaformer_jax.config import resolve as config_lib
from metaformer_jax.config import typed
from metaformer_jax.models import cost
from metaformer_jax.tasks import classification

BASELINE = 11_915_176
N_CHANNELS = 2 * 64 + 2 * 128 + 6 * 320 + 2 * 512  # Of all blocks.


def mixers(letters):
  """"ppaa" -> the four mixers' names."""
  names = {"i": "identity", "r": "random", "d": "depthwise_conv",
           "p": "pooling", "a": "attention", "f": "spatial_fc"}
  return {"token_mixers": tuple(names[letter] for letter in letters)}


# Setting: overrides, parameters, published parameters in 1e6, published GMACs.
# The second paper publishes no costs of its ablations: these are counted.
TABLE = {
    "baseline": ({}, BASELINE, 11.9, 1.8),
    "identity": (mixers("iiii"), BASELINE, 11.9, 1.8),
    "random": (mixers("rrrr"), BASELINE, 11.9, 3.3),
    "depthwise conv": (mixers("dddd"), BASELINE + 10 * N_CHANNELS, 11.9, 1.8),
    "pool 5": ({"pool_size": 5}, BASELINE, 11.9, 1.8),
    "pool 7": ({"pool_size": 7}, BASELINE, 11.9, 1.8),
    "pool 9": ({"pool_size": 9}, BASELINE, 11.9, 1.8),
    "layer norm": ({"norm": "layer_norm"}, BASELINE, 11.9, 1.8),
    "batch norm": ({"norm": "batch_norm"}, BASELINE, 11.9, 1.8),
    "no norm": ({"norm": "none"}, BASELINE - 4 * N_CHANNELS - 2 * 512, 11.9,
                1.8),
    "relu": ({"activation": "relu"}, BASELINE, 11.9, 1.8),
    "silu": ({"activation": "silu"}, BASELINE, 11.9, 1.8),
    "no residual": ({"residual": False}, BASELINE, 11.9, 1.8),
    "no mlp": ({"mlp_ratio": 0.0}, 2_451_368, 2.5, 0.2),
    "pppa": ({**mixers("pppa"), "position_embeddings": (4,),
              "norm": "layer_norm"}, 14_038_440, 14.0, 1.9),
    "ppaa": ({**mixers("ppaa"), "position_embeddings": (3,),
              "norm": "layer_norm"}, 16_535_592, 16.5, 2.5),
    "pppf": (mixers("pppf"), 11_919_978, 11.9, 1.8),
    "ppff": (mixers("ppff"), 12_150_474, 12.2, 1.9),
    "no subtraction": ({"pool_subtract": False}, BASELINE, 11.9, 1.8),
    "no layer scale": ({"layer_scale_init": 0.0}, BASELINE - 2 * N_CHANNELS,
                       11.9, 1.8),
    "res scale": ({"res_scale_init": (0.0, 0.0, 1.0, 1.0)},
                  BASELINE + 2 * (6 * 320 + 2 * 512), 11.9, 1.8),
    "star relu": ({"activation": "star_relu"}, BASELINE + 2 * 12, 11.9, 1.8),
    "squared relu": ({"activation": "squared_relu"}, BASELINE, 11.9, 1.8),
}


# Of the default tests: a row of each kind of change.
DEFAULT = ("baseline", "random", "depthwise conv", "pool 9", "batch norm",
           "no norm", "relu", "no residual", "no mlp", "ppaa", "ppff",
           "no layer scale", "res scale", "star relu")


@pytest.mark.parametrize("row", [
    pytest.param(row, marks=[pytest.mark.slow] * (row not in DEFAULT))
    for row in TABLE])
def test_costs_are_the_published(row):
  overrides, n_params, millions, gmacs = TABLE[row]
  found = cost.of_model(
      metaformer_jax.create_model("poolformer_s12", **overrides), 224)
  assert found.n_params == n_params
  assert round(found.n_params / 1e6, 1) == millions
  assert round(found.macs / 1e9, 1) == gmacs
  assert found.n_frozen == (21_133_602 if row == "random" else 0)


@pytest.mark.parametrize("row", TABLE)
def test_config_builds_the_same_module(row):
  overrides = TABLE[row][0]
  config = typed.default()
  config.model.name = "poolformer_s12"
  config.data.source = "digits"
  for key, value in overrides.items():
    config.model[key] = value
  cfg = config_lib.resolve(config)
  assert cfg.model.overrides() == overrides
  assert classification.create(cfg)[1].model == metaformer_jax.create_model(
      "poolformer_s12", num_classes=10, dtype=jnp.dtype("float32"),
      **overrides)


# --- The command line ------------------------------------------------------

# Options of the command line, and the settings that they are.
FLAGS = {
    "residual=False": {"residual": False},
    "res_scale_init=(0.,0.,1.,1.)": {"res_scale_init": (0.0, 0.0, 1.0, 1.0)},
    "res_scale_init=(0,0,1,1)": {"res_scale_init": (0.0, 0.0, 1.0, 1.0)},
    "res_scale_init=()": {"res_scale_init": ()},
    "position_embeddings=(3,4)": {"position_embeddings": (3, 4)},
    "position_embeddings=(4,)": {"position_embeddings": (4,)},
    "position_embeddings=4": {"position_embeddings": (4,)},
    "position_embeddings=()": {"position_embeddings": ()},
    "layer_scale_init=0": {"layer_scale_init": 0.0},
    "layer_scale_init=1e-6": {"layer_scale_init": 1e-6},
    "mlp_ratio=0": {"mlp_ratio": 0.0},
    "norm=none": {"norm": "none"},
    "norm=batch_norm": {"norm": "batch_norm"},
    "activation=star_relu": {"activation": "star_relu"},
    "pool_subtract=false": {"pool_subtract": False},
    "token_mixers=('random',)*4": "config.model.token_mixers: ",  # No literal.
    "token_mixers=('random','random','random','random')": mixers("rrrr"),
    "norm=None": {},
    "name=pvt_tiny qkv_bias=False": {"qkv_bias": False},
    "name=pvt_tiny n_heads=(1,2,5,16)": {"n_heads": (1, 2, 5, 16)},
    "name=pvt_tiny n_heads=2": "config.model.n_heads: 2 is not a tuple",
    "name=deit_small_patch16_224 n_heads=3": {"n_heads": 3},
    "name=deit_small_patch16_224 mlp_ratio=2": {"mlp_ratio": 2.0},
    "name=deit_small_patch16_224 distilled=true": {"distilled": True},
    "name=mixer_b16_224 mlp_ratio=(1,2.5)": {"mlp_ratio": (1.0, 2.5)},
    "name=mixer_b16_224 mlp_ratio=4": "config.model.mlp_ratio: 4 is not a tup",
    "mlp_ratio=four": "config.model.mlp_ratio: 'four' is not a float",
    "name=resnet18 block=bottleneck": {"block": "bottleneck"},
    "name=resnet18 widths=8,8,8,8": {"widths": (8, 8, 8, 8)},
    "qkv_bias=False": "config.model.qkv_bias: poolformer_s12 has no such hyper-"
                      "parameter; pvt has it",
}


@pytest.mark.slow
def test_command_line_sets_every_ablation(tmp_path):
  """All in one process: the config's flags are absl's, which are global."""
  config = tmp_path / "digits.py"
  config.write_text(
      "from metaformer_jax import config\n"
      "def get_config():\n"
      "  c = config.default()\n"
      "  c.model.name = 'poolformer_s12'\n"
      "  c.data.source = 'digits'\n"
      "  return c\n")
  code = (
      "import os, sys\n"
      "from metaformer_jax import cli, errors\n"
      "for option in sys.argv[2:]:\n"
      "  sys.stdout.flush()\n"
      "  if not os.fork():\n"
      "    sys.argv = ['x', sys.argv[1], *(\n"
      "        '--config.model.' + o for o in option.split())]\n"
      "    try:\n"
      "      print(cli.parse()[0].model.overrides())\n"
      "    except errors.ConfigError as e:\n"
      "      print(repr(str(e)))\n"
      "    break\n"
      "  os.wait()\n")
  done = subprocess.run(
      [sys.executable, "-c", code, f"--config={config}", *FLAGS],
      capture_output=True, text=True, check=True)
  found = [ast.literal_eval(line) for line in done.stdout.splitlines()]
  for (option, want), got in zip(FLAGS.items(), found, strict=True):
    if isinstance(want, str):
      assert got.startswith(want), got
    else:
      assert repr(got) == repr(want), option  # 0 is not 0.0, nor False.


# --- Mistakes ---------------------------------------------------------------


@pytest.mark.parametrize("settings,message", [
    ({"position_embeddings": (5,)}, "there is no stage 5"),
    ({"position_embeddings": (0,)}, "there is no stage 0"),
    ({"res_scale_init": (1.0,)}, "res_scale_init has 1; give each the same"),
    ({"depths": (1, 1)}, "depths: has 2 stages, dims has 4"),
    ({"pool_size": 4}, "pool_size 4 is not odd"),
    ({**mixers("dddd"), "conv_kernel_size": 2}, "conv_kernel_size 2 is not"),
    ({"token_mixers": ("sepconv",) * 4, "conv_kernel_size": 6},
     "conv_kernel_size 6 is not odd"),
    ({"token_mixers": ("pool",) * 4}, "did you mean pooling"),
    ({"norm": "batchnorm"}, "did you mean batch_norm"),
    ({"activation": "starrelu"}, "did you mean star_relu"),
    ({"conv_init": "pytorch"}, "did you mean torch"),
    ({"head": "mpl"}, "did you mean mlp"),
])
def test_mistakes_in_python_are_told_in_one_line(settings, message):
  with pytest.raises(ValueError, match=message) as caught:
    jax.eval_shape(
        metaformer_jax.create_model("poolformer_s12", **settings).init,
        jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize("settings,message", [
    ({"position_embeddings": (0,)}, "holds 0, which is below the least, 1"),
    ({"position_embeddings": 4}, "4 is not a tuple"),
    ({"name": "metaformer_ppaa_s12_224", "depths": (1, 1), "dims": (8, 8),
      "token_mixers": ("pooling",) * 2}, "there is no stage 3; nearest: 2"),
    ({"name": "poolformerv2_s12", "depths": (1, 1), "dims": (8, 8),
      "token_mixers": ("pooling",) * 2}, "res_scale_init has 4"),
    ({"res_scale_init": ()}, None),
    ({"res_scale_init": (0, 0, 1)}, "res_scale_init has 3"),
    ({"conv_kernel_size": 2}, "2 is even; nearest: 3"),
    ({"mlp_ratio": -1.0}, "is below the least, 0"),
    ({"mlp_ratio": 1e-3}, "gives an MLP without channels"),
    ({"residual": 0}, "0 is not a bool"),
    ({"norm_eps": 0.0}, "is not above 0"),
    ({"activation": "starrelu"}, "did you mean star_relu"),
    ({"conv_init": "pytorch"}, "did you mean torch"),
    ({"head": "mpl"}, "did you mean mlp"),
])
def test_mistakes_in_configs_are_told_in_one_line(settings, message):
  config = {"data": {"source": "digits"},
            "model": {"name": "poolformer_s12", **settings}}
  if message is None:
    config_lib.resolve(config)
    return
  with pytest.raises(errors.ConfigError, match=message) as caught:
    config_lib.resolve(config)
  told = str(caught.value)
  assert told.startswith("config.model") and "\n" not in told


# --- First values -----------------------------------------------------------


def first_values(name, **settings):
  """{"path": array} of a narrow model."""
  model = metaformer_jax.create_model(
      name, depths=(1,) * 4, dims=(64,) * 4, num_classes=50, **settings)
  params = jax.jit(model.init)(
      jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
  return {jax.tree_util.keystr(path, simple=True, separator="/"): value
          for path, value in jax.tree_util.tree_leaves_with_path(params)}


def is_uniform(x, bound):
  return np.abs(x).max() <= bound and np.isclose(
      np.std(x), bound / math.sqrt(3), rtol=5 / math.sqrt(x.size))


def is_normal(x, std=0.02):
  return np.isclose(np.std(x), std, rtol=5 / math.sqrt(x.size))


@pytest.mark.slow
def test_first_values_are_the_official():
  """The first paper leaves convolutions to PyTorch, the second does not."""
  common = {"position_embeddings": (1,), "token_mixers": (
      "spatial_fc", "depthwise_conv", "sepconv", "attention")}
  first = first_values("poolformer_s12", **common)
  second = first_values("convformer_s18", **common, norm_bias=True,
                        res_scale_init=(0.0, 1.0, 1.0, 0.0))
  for path, x in (first | {f"2nd/{k}": v for k, v in second.items()}).items():
    module, kind = path.split("/")[-2:]
    if module in ("conv", "dwconv") and not path.startswith("2nd"):
      kernel = first[path.removesuffix(kind) + "kernel"]
      assert is_uniform(x, math.prod(kernel.shape[:3])**-0.5), path
    elif module == "layer_scale1" or module == "layer_scale2":
      assert np.all(x == np.float32(1e-5)), path
    elif kind == "kernel":
      assert is_normal(x), path
    else:
      assert np.all(x == (kind == "scale")), path
  assert any("res_scale" in path for path in second)
  assert any("act/scale" in path for path in second)
