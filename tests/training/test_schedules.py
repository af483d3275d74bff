"""Learning rates: those of timm at every epoch; steps and epochs by hand."""

import dataclasses
import math
import pathlib

import jax
import numpy as np
import optim_cases
import pytest
import shipped

from metaformer_jax.config import schema
from metaformer_jax.training import evaluate, optim, schedules, step

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "schedules.npz"


def experiment_of(batch_size=1024, epochs=300.0, steps=None, **options):
  return schema.Experiment(
      optim=schema.Optim(**options),
      train=schema.Train(batch_size=batch_size, epochs=epochs, steps=steps))


def experiment_as(args) -> schema.Experiment:
  """What timm's arguments are here; the recipes' batch is 4096."""
  sched = args["sched"]
  options = {"base_lr": args["lr"] / 4, "schedule_per": "epoch",
             "schedule": "constant" if sched == "None" else sched,
             **{k: float(args[k]) for k in ("min_lr", "warmup_lr",
                                            "warmup_epochs",
                                            "cooldown_epochs")}}
  if sched in ("None", "step"):  # timm adds the others' cool-down only.
    options["cooldown_epochs"] = 0.0
  if sched == "None":
    options["warmup_epochs"] = 0.0
  elif sched == "poly":
    options["poly_power"] = args["decay_rate"]
  elif sched == "step":
    options["step_factor"] = args["decay_rate"]
    options["step_epochs"] = tuple(
        float(e) for e in range(args["decay_epochs"], args["epochs"],
                                args["decay_epochs"]))
  return experiment_of(4096, float(args["epochs"]), **options)


