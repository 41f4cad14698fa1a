"""Where a job can run: one file, one place."""
