"""Where the two import packages of the one distribution lie; everything else is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    package_dir={"prefix_kernels": "prefix_kernels", "prefix_tuning": "python/prefix_tuning"},
    packages=find_packages(include=["prefix_kernels", "prefix_kernels.*"]) + find_packages("python"),
    package_data={"": ["*.json"]},
)
