"""A command on a terminal of its own."""

import contextlib
import os
import pty
import re
import subprocess


def shown_on_a_terminal(command):
    """Run a command with a terminal as its standard error; return exit status and what was drawn, uncoloured."""
    main, worker = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=worker, env=environment) as process:
        os.close(worker)
        shown = b""
        with contextlib.suppress(OSError):  # Linux's word for the end of a terminal's output
            while part := os.read(main, 4096):
                shown += part
    os.close(main)
    return process.returncode, re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode())
