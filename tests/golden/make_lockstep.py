"""Trains the lockstep runs in PyTorch and writes how they went.

  python tests/golden/make_lockstep.py --poolformer=DIR --metaformer=DIR \
      --old_timm=DIR --out=tests/golden [--full] [--only=PATTERN]

As the official training script: the official models, timm's LAMB, learning
rates, decay groups and moving average. DIR are clones of sail-sg/poolformer and
sail-sg/metaformer, and a folder into which timm 0.6.11 is installed without its
dependencies. Wants torch and timm 1.0. The format is
`lockstep_cases.Trajectory`.
"""

import argparse
import fnmatch
import pathlib
import sys
import types

import make
import numpy as np
import old_timm
import timm
import timm.loss
import timm.optim
import timm.utils
import torch

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
import lockstep_cases


def optimizer(run, model, folder):
  """By the decay groups of timm, which are those of 0.6.11."""
  optim = run.optim
  exempt = getattr(model, "no_weight_decay", set)()
  groups = timm.optim.param_groups_weight_decay(
      model, optim["weight_decay"], no_weight_decay_list=exempt)
  rate = {"lr": run.peak}
  if optim["name"] == "lamb":
    return old_timm.load(folder, "optim.lamb").Lamb(groups, **rate)
  if optim["name"] == "sgd":
    return torch.optim.SGD(groups, momentum=0.9, nesterov=True, **rate)
  return torch.optim.AdamW(groups, **rate)


def scheduler(run, opt, folder):
  args = types.SimpleNamespace(
      epochs=run.epochs, sched=run.optim["schedule"], **{
          k: run.optim[k] for k in ("min_lr", "warmup_lr", "warmup_epochs",
                                    "cooldown_epochs")})
  factory = old_timm.load(folder, "scheduler.scheduler_factory")
  return factory.create_scheduler(args, opt)


def images(x):
  """uint8 [B, H, W, 3] -> float32 [B, 3, H, W], normalised."""
  mean, std = (torch.tensor(v) for v in (
      (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
  x = (torch.from_numpy(x).float() / 255 - mean) / std
  return x.permute(0, 3, 1, 2).contiguous()


def state_of(model):
  return {k: v.detach().numpy().copy() for k, v in model.state_dict().items()}


def train(run, model, folder):
  opt = optimizer(run, model, folder)
  sched, n_epochs = scheduler(run, opt, folder)
  loss_fn = timm.loss.LabelSmoothingCrossEntropy(lockstep_cases.LABEL_SMOOTHING)
  ema = timm.utils.ModelEmaV2(model, decay=run.ema_decay)
  first = state_of(model)
  model.train()
  losses, rates = [], []
  for epoch in range(n_epochs):
    for x, y in lockstep_cases.batches(run):
      loss = loss_fn(model(images(x)), torch.from_numpy(y).long())
      opt.zero_grad()
      loss.backward()
      losses.append(loss.item())
      rates.append(opt.param_groups[0]["lr"])
      opt.step()
      ema.update(model)
    sched.step(epoch + 1)

  def movements(model):
    return {k: lockstep_cases.movement(k, first[k], v)
            for k, v in state_of(model).items() if v.dtype == np.float32}

  return lockstep_cases.Trajectory(
      meta={"run": run.name, "torch": torch.__version__,
            "timm": [timm.__version__, old_timm.VERSION]},
      shapes={k: v.shape for k, v in first.items()}, losses=np.array(losses),
      rates=np.array(rates), state=movements(model),
      ema=movements(ema.module))


def parse():
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  for name in ("poolformer", "metaformer", "old_timm", "out"):
    parser.add_argument(f"--{name}", metavar="DIR", required=True)
  parser.add_argument("--full", action="store_true",
                      help="the runs of full depth, not the small ones")
  parser.add_argument("--only", metavar="PATTERN", default="*")
  return parser.parse_args()


def main():
  args = parse()
  make.alias_old_timm()
  sources = {name: make.load_source(name, getattr(args, name))
             for name in ("poolformer", "metaformer")}
  out = pathlib.Path(args.out)
  out.mkdir(parents=True, exist_ok=True)
  for run in lockstep_cases.FULL if args.full else lockstep_cases.SMALL:
    if fnmatch.fnmatch(run.name, args.only):
      result = train(run, make.build(run.case, sources), args.old_timm)
      result.save(out / f"{run.name}.npz")
      print(f"{run.name}: losses {np.round(result.losses, 3).tolist()}",
            flush=True)


if __name__ == "__main__":
  main()
