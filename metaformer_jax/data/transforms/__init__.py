"""From a record to the arrays of a batch: one file per task."""
