"""Keeps one run going until it is done, even if its slice is taken away.

Each decision depends only on what the cloud says now and on what this
supervisor has seen before. Nothing is stored: if it is killed, the same command
continues its work, and the counts and times of its limits start from zero.
"""

import collections
import pathlib
import random
import time
from collections.abc import Callable, Collection

import cloud
import commands
import dry_run
import progress

# Exit codes of a run (docs/design.md, "Process contract").
DONE, MISCONFIGURED, DIVERGED = 0, 2, 3
_MEANING = {DONE: "done", MISCONFIGURED: "a configuration error",
            DIVERGED: "diverged"}

# Seconds that a run may take to save when it is stopped.
STOP_SECONDS = 300

# The slice is considered dead after this many polls without an answer.
_SILENT_POLLS = 10
# Characters of the log that are shown at the end.
_MAX_LOG = 8000
# After the first host's process has ended, the others are polled this often.
_LAST_POLLS = 5

# Errors in a row, by their kind, after which the supervisor ends. Others are
# tried again without limit: the pauses grow to an hour, and a run continues
# without its supervisor.
_TRIES = {"refused": 1, "auth": 8, "unknown": 20}


def verdict(codes: Collection[int]) -> int | None:
  """The exit code of a run that is over; None if it must be restarted.

  Args:
    codes: of the run's processes, one per host. When one process ends, jax
      aborts the others (134), so a single 2 or 3 outweighs them.
  """
  for code in (DIVERGED, MISCONFIGURED):
    if code in codes:
      return code
  return DONE if codes and set(codes) == {DONE} else None


def cause(codes: Collection[int]) -> int:
  """The most informative exit code of a run that failed."""
  followers = (DONE, 134, 137, 143)
  return next((c for c in codes if c not in followers),
              next((c for c in codes if c != DONE), 1))


