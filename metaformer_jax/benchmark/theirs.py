"""timm's model as a program to measure; run by an interpreter that has timm.

    PYTHON metaformer_jax/benchmark/theirs.py

It speaks the protocol of `serving`. The first line has "model", "mode",
"form", "platform", "batch_size", "image_size", "dtype", "num_classes",
"drop_path_rate", "model_args", "label_smoothing", "optim" (AdamW's arguments)
and "threads".

The forms are what users of timm choose from: "eager", with images channels
first; "channels_last", a memory format; and "compile", torch.compile of that.
bfloat16 is by autocast, with float32 parameters. A training step is the forward
pass, the cross-entropy of soft targets, the backward pass and AdamW, fused
where PyTorch has it; images and targets stay on the device. There is no mixing,
erasing, or check of finite values.
"""

import contextlib
import time

import serving  # Beside this file, as the interpreter lacks the package.


class Program:
  """A training step, or inference, of timm's model of a name."""

  def __init__(self, spec):
    import timm  # noqa: PLC0415  This package does without it.
    import torch  # noqa: PLC0415

    if spec["platform"] not in ("cpu", "gpu"):
      raise RuntimeError(f"is for CPUs and GPUs, not a {spec['platform']}")
    if spec["platform"] == "gpu" and not torch.cuda.is_available():
      raise RuntimeError("its PyTorch finds no GPU")
    if not timm.is_model(spec["model"]):
      raise RuntimeError(f"timm {timm.__version__} has no {spec['model']}")
    self._torch = torch
    self._device = "cuda" if spec["platform"] == "gpu" else "cpu"
    torch.manual_seed(0)
    if self._device == "cpu":
      torch.set_num_threads(spec["threads"])
    # As jax on a GPU: products of float32 are computed in TF32.
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    self._train = spec["mode"] == "train"
    self._autocast = contextlib.nullcontext
    if spec["dtype"] == "bfloat16":
      self._autocast = lambda: torch.autocast(self._device, torch.bfloat16)
    self._create(timm, spec)
    start = time.perf_counter()
    for _ in range(2):  # cuDNN chooses, and torch.compile compiles.
      self.call()
      self.wait()
    seconds = time.perf_counter() - start
    self._reset()
    self.facts = {
        "compile_seconds": seconds, "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "timm": timm.__version__}}

  def _create(self, timm, spec):
    torch = self._torch
    size = spec["image_size"]
    arguments = {"num_classes": spec["num_classes"],
                 "drop_path_rate": spec["drop_path_rate"],
                 **spec["model_args"]}
    model = timm.create_model(spec["model"], **arguments)
    if model.default_cfg["input_size"][-1] != size and hasattr(
        model, "patch_embed"):  # Models with position embeddings.
      model = timm.create_model(spec["model"], img_size=size, **arguments)
    model = model.to(self._device).train(self._train)
    x = torch.randn(spec["batch_size"], 3, size, size, device=self._device)
    if spec["form"] != "eager":
      model = model.to(memory_format=torch.channels_last)
      x = x.contiguous(memory_format=torch.channels_last)
    if self._train:
      from timm import optim as timm_optim  # noqa: PLC0415

      optim = dict(spec["optim"])
      groups = timm_optim.param_groups_weight_decay(
          model, optim.pop("weight_decay"))
      try:
        self._optimizer = torch.optim.AdamW(groups, fused=True, **optim)
      except (RuntimeError, TypeError):  # Of older versions, on a CPU.
        self._optimizer = torch.optim.AdamW(groups, **optim)
      smoothing, n = spec["label_smoothing"], spec["num_classes"]
      labels = torch.randint(n, (spec["batch_size"],), device=self._device)
      self._targets = smoothing / n + (1 - smoothing) * (
          torch.nn.functional.one_hot(labels, n).float())
    self._model = torch.compile(model) if spec["form"] == "compile" else model
    self._images = x

  def call(self):
    if self._train:
      self._optimizer.zero_grad(set_to_none=True)
      with self._autocast():
        logits = self._model(self._images)
        loss = self._torch.nn.functional.cross_entropy(logits, self._targets)
      loss.backward()
      self._optimizer.step()
    else:
      with self._torch.no_grad(), self._autocast():
        self._model(self._images)

  def wait(self):
    if self._device == "cuda":
      self._torch.cuda.synchronize()

  def _reset(self):
    if self._device == "cuda":
      self._torch.cuda.reset_peak_memory_stats()
    else:
      serving.reset_peak_memory()

  def memory(self):
    if self._device == "cuda":
      return {"memory": self._torch.cuda.max_memory_allocated(),
              "memory_of": "device"}
    return {"memory": serving.peak_memory(), "memory_of": "process"}

  def rest(self):
    """Leaves the device's memory to the other processes."""
    if self._device == "cuda":
      self._torch.cuda.empty_cache()


if __name__ == "__main__":
  serving.serve(Program)
