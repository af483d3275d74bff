"""Published training recipes: one file a task."""
