"""Commands that are printed instead of run."""

import shlex

import cloud
import commands


class DryRun(commands.Gcloud):
  """Prints the commands, one per line, and answers as if they succeeded."""

  def __init__(self, where: cloud.Slice, active: bool, run: str = "none"):
    """
    Args:
      where: the slice.
      active: whether it exists already.
      run: id of the run that will be started on it.
    """
    super().__init__()
    self._where, self._active, self._run = where, active, run
    self._started = False

  def __call__(self, args, timeout=300):
    print(shlex.join(args))
    self._active |= "create" in args
    self._started |= "bash worker.sh start" in args[-1]
    if "describe" in args and not self._active:
      raise commands.CloudError("absent", "the slice does not exist yet")
    if "storage" in args:
      raise commands.CloudError("absent", "there are no checkpoints yet")
    if args[-1].endswith(cloud.STATE):
      found = f"{self._run} 0" if self._started else "none none"
      return f"worker 0 {found}\n"
    return self._where.answer(args)

  def each(self, asked, timeout=300):
    return [self(args, timeout) for args in asked]

  def show(self, args):
    print(shlex.join(args))
    return 0
