# SPDX-License-Identifier: Apache-2.0
"""What the package is called, what it needs and what it ships."""

from pathlib import Path

from setuptools import find_packages, setup


ROOT = Path(__file__).parent
README = ROOT / "README.md"

INSTALL = [
    "torch",
    "transformers>=5.20,<6",
    # The two libraries dropped Python 3.10 on the way; pip finds a matching transformers 5 by itself.
    "diffusers>=0.42; python_version >= '3.11'",
    "diffusers>=0.41,<0.42; python_version < '3.11'",
    "huggingface-hub",
    "safetensors",
    "accelerate",
    "sentencepiece",
    "numpy",
    "Pillow",
]

EXTRAS = {
    "train": ["datasets", "tensorboard", "matplotlib", "pyyaml", "peft"],
    "eval": ["torchmetrics", "scipy", "scikit-learn", "datasets", "matplotlib", "pyyaml"],
    "app": ["gradio"],
    # What the examples need: they are tested by running them.
    "test": [
        *("pytest", "pytest-xdist", "hypothesis", "datasets", "matplotlib", "tensorboard", "pyyaml", "peft"),
        *("scikit-learn", "torchmetrics", "scipy"),
    ],
    "docs": ["mkdocs"],
    "quality": ["ruff==0.17.6"],
}

setup(
    name="mar_hf",
    version="0.1.0",
    description="Image generation by autoregressive models over continuous tokens, in the manner of diffusers",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords="image generation, masked autoregression, diffusion, transformers, diffusers, pytorch",
    package_dir={"": "src"},
    packages=find_packages("src"),
    py_modules=["mar_hf_command"],
    package_data={"mar_hf": ["py.typed", "checkpoints/**/*"]},
    python_requires=">=3.10",
    install_requires=INSTALL,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["mar-hf = mar_hf_command:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
