"""What pyproject.toml cannot say: ``configs/`` of the checkout is shipped as the package ``vmlab.configs``."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["vmlab", "vmlab.*"]), "vmlab.configs"],
    package_dir={"vmlab.configs": "configs"},
)
