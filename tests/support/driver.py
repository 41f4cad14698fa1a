"""`unlearn` as a process of its own, which is asked to stop."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

from support.ray_nodes import until


class Driver:
    """`unlearn COMMAND ...` with its log at info. ignoring: started with SIGINT ignored, as nohup and
    CI do, and as this process may have been itself."""

    def __init__(self, folder: Path, *arguments, ignoring: bool = False, **env: str):
        self._err = folder / "err"
        command = [sys.executable, "-m", "unlearn", *map(str, arguments)]
        with open(self._err, "w") as err:
            self.process = subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=err, start_new_session=True,
                env={k: v for k, v in os.environ.items() if k != "UNLEARN_JOB"} | {"UNLEARN_LOG": "info",
                    "COLUMNS": "200"} | env,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN if ignoring else signal.SIG_DFL),
            )  # fmt: skip

    @property
    def err(self) -> str:
        return self._err.read_text()

    def maps(self) -> str:
        with contextlib.suppress(OSError):
            return Path(f"/proc/{self.process.pid}/maps").read_text()
        return ""

    def until(self, condition) -> None:
        until(lambda: self.process.poll() is not None or condition())
        assert self.process.poll() is None, self.err

    def stopped(self, sign: signal.Signals) -> str:
        """The one line of a driver that gets this signal."""
        self.process.send_signal(sign)
        code = self.process.wait(600)
        assert code == 128 + sign, (code, self.err)
        assert "Traceback" not in self.err and "***" not in self.err, self.err
        [line] = [line for line in self.err.splitlines() if "stopped:" in line]
        return line