class Supervisor:
  """Creates the slice and starts the run, again and again if necessary."""

  def __init__(self, gcloud: commands.Gcloud, where: cloud.Slice,
               run: cloud.Run, source: pathlib.Path, ref: str, *,
               poll_seconds: float, max_restarts: int, max_refusals: int,
               hang_seconds: float, start_seconds: float, keep: bool,
               sleep: Callable[[float], None] = time.sleep,
               clock: Callable[[], float] = time.monotonic):
    """
    Args:
      gcloud: runs the commands.
      where: the slice.
      run: the run to keep going.
      source, ref: a git checkout, and its commit to run.
      poll_seconds: between two polls; also the shortest pause after a failure.
      max_restarts: of the run, in a row and without a new checkpoint.
      max_refusals: of requests for the slice, in a row: no quota, or FAILED.
        If the zone has no free chips, their number is not limited.
      hang_seconds, start_seconds: that a run may take to its next checkpoint,
        and to its first one after a start; 0: any number.
      keep: whether to keep the slice when the run is over.
      sleep, clock: replaced by tests.
    """
    self._gcloud, self._slice, self._run = gcloud, where, run
    self._source, self._ref = source, ref
    self._poll_seconds, self._keep, self._sleep = poll_seconds, keep, sleep
    self._max_restarts, self._max_refusals = max_restarts, max_refusals
    self._progress = progress.Progress(hang_seconds, start_seconds, clock)
    self._errors = collections.Counter()
    self._fruitless = self._denied = self._refusals = self._silent = 0
    self._seen = self._deleted = self._start_again = False
    self._step, self._told = 0, ""

  def supervise(self) -> int:
    """Returns the run's exit code; 1 or 2 also if the cloud refuses."""
    step = self._latest_step()
    self._step = step or 0
    self._progress.begin(step)
    while True:
      try:
        code = self._advance()
        self._errors.clear()
      except commands.CloudError as e:
        code = self._trouble(e)
      if code is not None:
        return code

  def _trouble(self, error: commands.CloudError) -> int | None:
    """Waits after an error; an exit code if there were too many of its kind."""
    self._errors[error.kind] += 1
    tries = _TRIES.get(error.kind)
    if tries is None or self._errors[error.kind] < tries:
      cloud.say(f"{error}; trying again")
      self._back_off(self._errors.total())
      return None
    often = f" ({tries} times in a row)" if tries > 1 else ""
    cloud.say(f"{error}{often}; nothing was deleted, and a run continues if "
              "there is one: fix this and run the same command again")
    return 1 if error.kind == "unknown" else MISCONFIGURED

  def _advance(self) -> int | None:
    """Polls once and acts on the result; returns an exit code at the end."""
    state = self._slice.state(self._gcloud)
    if state.phase == "absent":
      if self._seen and not self._deleted:
        cloud.say(f"{self._slice.name} was deleted by someone else and is not "
                  "created again; to do so, run the same command again")
        return 1
      return self._create()
    self._seen = True
    if str(state) != self._told:
      cloud.say(f"{self._slice.name} is {state}")
      self._told = str(state)
    if state.phase == "active":
      self._denied = self._refusals = 0
      return self._watch()
    if state.final:
      cloud.say("fix the command; the request remains until it is removed by "
                "the sub-command delete")
      return MISCONFIGURED
    if state.phase in ("lost", "failed"):
      self._delete()
      return self._deny(state.error) if state.error else None
    self._sleep(self._poll_seconds)
    return None

  def _create(self) -> int | None:
    cloud.say(f"creating {self._slice.name}")
    try:
      self._slice.create(self._gcloud)
    except commands.CloudError as e:
      if e.kind in ("capacity", "quota"):
        return self._deny(e)
      if e.kind == "absent":  # The zone, or something else that flags name.
        raise commands.CloudError("refused", str(e)) from e
      if e.kind != "exists":
        raise
    self._seen, self._deleted = True, False
    self._start_again = False
    return None

  def _deny(self, error: commands.CloudError) -> int | None:
    """Waits before the next request, unless too many were refused."""
    self._denied += 1
    self._refusals += error.kind != "capacity"
    if self._refusals > self._max_refusals:
      cloud.say(f"{error}; refused {self._refusals} times in a row: request "
                "more quota, or choose another zone or accelerator")
      return 1
    cloud.say(f"{error}; trying again later")
    self._back_off(self._denied, 10)
    return None

  def _delete(self) -> None:
    self._deleted = True
    try:
      self._slice.delete(self._gcloud)
    except commands.CloudError as e:
      if e.kind != "absent":
        raise

  def _watch(self) -> int | None:
    """On an active slice: starts the run, or checks its state."""
    # If any process of the run ends, jax also ends the first host's.
    found = self._slice.workers(self._gcloud, "0")
    if not found:
      return self._hear_nothing()
    self._silent = 0
    first = found[0]
    if first.status == "running" and first.run != self._run.id:
      cloud.say(f"{self._slice.name} is used by another run ({first.run}, not "
                f"{self._run.id}): give another --name, or replace that run "
                "with the sub-command restart")
      return MISCONFIGURED
    if first.run != self._run.id or self._start_again:
      return self._launch(stuck=first.status == "running")
    if first.status == "running":
      return self._wait_for_checkpoint()
    codes, lost = self._exit_codes()
    cloud.say(f"{self._slice.name}: exit codes {codes}" + (
        f", {lost} hosts do not answer" if lost else ""))
    over = verdict(codes)
    # It is done only if every host says so.
    if over is not None and not (over == DONE and lost):
      return self._finish(over)
    return self._failed(codes, recreate=bool(lost))

  def _wait_for_checkpoint(self) -> int | None:
    """On a running run: restarts it if it hangs."""
    if self._progress.due():
      step, limit = self._latest_step(), self._progress.limit
      if self._progress.hangs(step):
        cloud.say(f"{self._slice.name}: no checkpoint after step {step} in "
                  f"{limit:g} seconds: the run hangs")
        # If restarting it did not help, its machines may be the cause.
        again = self._fruitless > 0 and step <= self._step
        return self._failed([], recreate=again)
    self._sleep(self._poll_seconds)
    return None

  def _hear_nothing(self) -> int | None:
    self._silent += 1
    if self._silent < _SILENT_POLLS:
      cloud.say(f"{self._slice.name}: the first host does not answer")
      self._sleep(self._poll_seconds)
      return None
    self._silent = 0
    return self._failed([], recreate=True)

  def _launch(self, stuck: bool) -> int | None:
    """Starts the run; if it runs already and cannot be stopped, elsewhere."""
    cloud.say(f"starting run {self._run.id} on {self._slice.name} from "
              f"step {self._step}")
    try:
      launch(self._gcloud, self._slice, self._run, self._source, self._ref)
    except commands.CloudError as e:
      if e.kind in ("refused", "auth"):
        raise
      cloud.say(str(e))
      return self._failed([], recreate=stuck or self._exit_codes()[1] > 0)
    self._start_again = False
    # Stopping the run before may have saved a step.
    self._progress.begin(self._latest_step())
    self._sleep(self._poll_seconds)
    return None

  def _exit_codes(self) -> tuple[list[int], int]:
    """The processes' exit codes, and the number of hosts that do not answer."""
    _, count = self._slice.hosts(self._gcloud)
    for _ in range(_LAST_POLLS):
      found = self._slice.workers(self._gcloud)
      if len(found) >= count and all(w.status != "running" for w in found):
        break
      self._sleep(self._poll_seconds)
    codes = [int(w.status) for w in found if w.status.isdecimal()]
    return codes, max(0, count - len(found))

  def _failed(self, codes: list[int], recreate: bool = False) -> int | None:
    """Restarts the run, unless it failed too often without a new checkpoint."""
    step = self._latest_step() or 0
    if step > self._step:
      self._step, self._fruitless = step, 0
    self._fruitless += 1
    if self._fruitless > self._max_restarts:
      cloud.say(f"no checkpoint after step {self._step} in "
                f"{self._max_restarts + 1} attempts: giving up")
      return self._finish(cause(codes))
    self._start_again = True
    self._back_off(self._fruitless)
    if recreate:
      self._delete()
    return None

  def _finish(self, code: int) -> int:
    """Reports why the run is over, and deletes the slice, which is billed."""
    meaning = _MEANING.get(code, "see docs/tpu/runs.md")
    cloud.say(f"the run is over: exit code {code}, {meaning}")
    if code != DONE:
      try:
        log = self._slice.script(self._gcloud, "log", "20", worker="0")
        cloud.say(log[-_MAX_LOG:])
      except commands.CloudError as e:
        cloud.say(f"its output cannot be shown: {e}")
    if not self._keep:
      for attempt in range(1, 6):
        try:
          self._delete()
          cloud.say(f"{self._slice.name} is deleted; the output is in "
                    f"{self._run.workdir}/logs")
          return code
        except commands.CloudError as e:
          cloud.say(str(e))
          self._back_off(attempt)
    cloud.say(f"{self._slice.name} still exists and is billed; to delete it: "
              + self._slice.removal)
    return code

  def _latest_step(self) -> int | None:
    """The newest checkpoint's step, 0 if none; None if it cannot be seen."""
    try:
      return cloud.newest_step(self._gcloud, self._run)
    except commands.CloudError as e:
      cloud.say(f"the checkpoints cannot be listed: {e}")
      return None

  def _back_off(self, times: int, factor: float = 1) -> None:
    """Waits: twice as long each time, at most an hour, with jitter."""
    seconds = factor * self._poll_seconds * 2 ** (min(times, 20) - 1)
    self._sleep(min(seconds, 3600) * random.uniform(0.5, 1))


