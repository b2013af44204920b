"""What pyproject.toml cannot say.

``configs/`` of the checkout is shipped as the package ``vmlab.configs``, ``experiments/`` as ``vmlab.coursework.folders``;
and the C files of ``vmlab/machine/native/`` are compiled
where there is a compiler, into a plain shared library beside it (no extension module: ctypes loads it, any Python 3).
Without a compiler the installation goes on without it, and the lab builds it at first use or does without.
"""

import os
import runpy

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

NATIVE = "vmlab/machine/native"
BUILD = runpy.run_path(f"{NATIVE}/build.py")
LIBRARY_FILE = BUILD["file_name"]()


class BuildLibrary(build_ext):
    """Builds a library, which has neither an extension module's name nor its entry point, nor needs Python's library."""

    def get_ext_filename(self, fullname):
        return os.path.join(*fullname.split(".")[:-1], LIBRARY_FILE)

    def get_export_symbols(self, ext):
        return ext.export_symbols

    def get_libraries(self, ext):
        return ext.libraries


class PlatformWheel(bdist_wheel):
    """One wheel for every Python of a platform."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


setup(
    packages=[*find_packages(include=["vmlab", "vmlab.*"]), "vmlab.configs", "vmlab.coursework.folders"],
    package_dir={"vmlab.configs": "configs", "vmlab.coursework.folders": "experiments"},
    ext_modules=[Extension(
        "vmlab.machine.native.machine", [f"{NATIVE}/{path.name}" for path in BUILD["SOURCES"]], depends=[str(path) for path in BUILD["HEADERS"]],
        optional=True)],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": PlatformWheel},
)
