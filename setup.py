"""Installs the package `prepretrain`; configs/, datasets/ and tools/ are used from the checkout."""

from setuptools import find_packages, setup

setup(
    name="prepretrain",
    version="0.1.0",
    description="Visual foundation models in two stages: masked autoencoding, then weak supervision",
    packages=find_packages(include=["prepretrain", "prepretrain.*"]),
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.11", "torchvision", "timm>=1.0.20", "fairscale", "open_clip_torch", "webdataset", "submitit",
        "fvcore", "omegaconf>=2.3", "safetensors", "pyarrow", "pillow", "numpy", "scikit-learn", "tqdm", "matplotlib",
        "tensorboard", "torchcodec", "filelock", "transformers>=5", "sentencepiece",
    ],
    extras_require={"test": ["pytest", "pytest-timeout", "pytest-xdist", "wandb"]},
)
