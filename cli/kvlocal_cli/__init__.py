"""The command line of kvlocal, installed as ``kvlocal_cli``: one file per command, everything rich in ``render``."""
