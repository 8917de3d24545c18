"""Where the `kvlocal` command begins: Ctrl-C ends it quietly from here on, also while modules are loaded."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

INTERRUPTED = 130


def main() -> None:
    """Run the command line and exit."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)
    sys.unraisablehook = _swallowed
    try:
        from kvlocal_cli.terminal.standard import open_standard_streams

        open_standard_streams()
        from kvlocal_cli.main import main as command

        if signal.getsignal(signal.SIGINT) is _leave:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        command(prog_name="kvlocal")
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    finally:
        # what is left is to take the interpreter down
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _leave(_number: int, _frame: FrameType | None) -> None:
    """Nothing has begun yet: an exception in the middle of an import could end in any other one."""
    os._exit(INTERRUPTED)


def _swallowed(what: sys.UnraisableHookArgs) -> None:
    """Ctrl-C in a callback from C, such as that of the log, is an exception that goes nowhere."""
    if not issubclass(what.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(what)
    elif signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # nobody has noted it, so nothing is to be saved; a spinner may have hidden the cursor
        if os.isatty(2):
            os.write(2, b"\x1b[?25h\n")
        os._exit(INTERRUPTED)


if __name__ == "__main__":
    main()
