"""Packaging of the Map Reduce subnet. Tool settings live in pyproject.toml; the tested torch build
in constraints.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(
    r'^__version__ = "([^"]+)"', (ROOT / "mapreduce" / "__init__.py").read_text(), re.MULTILINE
)
assert VERSION is not None

EXAMPLES = ["scikit-learn>=1.4"]

setup(
    name="map-reduce-subnet",
    version=VERSION.group(1),
    description="All-reduce and broadcast of training tensors through incentivised miners.",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11",
    packages=find_packages(include=["mapreduce", "mapreduce.*", "neurons", "peer"]),
    package_data={"mapreduce": ["py.typed"], "peer": ["py.typed"]},
    install_requires=[
        "aiohttp>=3.14,<4",
        "bittensor>=11.3,<11.4",
        "blake3>=1.0,<2",
        "numpy>=1.26",
        "psutil>=5.9",
        "pydantic>=2.7,<3",
        "speedtest-cli>=2.1.3,<3",
        "torch>=2.2",
        "uvloop>=0.19",
    ],
    extras_require={
        "examples": EXAMPLES,
        "test": [
            *EXAMPLES,
            "hypothesis>=6.100",
            "mypy>=1.10",
            "pytest>=8",
            "pytest-timeout>=2.3",
            "ruff>=0.6",
        ],
        "bench": ["matplotlib>=3.8"],  # draws; figures alone need nothing more than the package
    },
    classifiers=[
        "Operating System :: POSIX",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
    ],
)
