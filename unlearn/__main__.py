"""`unlearn`, and `python -m unlearn`, which is how a job is started."""

import os

from unlearn import signals


def main() -> None:
    """Run the command line; exits with 0, with 2 on a user's mistake, with 130 on Ctrl-C and 143 on SIGTERM."""
    signals.listen()  # before anything that takes time to import
    try:
        from unlearn.cli.app import main as commands

        commands()
    except signals.Stopped as e:
        from unlearn.cli.console import err, say

        job = os.environ.get(signals.JOB)
        again = f"go on with: unlearn jobs resume {job}" if job else "start the same command again"
        below = "\n" if err.is_terminal else ""  # of the ^C that a terminal shows
        say(f"{below}stopped: {e.hint or again}")
        raise


if __name__ == "__main__":
    main()
