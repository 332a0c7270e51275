"""A user's benchmark: subjects, workloads, rows, tables."""
