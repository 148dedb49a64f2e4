"""Packaging: two source roots, one distribution, one console script."""

import os
import re
from pathlib import Path

from setuptools import find_packages, setup

# DeepSpeed ships as an sdist; its ops are compiled on first use, never while installing.
os.environ.setdefault("DS_BUILD_OPS", "0")

HERE = Path(__file__).parent
VERSION = re.search(
    r'^__version__ = "([^"]+)"', (HERE / "engine/kineticlip/runtime/version.py").read_text(), re.M
).group(1)

setup(
    name="kineticlip",
    version=VERSION,
    description="CLIP as a video recogniser: training, evaluation and kernels in one engine.",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    package_dir={
        "kineticlip": "engine/kineticlip",
        "kineticlip.configs": "configs",
        "kineticlip_kernels": "kernels/kineticlip_kernels",
    },
    packages=[*find_packages("engine"), *find_packages("kernels"), "kineticlip.configs"],
    package_data={
        "kineticlip": ["py.typed", "data/class_names/*", "report/templates/*"],
        "kineticlip.configs": ["*.yaml", "deepspeed/*.json"],
        "kineticlip_kernels": ["py.typed", "configs/*.json"],
    },
    # Tried at both ends: the lowest of all together on Python 3.10, the newest of December 2026 on
    # 3.13 (torch 2.14, Triton 3.8, NumPy 2.5, PyAV 19).
    install_requires=[
        "torch>=2.11",
        "torchvision>=0.26",
        "numpy>=2.0",
        "pillow>=12",  # 13 needs Python 3.11; the resized pixels are 13's with both
        # Prober, decoder on CPUs, and the encoder of the demo clips. 18 needs Python 3.11.
        "av>=17.1",
        "open_clip_torch>=3.3",  # tokenizer, text towers, pretrained weights
        "deepspeed>=0.19.8,<0.20",
        "safetensors>=0.5",
        "annotated-types>=0.6",  # ranges of the values of the config
        "pydantic>=2.10",  # checks them
        "pyyaml>=6",
        "pyarrow>=18",  # per-video results as Parquet
        "jinja2>=3.1",  # the HTML report
        "tqdm>=4.66",
        "scikit-learn>=1.5",  # LDA classifier
        'triton>=3.6; platform_system == "Linux"',
        'xformers>=0.0.35; platform_system == "Linux"',
        'nvidia-dali-cuda130>=2.4; platform_system == "Linux" and platform_machine == "x86_64"',
    ],
    extras_require={
        "test": [
            "pytest>=8",
            "pytest-benchmark>=5.0.1",
            "pytest-xdist>=3.6.1",
            "pytest-cov>=6",  # make coverage
            "ruff>=0.14",
            "mypy>=1.18",
            "types-PyYAML",
            "transformers>=5",  # XCLIPModel, the reference of the X-CLIP port
        ],
        # A second decoder, on request (docs/decisions/0001); needs the system's FFmpeg libraries.
        "torchcodec": ["torchcodec>=0.17"],
        "monitor": ["tensorboard>=2.18"],
    },
    entry_points={"console_scripts": ["kineticlip=kineticlip.__main__:main"]},
)
