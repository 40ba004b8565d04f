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
    description="Autoregressive image generation over continuous tokens (MAR) for users of diffusers and transformers",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    project_urls={"Paper": "https://arxiv.org/abs/2406.11838"},
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords="image generation, text to image, autoregressive, MAR, diffusion, transformers, diffusers, pytorch",
    package_dir={"": "src"},
    packages=find_packages("src"),
    py_modules=["mar_hf_command", "mar_hf_settings"],
    package_data={"mar_hf": ["py.typed", "checkpoints/**/*"]},
    python_requires=">=3.10",
    install_requires=INSTALL,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["mar-hf = mar_hf_command:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3 :: Only",
        "Topic :: Multimedia :: Graphics",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Processing",
        "Typing :: Typed",
    ],
)
