"""What a run needs before it is paid for: memory by strategy, arithmetic, time."""
