"""Writes learning rates, parameter groups and optimizer steps as timm has them.

  python tests/golden/make_optim.py --poolformer=DIR --metaformer=DIR \
      --pvt=DIR --deit=DIR --old_timm=DIR --out=tests/golden

The clones are those of make.py; `--old_timm` is a folder into which timm 0.6.11
is installed without its dependencies. Wants torch and timm 1.0. Makes
schedules.npz, groups.json and optim.npz, whose contents `optim_cases` tells.
"""

import argparse
import json
import pathlib
import sys
import types

import make
import numpy as np
import old_timm
import timm.models
import timm.optim
import torch

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
import optim_cases
import parity_cases

# timm 0.6.11, models/poolformer.py; timm 1.0 has no such groups of MetaFormer.
_PREVIOUS = (99999,)
_POOLFORMER_LAYERS = {
    "stem": r"^patch_embed",
    "blocks": [(r"^network\.(\d+).*\.proj", _PREVIOUS),
               (r"^network\.(\d+)\.(\d+)", None), (r"^norm", _PREVIOUS)],
}


def rates(args, folder):
  """The rate of each epoch, as the official training scripts come by it."""
  opt = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=args["lr"])
  factory = old_timm.load(folder, "scheduler.scheduler_factory")
  scheduler, n_epochs = factory.create_scheduler(
      types.SimpleNamespace(**args), opt)
  found = []
  for epoch in range(n_epochs or args["epochs"]):
    found.append(opt.param_groups[0]["lr"])
    if scheduler is not None:
      scheduler.step(epoch + 1)
  return np.array(found)


def layers(case, model):
  """The layer of each parameter; None where timm has no groups."""
  if hasattr(model, "group_matcher"):
    matcher = model.group_matcher(coarse=False)
  elif case.name == "poolformer_s12-official":
    matcher = _POOLFORMER_LAYERS
  else:
    return None
  numbers = timm.models.group_parameters(model, matcher, reverse=True)
  return [numbers[k] for k, p in model.named_parameters() if p.requires_grad]


def groups(case, model):
  """{"decayed", "layers"} of the trainable parameters, in their order."""
  exempt = getattr(model, "no_weight_decay", set)()
  _, decayed = timm.optim.param_groups_weight_decay(
      model, 0.05, no_weight_decay_list=exempt)
  decayed = {id(p) for p in decayed["params"]}
  return {"decayed": [int(id(p) in decayed) for p in model.parameters()
                      if p.requires_grad],
          "layers": layers(case, model)}


def steps(settings, folder):
  """The parameters after each step: {name: [step, ...]}."""
  arrays = {k: torch.nn.Parameter(torch.from_numpy(v))
            for k, v in optim_cases.parameters().items()}
  settings = dict(settings)
  name, decay = settings.pop("name"), settings.pop("weight_decay")
  make_optimizer = {
      "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD,
      "lamb": old_timm.load(folder, "optim.lamb").Lamb}[name]
  opt = make_optimizer([
      {"params": [p for p in arrays.values() if p.ndim <= 1],
       "weight_decay": 0.0},
      {"params": [p for p in arrays.values() if p.ndim > 1],
       "weight_decay": decay}], lr=optim_cases.RATE, **settings)
  found = {k: [] for k in arrays}
  for gradients in optim_cases.gradients():
    for k, p in arrays.items():
      p.grad = torch.from_numpy(gradients[k].copy())
    opt.step()
    for k, p in arrays.items():
      found[k].append(p.detach().numpy().copy())
  return found


def main():
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  for name in (*make.SOURCES, "old_timm", "out"):
    parser.add_argument(f"--{name}", metavar="DIR", required=True)
  args = parser.parse_args()
  make.alias_old_timm()
  out = pathlib.Path(args.out)
  np.savez_compressed(out / "schedules.npz", **{
      name: rates(case, args.old_timm)
      for name, case in optim_cases.SCHEDULES.items()})
  np.savez_compressed(out / "optim.npz", **{
      f"{case}/{k}": np.array(v)
      for case, settings in optim_cases.OPTIMIZERS.items()
      for k, v in steps(settings, args.old_timm).items()})
  sources = {o: make.load_source(o, getattr(args, o)) for o in make.SOURCES}
  found = {}
  for case in parity_cases.SMALL:
    if not case.name.endswith("-eps"):
      found[case.name] = groups(case, make.build(case, sources))
  (out / "groups.json").write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
  main()
