"""Put before a Python's path, this takes away what other hosts lack, in the process itself and in every worker it starts.

No live CPU state (its address cannot be verified without symbols or a known layout), no fork, no POSIX-only modules.
"""

import importlib.abc
import importlib.util
import os
import sys

for name in ("fcntl", "grp", "pwd", "readline", "resource", "syslog", "termios", "tty", "pty"):
    sys.modules[name] = None  # type: ignore[assignment]
for name in ("fork", "forkpty", "getuid", "geteuid", "getgid", "setsid", "killpg"):
    if hasattr(os, name):
        delattr(os, name)


class _NoLiveState(importlib.abc.MetaPathFinder):
    """vmlab.machine.state, once loaded, finds no live CPU state and no symbols."""

    def find_spec(self, name, path=None, target=None):  # type: ignore[no-untyped-def]
        if name != "vmlab.machine.state":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        loader = spec.loader

        class Denying(importlib.abc.Loader):
            def create_module(self, spec):  # type: ignore[no-untyped-def]
                return loader.create_module(spec)

            def exec_module(self, module):  # type: ignore[no-untyped-def]
                loader.exec_module(module)
                module.live_address = lambda engine, layout: None

        spec.loader = Denying()
        return spec


sys.meta_path.insert(0, _NoLiveState())
