"""The one piece of C in the lab: ``blocks.c``, and :mod:`build`, which turns it into a library."""