@pytest.mark.parametrize("n_examples", [1281167, 4096 * 7, 3000])
@pytest.mark.parametrize("name", optim_cases.SCHEDULES)
def test_is_timms_at_every_epoch(name, n_examples):
  with np.load(GOLDEN) as arrays:
    want = arrays[name]
  cfg = experiment_as(optim_cases.SCHEDULES[name])
  n_steps, per_epoch = step.total_steps(cfg, n_examples), n_examples / 4096
  # The run's length is rounded to steps: up to one of an epoch more or less.
  rates, starts = schedules.table(cfg.optim, cfg.optim.base_lr * 4,
                                  cfg.train.epochs, n_steps, per_epoch)
  n = min(len(rates), len(want))
  assert abs(len(rates) - len(want)) <= 1
  np.testing.assert_allclose(rates[:n], want[:n], rtol=1e-12)
  # An epoch begins with the first step of which all examples are its own.
  assert starts.tolist() == [-(-k * n_examples // 4096)
                             for k in range(len(rates))]
  _, schedule = optim.create(cfg, n_steps, per_epoch)
  epochs = np.arange(n_steps) * 4096 // n_examples
  epochs = epochs[epochs < n]
  found = jax.jit(jax.vmap(schedule))(np.arange(len(epochs)))
  np.testing.assert_allclose(found, want[epochs], atol=1e-9, rtol=0)


def test_every_config_of_epochs_is_compared_with_timm():
  def curve(cfg):
    optim = cfg.optim
    return (optim.schedule, cfg.train.epochs, *(
        round(x, 12) for x in (
            optim.base_lr * cfg.train.batch_size, optim.min_lr, optim.warmup_lr,
            optim.warmup_epochs, optim.cooldown_epochs)))

  known = {curve(experiment_as(args)) for args in
           optim_cases.SCHEDULES.values()}
  n = 0
  for argument in shipped.CONFIGS:
    config = shipped.load(argument)
    if config.optim.schedule_per == "epoch":
      n += 1
      assert curve(config) in known, (
          f"{argument}: add its schedule to optim_cases.SCHEDULES, and run "
          "golden/make_optim.py")
  assert n > 5


def test_steps_are_linear_then_cosine_then_cool():
  cfg = experiment_of(4096, 30.0, base_lr=1e-3, warmup_epochs=2.0,
                      cooldown_epochs=1.0)
  n_steps = step.total_steps(cfg, 40960)
  assert n_steps == 310
  _, schedule = optim.create(cfg, n_steps, 10)
  for t in (0, 1, 7, 19):
    want = 1e-6 + t * (4e-3 - 1e-6) / 20
    np.testing.assert_allclose(schedule(t), want, rtol=1e-5)
  for t in (20, 21, 150, 299, 300, 305, 310, 10**6):
    want = 1e-5 + (4e-3 - 1e-5) * 0.5 * (
        1 + math.cos(math.pi * min(t, 300) / 300))
    np.testing.assert_allclose(schedule(t), want, rtol=1e-5)


@pytest.mark.parametrize("options,want", [
    ({"schedule": "constant"}, lambda t: 1.0),
    ({"schedule": "poly", "poly_power": 0.9, "min_lr": 0.1},
     lambda t: 0.1 + 0.9 * (1 - t / 40) ** 0.9),
    # Detection's: at epochs 2.5 and 3, of 10 steps each.
    ({"schedule": "step", "step_epochs": (2.5, 3.0)},
     lambda t: 0.1 ** ((t >= 25) + (t >= 30)))],
    ids=["constant", "poly", "step"])
def test_curves_by_step(options, want):
  cfg = experiment_of(steps=40, base_lr=1.0, warmup_lr=0.5, warmup_epochs=0.4,
                      cooldown_epochs=7.0, **options)
  assert step.total_steps(cfg, 10240) == 40
  _, schedule = optim.create(cfg, 40, 10)
  for t in range(41):
    rising = 0.5 + t * 0.5 / 4
    np.testing.assert_allclose(schedule(t), rising if t < 4 else want(t),
                               rtol=1e-5, atol=1e-7)


def test_an_epoch_longer_than_the_run_and_a_step_longer_than_an_epoch():
  for steps, per_epoch, epochs in ((3, 10, (0, 0, 0)), (3, 0.5, (0, 2, 4))):
    cfg = experiment_of(steps=steps, base_lr=1.0, schedule_per="epoch",
                        warmup_epochs=100.0, warmup_lr=0.0)
    _, schedule = optim.create(cfg, steps, per_epoch)
    np.testing.assert_allclose([schedule(t) for t in range(steps)],
                               np.array(epochs) / 100, rtol=1e-6)


def test_the_rate_scales_with_the_batch():
  for batch_size in (32, 4096):
    cfg = experiment_of(batch_size, base_lr=1e-3, min_lr=0.0,
                        warmup_epochs=0.0)
    for per in ("epoch", "step"):
      _, schedule = optim.create(
          dataclasses.replace(cfg, optim=dataclasses.replace(
              cfg.optim, schedule_per=per)), 100, 10)
      np.testing.assert_allclose(schedule(0), 1e-3 * batch_size / 1024,
                                 rtol=1e-6)


def test_evaluations_are_regular_and_the_last_step_has_one():
  """Never closer than half an interval; and their number is as expected."""
  rng = np.random.default_rng(0)
  cases = [(586, 117), (585, 117), (1, 1), (1, 100), (7, 1), (100, 7)]
  cases += [(int(n), int(every)) for n, every in zip(
      rng.integers(1, 3000, 200), rng.integers(1, 400, 200))]
  for n_steps, every in cases:
    due = [i for i in range(1, n_steps + 1)
           if evaluate.is_due(i, n_steps, every)]
    assert due[-1] == n_steps, (n_steps, every)
    gaps = np.diff(due)
    assert (gaps[:-1] == every).all(), (n_steps, every, due)
    assert (gaps[-1:] >= every / 2).all(), (n_steps, every, due)
    assert (gaps[-1:] < 1.5 * every).all(), (n_steps, every, due)
    # To the nearest whole number, of which two are as near from a half.
    assert abs(len(due) - max(1, n_steps / every)) <= 0.5, (n_steps, every)
  # The quickstart: no evaluation at 585.
  assert [i for i in range(1, 587) if evaluate.is_due(i, 586, 117)] == [
      117, 234, 351, 468, 586]