def launch(gcloud: commands.Gcloud, where: cloud.Slice, run: cloud.Run,
           source: pathlib.Path, ref: str) -> None:
  """Copies a commit to every host, stops any other run and starts this one."""
  archive = pathlib.Path("build") / where.name / "metaformer_jax.tar.gz"
  if not isinstance(gcloud, dry_run.DryRun):
    (source / archive).parent.mkdir(parents=True, exist_ok=True)
  gcloud(["git", "-C", str(source), "archive", "--format=tar.gz",
          f"--output={archive}", ref])
  worker = pathlib.Path(__file__).with_name("worker.sh")
  where.copy(gcloud, str(worker), str(source / archive))
  stop(gcloud, where)
  where.script(gcloud, "install", archive.name, timeout=1800)
  where.start(gcloud, run)


def stop(gcloud: commands.Gcloud, where: cloud.Slice) -> None:
  """Stops a run, if there is one; it saves first."""
  where.script(gcloud, "stop", str(STOP_SECONDS), timeout=STOP_SECONDS + 120)


def describe(gcloud: commands.Gcloud, where: cloud.Slice) -> str:
  """The state of a slice, its hosts and its run, one per line."""
  state = where.state(gcloud)
  lines = [f"slice {where.name} {state}"]
  if state.phase == "active":
    kind, count = where.hosts(gcloud)
    lines.append(f"node {kind}, hosts {count}")
    found = sorted(where.workers(gcloud),
                   key=lambda w: (len(w.index), w.index))
    lines += [f"worker {w.index} run {w.run} {w.status}" for w in found]
    if len(found) < count:
      lines.append(f"{count - len(found)} hosts do not answer")
  return "\n".join(lines)
