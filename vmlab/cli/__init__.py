"""The command line: ``main`` and one file per verb, each loaded only when it is called."""
