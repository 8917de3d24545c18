"""``python -m kvlocal`` is the ``kvlocal`` command."""

from kvlocal_cli.main import main

if __name__ == "__main__":
    main(prog_name="kvlocal")
