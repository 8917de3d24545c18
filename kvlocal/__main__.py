"""``python -m kvlocal`` is the ``kvlocal`` command."""

import os
import sys

# `python -m` lets files of the working directory be imported; the command does not, and neither may this
if not getattr(sys.flags, "safe_path", False) and sys.path[:1] == [os.getcwd()]:
    del sys.path[0]

from kvlocal_cli.start import main

if __name__ == "__main__":
    main()
