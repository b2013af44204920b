"""``minios``: the lab's own operating system, 32 and 64 bits from the same sources. docs/minios.md is the guided tour.

The sources, the built images and their lock file lie beside this file. Read main.c first; it is the table of contents.
"""
