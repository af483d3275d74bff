r"""Measures RetinaNet with ResNet-50 beside torchvision's, on the CPU.

    python tests/benchmark_detection.py --torch-python=/path/to/python

Both have random weights, images of the same size in a batch, and the same
objects. A training step is the forward and the backward pass and SGD, with the
stem, the first stage and all statistics of BatchNorm frozen. Inference is
divided into the network and the post-processing: scores, boxes and non-maximum
suppression. The last layers' weights are drawn so that many scores are above
the threshold. The other interpreter has torch and torchvision.

Rounds alternate, each in a new process; a ratio is that of neighbouring rounds,
and medians are printed.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

import numpy as np

ROOT = pathlib.Path(__file__).parents[1]
N_CLASSES, N_BOXES = 80, 8
KINDS = ("training step", "network", "post-processing")


def example(height: int, width: int, batch: int):
  """Images, uint8, and N_BOXES boxes with labels on each."""
  rng = np.random.default_rng(0)
  image = rng.integers(0, 256, (batch, height, width, 3), np.uint8)
  low = rng.uniform(0, 0.6, (batch, N_BOXES, 2))
  high = low + rng.uniform(0.1, 0.4, low.shape)
  boxes = np.concatenate([low, high], -1) * np.tile([width, height], 2)
  labels = rng.integers(0, N_CLASSES, (batch, N_BOXES))
  return image, boxes.astype(np.float32), labels


def best_of(call, repeats: int) -> float:
  """Seconds of the fastest call, after one that is not counted."""
  call()
  times = []
  for _ in range(repeats):
    start = time.perf_counter()
    call()
    times.append(time.perf_counter() - start)
  return min(times)


def ours(height: int, width: int, batch: int, repeats: int):
  sys.path.insert(0, str(ROOT))
  import jax  # noqa: PLC0415  Not in the other interpreter.
  import optax  # noqa: PLC0415

  from metaformer_jax import tasks  # noqa: PLC0415
  from metaformer_jax.config import schema  # noqa: PLC0415
  from metaformer_jax.config.tasks import detection as section  # noqa: PLC0415
  from metaformer_jax.training import freeze  # noqa: PLC0415

  long, short = max(height, width), min(height, width)
  cfg = schema.Experiment(
      model=schema.Model(name="resnet50"),
      data=schema.Data(source="coco"),
      task=section.Detection(num_classes=N_CLASSES, scale=(long, short),
                             max_boxes=N_BOXES, frozen_batch_norm=True))
  _, task = tasks.create(cfg, files=False)
  image, boxes, labels = example(height, width, batch)
  size = np.full((batch, 2), (height, width), np.int32)
  found = {"image": image, "size": size, "boxes": boxes,
           "labels": labels.astype(np.int32), "original_size": size,
           "overflow": np.zeros(batch, np.int32)}
  found = jax.device_put(found)
  variables = jax.jit(task.model.init)(jax.random.key(0), *task.init_inputs())
  params = dict(variables["params"])
  head = dict(params["head"])
  kernel = head["class_out"]["kernel"]
  head["class_out"] = {
      "kernel": 0.05 * jax.random.normal(jax.random.key(1), kernel.shape),
      "bias": head["class_out"]["bias"] * 0 - 2.5}
  params["head"] = head
  state = {k: v for k, v in variables.items() if k != "params"}
  frozen = freeze.find(("backbone/stem/*", "backbone/stage1/*"), params,
                       task.pretrained)
  trained, fixed = frozen.split(params)
  tx = optax.sgd(1e-6, momentum=0.9)

  def loss(trained):
    with frozen.in_evaluation_mode():
      return task.loss({"params": freeze.merge(trained, fixed), **state}, found,
                       {}, train=True)[0]

  @jax.jit
  def step(trained, opt_state):
    grads = jax.grad(loss)(trained)
    updates, opt_state = tx.update(grads, opt_state, trained)
    return optax.apply_updates(trained, updates), opt_state

  variables = {"params": params, **state}
  network = jax.jit(task.detector.outputs)
  detect = jax.jit(task.detector.detections)
  outputs = network(variables, found)
  opt_state = tx.init(trained)
  return {
      "training step": best_of(lambda: jax.block_until_ready(
          step(trained, opt_state)), repeats),
      "network": best_of(lambda: jax.block_until_ready(
          network(variables, found)), repeats),
      "post-processing": best_of(lambda: jax.block_until_ready(
          detect(outputs, found)), repeats),
      "detections": int(detect(outputs, found)["valid"].sum())}


def theirs(height: int, width: int, batch: int, repeats: int):
  import torch  # noqa: PLC0415
  from torchvision.models import detection  # noqa: PLC0415

  torch.manual_seed(0)
  torch.set_num_threads(len(os.sched_getaffinity(0)))
  model = detection.retinanet_resnet50_fpn(
      weights=None, weights_backbone=None, num_classes=N_CLASSES,
      min_size=min(height, width), max_size=max(height, width),
      trainable_backbone_layers=3, detections_per_img=100)
  logits = model.head.classification_head.cls_logits
  torch.nn.init.normal_(logits.weight, std=0.05)
  torch.nn.init.constant_(logits.bias, -2.5)
  image, boxes, labels = example(height, width, batch)
  images = list(torch.tensor(image).permute(0, 3, 1, 2).float() / 255)
  targets = [{"boxes": torch.tensor(b), "labels": torch.tensor(c)}
             for b, c in zip(boxes, labels)]
  trained = [p for p in model.parameters() if p.requires_grad]
  tx = torch.optim.SGD(trained, lr=1e-6, momentum=0.9)

  def step():
    model.train()
    for module in model.modules():
      if isinstance(module, torch.nn.BatchNorm2d):
        module.eval()
    losses = model(images, targets)
    tx.zero_grad()
    sum(losses.values()).backward()
    tx.step()

  spent, n_found = [], []
  original = model.postprocess_detections

  def timed(*args):
    start = time.perf_counter()
    found = original(*args)
    spent.append(time.perf_counter() - start)
    n_found.append(sum(len(f["scores"]) for f in found))
    return found

  def whole():
    with torch.no_grad():
      model(images)

  model.postprocess_detections = timed
  training = best_of(step, repeats)
  model.eval()
  seconds = best_of(whole, repeats)
  return {"training step": training, "network": seconds - min(spent),
          "post-processing": min(spent), "detections": n_found[-1]}


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--torch-python", help="an interpreter with torchvision")
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--repeats", type=int, default=3)
  parser.add_argument("--size", type=int, nargs=2, default=(320, 448),
                      help="height and width, multiples of 32")
  parser.add_argument("--batch", type=int, default=1)
  parser.add_argument("--measure", choices=("ours", "theirs"),
                      help="measure once, in this process, and print JSON")
  args = parser.parse_args()
  if args.measure:
    measure = {"ours": ours, "theirs": theirs}[args.measure]
    print(json.dumps(measure(*args.size, args.batch, args.repeats)))
    return

  def run(which):
    python = {"ours": sys.executable, "theirs": args.torch_python}[which]
    done = subprocess.run(
        [python, __file__, "--measure", which, "--repeats", str(args.repeats),
         "--size", *map(str, args.size), "--batch", str(args.batch)],
        capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])

  rounds = []
  for i in range(args.rounds):
    order = ("ours", "theirs") if i % 2 else ("theirs", "ours")
    found = {which: run(which) for which in order}
    print(json.dumps(found), flush=True)
    rounds.append(found)
  for kind in KINDS:
    one, other = (statistics.median(r[which][kind] for r in rounds)
                  for which in ("ours", "theirs"))
    ratios = [r["theirs"][kind] / r["ours"][kind] for r in rounds]
    print(f"{kind}: {one:.3f} s, torchvision {other:.3f} s; times as fast: "
          f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to "
          f"{max(ratios):.2f})")


if __name__ == "__main__":
  main()
