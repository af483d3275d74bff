"""Runs the cases of segmentation in mmsegmentation and writes what they give.

  python tests/golden/make_segmentation.py --poolformer=DIR --pvt=DIR \
      --out=tests/golden/segmentation

DIR are clones of sail-sg/poolformer and whai362/PVT. Wants torch, timm 1.0 and
mmsegmentation 0.19, which the official PoolFormer trains with:

  pip install "setuptools<66" wheel addict yapf==0.40.1 terminaltables \
      prettytable matplotlib opencv-python-headless
  MMCV_WITH_OPS=0 pip install --no-deps --no-build-isolation mmcv==1.7.2
  pip install --no-deps mmsegmentation==0.19.0

The format is `parity_cases.Golden`. --save=DIR writes .pth files as mmcv does.
"""

import argparse
import importlib.util
import pathlib
import sys
import types
import warnings

import numpy as np
import torch

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
import head_cases
import make
import parity_cases


def import_mmseg():
  """mmsegmentation 0.19 with the mmcv that runs with current torch."""
  warnings.simplefilter("ignore")
  operations = types.ModuleType("mmcv._ext")  # Compiled ones, of other heads.
  operations.__file__ = "_ext.py"
  operations.__getattr__ = lambda name: lambda *args: None
  sys.modules["mmcv._ext"] = operations
  import mmcv  # noqa: PLC0415 - after what it needs.

  mmcv.__version__ = "1.4.0"  # mmsegmentation refuses later ones.
  import mmseg.models  # noqa: PLC0415

  return mmseg.models


def register(models, poolformer, pvt):
  """Adds the official backbones to mmsegmentation's."""
  make.alias_old_timm()
  path = pathlib.Path(pvt, "segmentation/pvt.py")
  spec = importlib.util.spec_from_file_location("official_pvt", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  for backbone in (make.load_source("poolformer", poolformer).PoolFormer,
                   module.PyramidVisionTransformer):
    models.BACKBONES.register_module(module=backbone)


def config(case):
  """mmsegmentation's config of the model, without dropout."""
  common = {
      "num_classes": head_cases.NUM_CLASSES, "dropout_ratio": 0.0,
      "norm_cfg": {"type": "BN"}, "align_corners": False}
  found = {
      "type": "EncoderDecoder", "backbone": dict(case.theirs),
      "train_cfg": {}, "test_cfg": {"mode": "whole"}}
  head = {**common, "channels": head_cases.HEAD_DIMS[case.head],
          "in_index": [0, 1, 2, 3]}
  if case.head == "semantic_fpn":
    dim = head_cases.FPN_DIM
    return {
        **found,
        "neck": {"type": "FPN", "in_channels": list(case.dims),
                 "out_channels": dim, "num_outs": 4},
        "decode_head": {**head, "type": "FPNHead", "in_channels": [dim] * 4,
                        "feature_strides": [4, 8, 16, 32]}}
  return {
      **found,
      "decode_head": {**head, "type": "UPerHead",
                      "in_channels": list(case.dims),
                      "pool_scales": head_cases.POOL_SIZES},
      "auxiliary_head": {
          **common, "type": "FCNHead", "in_channels": case.dims[2],
          "in_index": 2, "num_convs": 1, "concat_input": False,
          "channels": head_cases.AUXILIARY_DIM,
          "loss_decode": {
              "type": "CrossEntropyLoss",
              "loss_weight": head_cases.AUXILIARY_WEIGHT}}}


def build(case, models):
  model = models.build_segmentor(config(case))
  # UPerHead adds in place to what ReLU's gradient needs since PyTorch 1.8.
  for conv in getattr(model.decode_head, "lateral_convs", ()):
    conv.register_forward_hook(lambda module, args, y: y.clone())
  if case.n_blocks:
    for parent, name in make.stacks(model.backbone):
      setattr(parent, name, torch.nn.Sequential(
          *list(getattr(parent, name))[:case.n_blocks]))
  state = head_cases.weights(
      {k: tuple(v.shape) for k, v in model.state_dict().items()})
  model.load_state_dict({k: torch.from_numpy(v) for k, v in state.items()})
  return model


def golden(model):
  """The outputs at all sizes, and the gradients at the first."""
  model.eval()
  logits = {}
  for size in head_cases.SIZES:
    x = torch.from_numpy(head_cases.images(size)).permute(0, 3, 1, 2)
    with torch.no_grad():
      y = model.decode_head(model.extract_feat(x))
    logits[size] = y.permute(0, 2, 3, 1).numpy()
  size = head_cases.SIZES[0]
  x = torch.from_numpy(head_cases.images(size)).permute(0, 3, 1, 2)
  target = torch.from_numpy(head_cases.labels(size).astype(np.int64))
  state = [(k, tuple(v.shape), str(v.dtype).removeprefix("torch."),
            k in dict(model.named_parameters()))
           for k, v in model.state_dict().items()]
  model.train()
  losses = model.forward_train(x, None, target[:, None])
  losses = {k: v for k, v in losses.items() if "loss" in k}
  sum(losses.values()).backward()
  return parity_cases.Golden(
      meta={"torch": torch.__version__, "numpy": np.__version__,
            "n_params": sum(p.numel() for p in model.parameters()),
            "losses": {k: v.item() for k, v in losses.items()}},
      state=state, logits=logits, shapes={size: {} for size in logits},
      features={size: {} for size in logits},
      gradients={k: parity_cases.sketch(k, p.grad.numpy()) if p.grad is not None
                 else np.zeros(3) for k, p in model.named_parameters()})


def save(model, path):
  """As `mmcv.runner.save_checkpoint`, with what mmsegmentation adds."""
  from mmcv import runner  # noqa: PLC0415 - after `import_mmseg`.

  optimizer = torch.optim.AdamW(model.parameters())
  sum(p.sum() for p in model.parameters()).backward()
  optimizer.step()
  runner.save_checkpoint(model, str(path), optimizer, meta={
      "epoch": 1, "iter": 3, "CLASSES": ("wall", "sky"), "seed": 0,
      "PALETTE": [[120, 120, 120], [6, 230, 230]], "config": "model = 1",
      "mmseg_version": "0.19.0", "env_info": "a\nb", "hook_msgs": {}})


def main():
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  parser.add_argument("--poolformer", required=True, help="the clone")
  parser.add_argument("--pvt", required=True, help="the clone")
  parser.add_argument("--out", help="write golden files to this folder")
  parser.add_argument("--save", help="write weights to this folder")
  args = parser.parse_args()
  torch.set_num_threads(1)
  models = import_mmseg()
  register(models, args.poolformer, args.pvt)
  for folder in filter(None, (args.out, args.save)):
    pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
  for case in head_cases.CASES.values():
    model = build(case, models)
    if args.out:
      result = golden(model)
      result.save(pathlib.Path(args.out, f"{case.name}.npz"))
      print(case.name, result.meta, flush=True)
    if args.save:
      save(model, pathlib.Path(args.save, f"{case.name}.pth"))


if __name__ == "__main__":
  main()
