"""Processes of a run as threads of this one, with a store like jax's."""

import collections
import itertools
import threading
import types

import jax

from metaformer_jax.runtime import processes


class Store:
  """The methods of the coordination service's client that are used."""

  def __init__(self):
    self._values, self._changed = {}, threading.Condition()

  def key_value_set(self, key, value):
    with self._changed:
      assert key not in self._values
      self._values[key] = value
      self._changed.notify_all()

  def blocking_key_value_get(self, key, timeout_in_ms):
    with self._changed:
      if not self._changed.wait_for(lambda: key in self._values,
                                    min(timeout_in_ms / 1000, 0.05)):
        raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: " + key)
      return self._values[key]


class _Process(threading.local):
  """What each process has of its own; its messages are counted by topic."""

  client, process_id, num_processes = None, 0, 1

  def __init__(self):  # Called in each thread.
    self._counters = collections.defaultdict(itertools.count)

  def __getitem__(self, topic):
    return self._counters[topic]


def run(monkeypatch, n, act):
  """`act(index)` on each of n processes: what they return, or raise."""
  here, store, results = _Process(), Store(), [None] * n
  monkeypatch.setattr(processes, "distributed",
                      types.SimpleNamespace(global_state=here))
  monkeypatch.setattr(processes, "_counters", here)

  def start(i):
    here.client, here.process_id, here.num_processes = store, i, n
    try:
      results[i] = act(i)
    except Exception as e:
      results[i] = e

  threads = [threading.Thread(target=start, args=(i,)) for i in range(n)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(30)
    assert not thread.is_alive()
  return results
