"""Runs that make no checkpoints, against a cloud in memory."""

import random
import re

import clouds
import pytest

HOUR = 3600.0
LIMIT, START = 2 * HOUR, 4 * HOUR


def supervise(launcher, world, folder, **options):
  """The supervisor's exit code on a world."""
  mig = isinstance(world, clouds.MigWorld)
  args, rest = launcher.parse([
      "supervise", "--name=s24", "--zone=us-east5-a", "--project=p",
      f"--accelerator={'v6e-8' if mig else 'v5litepod-16'}", "--",
      "--config=c.py", "--workdir=gs://bucket/s24"])
  given = {"poll_seconds": 60, "max_restarts": 2, "max_refusals": 2,
           "hang_seconds": LIMIT, "start_seconds": START, "keep": False}
  return launcher.supervisor.Supervisor(
      launcher.commands.Gcloud(world.execute), launcher.make_slice(args),
      launcher.cloud.Run.of(rest), folder, "HEAD", sleep=world.sleep,
      clock=world.clock, **given | options).supervise()


def steady(every=600.0, end=5 * HOUR, first=600.0):
  """A run that saves at a steady pace and is done after `end` seconds."""
  def behave(start, seconds):
    del start
    saved = max(0, 1 + int((seconds - first) // every))
    return 100 * saved, 0 if seconds > end else None
  return behave


def made(world):
  return sum(time is not None for time in world.creations)


@pytest.mark.parametrize("kind", [clouds.World, clouds.MigWorld])
def test_a_run_that_hangs_is_restarted_and_goes_on(
    kind, launcher, tmp_path, capsys):
  def behave(start, seconds):
    if start == 0:
      return 100 * int(min(seconds, 1200) // 600), None
    return 200 + 100 * int(seconds // 600), 0 if seconds > 2 * HOUR else None

  world = kind(behave)
  assert supervise(launcher, world, tmp_path) == 0
  first, second = world.starts
  # After the checkpoint at 1200 s, and noticed an eighth of the limit later.
  assert LIMIT + 1200 < second - first < LIMIT * 9 / 8 + 1200 + 600
  assert made(world) == 1
  assert re.search(r"^s24: no checkpoint after step 200 in 7200 seconds: the "
                   "run hangs$", capsys.readouterr().err, re.MULTILINE)


@pytest.mark.parametrize("behave, options", [
    (steady(), {}),
    # Compilation and a long first epoch: the longer limit.
    (steady(first=3.9 * HOUR, end=6 * HOUR), {}),
    (steady(every=1.9 * HOUR, end=12 * HOUR), {}),
    (steady(every=9e9, end=40 * HOUR), {"hang_seconds": 0}),
    (steady(first=30 * HOUR, end=40 * HOUR), {"start_seconds": 0}),
])
def test_a_run_within_its_limits_is_left_alone(behave, options, launcher,
                                               tmp_path):
  world = clouds.World(behave)
  assert supervise(launcher, world, tmp_path, **options) == 0
  assert len(world.starts) == 1 and made(world) == 1


def test_a_step_saved_at_the_stop_does_not_shorten_the_next_start(
    launcher, tmp_path):
  def behave(start, seconds):
    if start == 0:  # Hangs; the listing after its stop shows another step.
      return int(seconds > START * 9 / 8), None
    return 1 + (seconds > 3.8 * HOUR), 0 if seconds > 3.9 * HOUR else None

  world = clouds.World(behave)
  assert supervise(launcher, world, tmp_path, max_restarts=3) == 0
  assert len(world.starts) == 2


@pytest.mark.parametrize("kind", [clouds.World, clouds.MigWorld])
def test_a_request_may_wait_for_days(kind, launcher, tmp_path):
  world = kind(steady(), queued=72 * HOUR)
  assert supervise(launcher, world, tmp_path) == 0
  assert len(world.starts) == 1 and made(world) == 1


@pytest.mark.parametrize("readable", [
    lambda now: False, lambda now: now > 20 * HOUR,
    lambda now: int(now / HOUR) % 5 == 4])
def test_checkpoints_that_cannot_be_listed_are_no_evidence(
    readable, launcher, tmp_path):
  world = clouds.World(steady(end=30 * HOUR), readable=readable)
  assert supervise(launcher, world, tmp_path) == 0
  assert len(world.starts) == 1


@pytest.mark.parametrize("printed", [b"", b"\xff\n", b"gs://other/x\n"])
def test_a_listing_that_is_none_is_no_evidence(printed, launcher, tmp_path):
  world = clouds.World(steady(every=9e9, end=30 * HOUR))
  answer = world.execute

  def execute(args, timeout):
    code, out, err = answer(args, timeout)
    return (0, printed, b"") if "storage" in args else (code, out, err)

  world.execute = execute
  assert supervise(launcher, world, tmp_path) == 0
  assert len(world.starts) == 1


@pytest.mark.parametrize("kind", [clouds.World, clouds.MigWorld])
def test_a_run_that_never_progresses_is_given_up(
    kind, launcher, tmp_path, capsys):
  world = kind(lambda start, seconds: (700, None))
  assert supervise(launcher, world, tmp_path) == 1
  assert len(world.starts) == 3
  assert made(world) == 2  # New machines, when a restart did not help.
  assert world.creations[-1] is None
  lines = capsys.readouterr().err.splitlines()
  assert [line for line in lines if "giving up" in line] == [
      "no checkpoint after step 700 in 3 attempts: giving up"]


def test_each_hang_after_progress_counts_from_zero(launcher, tmp_path):
  def behave(start, seconds):
    done = start == 7 and seconds > HOUR
    return 100 * start + 100 * (seconds > 600), 0 if done else None

  world = clouds.World(behave)
  assert supervise(launcher, world, tmp_path) == 0
  assert len(world.starts) == 8 and made(world) == 1


def test_a_host_that_cannot_be_stopped_is_replaced(launcher, tmp_path):
  def behave(start, seconds):
    return 100 * start, 0 if start and seconds > 99 else None

  world = clouds.World(behave)
  answer = world.execute

  def execute(args, timeout):
    if made(world) == 1 and world.starts and args[-1].endswith("stop 300"):
      return None, b"", b""
    return answer(args, timeout)

  world.execute = execute
  assert supervise(launcher, world, tmp_path, max_restarts=3) == 0
  assert made(world) == 2


@pytest.mark.parametrize("seed", range(25))
def test_only_gaps_above_the_limit_restart_a_run(seed, launcher, tmp_path):
  rng = random.Random(seed)
  gaps = [rng.uniform(60, START - 200)]
  gaps += [rng.uniform(60, LIMIT - 200) for _ in range(rng.randrange(6))]
  long = rng.random() < 0.5
  if long:  # A look, a poll and the last checkpoint's own delay.
    gaps.append(LIMIT * 5 / 4 + 200)
  times = [sum(gaps[:i + 1]) for i in range(len(gaps))]

  def behave(start, seconds):
    end = 300 if start else times[-1] + 60
    saved = sum(seconds >= time for time in times) if not start else 50
    return saved, 0 if seconds > end else None

  world = clouds.World(behave)
  assert supervise(launcher, world, tmp_path) == 0
  assert len(world.starts) == 1 + long
