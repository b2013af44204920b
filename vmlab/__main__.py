"""``python -m vmlab``: the same as the ``vmlab`` command."""

from vmlab.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
