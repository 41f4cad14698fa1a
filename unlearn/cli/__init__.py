"""The command line: one front door, above everything else. Each command imports what it needs when it is called."""
