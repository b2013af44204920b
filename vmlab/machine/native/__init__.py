"""The C of the lab, and :mod:`build`, which turns it into a library."""
