"""The process around a run: devices, processes, signals, files, reports."""
