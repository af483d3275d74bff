"""Runs the parity cases in PyTorch and writes what they give.

  python tests/golden/make.py --poolformer=DIR --metaformer=DIR --pvt=DIR \
      --deit=DIR --out=tests/golden

DIR are clones of sail-sg/poolformer, sail-sg/metaformer, whai362/PVT and
facebookresearch/deit, of which only the selected cases' are needed. Wants
torch, timm 1.0 and transformers. The format is `parity_cases.Golden`.
"""

import argparse
import contextlib
import fnmatch
import importlib
import importlib.util
import io
import json
import pathlib
import re
import sys
import types

import numpy as np
import safetensors.torch
import timm
import torch

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
import parity_cases

# The file of each repository that defines an oracle's models.
SOURCES = {
    "poolformer": "models/__init__.py",
    "metaformer": "metaformer_baselines.py",
    "pvt": "classification/pvt.py",
    "deit": "resmlp_models.py",
}


def alias_old_timm():
  """Gives the repositories the names that timm had in their time.

  Their models are registered nowhere, for they have the names of timm's own.
  """
  registry = types.ModuleType("timm.models.registry")
  registry.register_model = lambda fn: fn
  sys.modules.update({
      "timm.models.registry": registry,
      "timm.models.layers": timm.layers,
      "timm.models.layers.helpers": timm.layers.helpers,
  })


def load_source(oracle, folder):
  path = pathlib.Path(folder, SOURCES[oracle])
  spec = importlib.util.spec_from_file_location(
      f"official_{oracle}", path, submodule_search_locations=[
          str(path.parent)] if path.name == "__init__.py" else None)
  module = importlib.util.module_from_spec(spec)
  sys.modules[spec.name] = module
  with contextlib.redirect_stdout(io.StringIO()):  # Says what it lacks.
    spec.loader.exec_module(module)
  return module


def stacks(model):
  """Returns [(parent, name)] of the containers of blocks, one a stage."""
  if hasattr(model, "network"):  # Official PoolFormer.
    return [(model.network, str(i)) for i, m in enumerate(model.network)
            if isinstance(m, torch.nn.Sequential)]
  if hasattr(model, "stages"):
    return [(stage, "blocks") if hasattr(stage, "blocks")
            else (model.stages, str(i)) for i, stage in enumerate(model.stages)]
  if hasattr(model, "blocks"):
    return [(model, "blocks")]
  name = "layer" if hasattr(model, "layer1") else "block"
  return [(model, f"{name}{i}") for i in range(1, 5)]


def build(case, sources):
  """The case's oracle with its weights, in evaluation mode."""
  if case.oracle == "huggingface":
    hf = importlib.import_module("transformers")
    # Its default configuration is PoolFormer-S12.
    model = hf.PoolFormerForImageClassification(hf.PoolFormerConfig(
        num_labels=case.num_classes, **case.overrides))
  else:
    if case.oracle == "timm":
      kwargs = ({"dynamic_img_size": True}
                if case.entry.startswith(("vit_", "deit_")) else {})
      model = timm.create_model(case.entry, num_classes=case.num_classes,
                                **kwargs)
      if case.entry.startswith(("convformer", "caformer")):
        model.head.fc.norm.eps = 1e-5  # The official value; timm has 1e-6.
    else:
      model = getattr(sources[case.oracle], case.entry)(
          num_classes=case.num_classes)
    depths = case.overrides.get("depths") or (
        (case.overrides["depth"],) if "depth" in case.overrides else ())
    for (parent, name), depth in zip(stacks(model) if depths else (), depths,
                                     strict=True):
      setattr(parent, name, getattr(parent, name)[:depth])
  state = parity_cases.weights(
      {k: tuple(v.shape) for k, v in model.state_dict().items()},
      gain=case.gain)
  model.load_state_dict({k: torch.from_numpy(v) for k, v in state.items()},
                        strict=True)
  return model.eval()


def taps(case, model):
  """Returns {stage: module whose output is the stage's}."""
  if case.oracle == "huggingface":
    modules = [blocks[-1] for blocks in model.poolformer.encoder.block]
  elif hasattr(model, "stages"):  # timm's attention blocks see tokens.
    modules = list(model.stages)
  else:
    modules = [getattr(parent, name)[-1] for parent, name in stacks(model)]
  return {f"stage{i}": m for i, m in enumerate(modules, 5 - len(modules))}


