"""A measuring process: it times one program whenever it is asked to.

Ours (`ours`) and timm's (`theirs`) both run this code, so that both are timed
in the same way. It needs nothing but Python's own library, 3.9 or later: timm's
interpreter has neither jax nor this package.

The protocol, a JSON object on each line: the first line of stdin says what to
prepare. The answer is {"ready": facts}, or {"error": text, "type": its class},
after which the process ends. From then on {"round": seconds} is answered as
`measure` returns it, and {"trace": folder} as the program's `trace`. The
process ends when stdin does, also in the middle of a compilation.
"""

import json
import os
import queue
import signal
import sys
import threading
import time
import traceback

# Calls of a round: at least, so that it has a median; and at most.
_LEAST, _MOST = 3, 1000


def measure(program, seconds):
  """One round of a program's calls.

  Half of it is the speed, with calls that follow each other without waiting;
  half the latency, with a wait after each call.

  Args:
    program: has `call()`, which starts one step or prediction, and `wait()`,
      which returns when all that was started is done.
    seconds: about how long the round takes.

  Returns:
    {"calls": n, "seconds": of n calls in a row, "latencies": n times seconds}.
  """
  _time(program)  # Memory that was given back is taken again.
  n = round(seconds / 2 / max(_time(program), 1e-9))
  n = min(max(n, _LEAST), _MOST)
  start = time.perf_counter()
  for _ in range(n):
    program.call()
  program.wait()
  whole = time.perf_counter() - start
  return {"calls": n, "seconds": whole,
          "latencies": [_time(program) for _ in range(n)]}


def _time(program):
  start = time.perf_counter()
  program.call()
  program.wait()
  return time.perf_counter() - start


def serve(prepare):
  """Runs the protocol on stdin and stdout.

  Args:
    prepare: called with the first line; returns a program. Besides what
      `measure` needs it has `facts`, a dict; `memory()`, the facts of its
      memory so far; `rest()`, called after each round; and `trace(folder)`, if
      it can be asked for.
  """
  answers = os.fdopen(os.dup(1), "w")
  os.dup2(2, 1)  # What libraries print is no answer.
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # The parent decides.
  requests = queue.SimpleQueue()
  threading.Thread(target=_read, args=(requests,), daemon=True).start()
  try:
    program = prepare(requests.get())
    _answer(answers, {"ready": program.facts})
    while True:
      request = requests.get()
      if "trace" in request:
        _answer(answers, program.trace(request["trace"]))
      else:
        found = measure(program, request["round"])
        _answer(answers, {**found, **program.memory()})
        program.rest()
  except Exception as e:  # Of any library; the parent says it.
    if not hasattr(e, "exit_code"):  # Those of this package are one line.
      traceback.print_exc()
    _answer(answers, {"error": " ".join(str(e).split()) or repr(e),
                      "type": type(e).__name__})
    os._exit(1)  # Threads of a compiler may still run.


def _read(requests):
  for line in sys.stdin:
    requests.put(json.loads(line))
  os._exit(0)


def _answer(answers, found):
  answers.write(json.dumps(found) + "\n")
  answers.flush()


def reset_peak_memory():
  """Forgets the peak of this process's memory so far, where Linux allows it."""
  try:
    with open("/proc/self/clear_refs", "w") as file:
      file.write("5")
  except OSError:
    pass  # `peak_memory` is then that of the whole process, compiler included.


def peak_memory():
  """The most memory that this process had at once, in bytes."""
  with open("/proc/self/status") as file:
    for line in file:
      if line.startswith("VmHWM:"):
        return 1024 * int(line.split()[1])
  return 0