def channel_last(case, model, stage, y, size):
  """A tap's output as [batch, height, width, channels]."""
  y = y[0] if isinstance(y, tuple) else y
  if y.ndim == 4:
    return y if case.oracle == "metaformer" else y.permute(0, 2, 3, 1)
  if case.oracle == "pvt":
    stride = 2 ** (int(stage[-1]) + 1)
  else:
    embed = model.stem if hasattr(model, "stem") else model.patch_embed
    stride = embed.patch_size[0]
  h, w = (n // stride for n in size)
  return y[:, -h * w:].reshape(y.shape[0], h, w, -1)


def run(case, model, size, grad):
  """Logits and the stages' outputs at one size; leaves gradients in model."""
  x = torch.from_numpy(parity_cases.images(case.batch, *size))
  features = {}

  def hook(stage):
    def keep(module, args, y):
      del module, args
      features[stage] = channel_last(case, model, stage, y, size).detach()
    return keep

  hooks = [m.register_forward_hook(hook(s))
           for s, m in taps(case, model).items()]
  with torch.set_grad_enabled(grad):
    y = model(x.permute(0, 3, 1, 2).contiguous())
    y = getattr(y, "logits", y)
    if grad:
      label = torch.from_numpy(
          parity_cases.labels(case.batch, case.num_classes))
      torch.nn.functional.cross_entropy(y, label).backward()
  for h in hooks:
    h.remove()
  return y.detach().numpy(), {k: v.numpy() for k, v in features.items()}


def golden(case, model):
  """Runs the case at all its sizes."""
  params = dict(model.named_parameters(remove_duplicate=False))
  state = []
  for key, tensor in model.state_dict().items():
    trainable = key in params and params[key].requires_grad
    state.append((key, tuple(tensor.shape),
                  str(tensor.dtype).removeprefix("torch."), trainable))
  logits, shapes, features = {}, {}, {}
  for i, size in enumerate(case.sizes):
    logits[size], stages = run(case, model, size, grad=i == 0)
    shapes[size] = {k: v.shape for k, v in stages.items()}
    features[size] = {k: parity_cases.summary(v) for k, v in stages.items()}
  return parity_cases.Golden(
      meta={
          "case": case.name, "seed": parity_cases.SEED,
          "torch": torch.__version__, "timm": timm.__version__,
          "numpy": np.__version__,
          "n_params": sum(p.numel() for p in model.parameters()
                          if p.requires_grad)},
      state=state, shapes=shapes, logits=logits, features=features,
      gradients={
          key: parity_cases.sketch(key, params[key].grad.numpy())
          for key, _, _, trainable in state if trainable})


def check(case, model, path):
  """Loads a converted file into the oracle; returns what differs."""
  want = {k: v.clone() for k, v in model.state_dict().items()}
  got = safetensors.torch.load_file(path)
  try:
    model.load_state_dict(got, strict=True)
  except RuntimeError as e:
    return str(e)
  return "; ".join(
      f"{key}: not the bits of the weights" for key, tensor in want.items()
      if got[key].dtype != tensor.dtype or not torch.equal(got[key], tensor))


def parse(argv):
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  for oracle in SOURCES:
    parser.add_argument(f"--{oracle}", metavar="DIR", help="the clone")
  parser.add_argument("--full", action="store_true",
                      help="the cases of full depth, not the small ones")
  parser.add_argument("--only", metavar="PATTERN", default="*",
                      help="of the cases' names, as a shell takes it")
  parser.add_argument("--out", metavar="DIR", help="write golden files")
  parser.add_argument("--check", metavar="DIR",
                      help="compare every CASE.safetensors, small or full")
  parser.add_argument("--save", metavar="DIR", help="write weights: CASE.pth")
  parser.add_argument("--legacy", action="store_true",
                      help="save as torch did before 1.6, not a zip file")
  args = parser.parse_args(argv)
  if not (args.out or args.check or args.save):
    parser.error("nothing to do: none of --out, --check, --save")
  if args.check and (args.out or args.save):
    parser.error("--check goes alone")
  return parser, args


def select(parser, args):
  if args.check:
    names = [p.stem for p in sorted(
        pathlib.Path(args.check).glob("*.safetensors"))]
    unknown = sorted(set(names) - set(parity_cases.CASES))
    if unknown:
      parser.error(f"no cases of these names: {', '.join(unknown)}")
  else:
    names = [c.name for c in (
        parity_cases.FULL if args.full else parity_cases.SMALL)]
  cases = [parity_cases.CASES[n] for n in fnmatch.filter(names, args.only)]
  if not cases:
    parser.error("no case selected")
  needed = {c.oracle for c in cases} & set(SOURCES)
  missing = sorted(o for o in needed if not getattr(args, o))
  if missing:
    parser.error(f"these cases need --{', --'.join(missing)}")
  return cases, {o: load_source(o, getattr(args, o)) for o in sorted(needed)}


def one_line(text):
  return re.sub(r"\s+", " ", text).strip()


def main(argv=None):
  parser, args = parse(argv)
  torch.set_num_threads(1)
  alias_old_timm()
  cases, sources = select(parser, args)
  for folder in filter(None, (args.out, args.save)):
    pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
  failed = False
  for case in cases:
    model = build(case, sources)
    said = []
    if args.check:
      wrong = check(case, model,
                    pathlib.Path(args.check, f"{case.name}.safetensors"))
      failed |= bool(wrong)
      said.append(f"WRONG: {one_line(wrong)}" if wrong else "equal")
    if args.save:
      path = pathlib.Path(args.save, f"{case.name}.pth")
      torch.save(model.state_dict(), path,
                 _use_new_zipfile_serialization=not args.legacy)
      said.append(str(path))
    if args.out:
      path = pathlib.Path(args.out, f"{case.name}.npz")
      result = golden(case, model)
      result.save(path)
      rms = {k: round(float(v[1]), 2)
             for k, v in result.features[case.sizes[0]].items()}
      said.append(f"{path} {result.meta['n_params']} {json.dumps(rms)}")
    print(f"{case.name}: {' '.join(said)}", flush=True)
  sys.exit(int(failed))


if __name__ == "__main__":
  main()
