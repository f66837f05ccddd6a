"""Installs the package `prepretrain` and its commands.

configs/, datasets/ and tools/ go into the package, so that a wheel holds them: as
prepretrain.configs, prepretrain.cards and prepretrain.tools. None of them has an __init__.py.
The commands start from prepretrain/command.py.
Upper bounds are the next major release of what has been tried; tests/constraints.txt holds the
very versions that passed the tests.
"""

from setuptools import find_packages, setup

FOLDERS = {
    "prepretrain.configs": "configs",
    "prepretrain.cards": "datasets",
    "prepretrain.tools": "tools",
}

# What one feature each needs; without it, that feature says which extra to install.
FEATURES = {
    # curation: its engine, and what its stages measure with
    "data": [
        *("datatrove>=0.10,<0.11", "duckdb>=2,<3", "faiss-cpu>=1.9,<2"),
        *("ftfy>=6,<7", "py3langid<0.5", "pyahocorasick>=2,<3"),
    ],
    "completion": ["argcomplete>=3,<4"],  # of the commands, by the shell
    "detection": ["faster-coco-eval>=1.8,<2"],  # COCO's and LVIS's metrics; polygons to pixels
    "fp8": ["torchao>=0.18,<1"],  # shard.precision=fp8
    "remote": [  # shards by s3://, gs://, hf:// and https://
        *("fsspec", "s3fs>=2025.3", "gcsfs>=2025.3", "aiohttp>=3.9,<4", "huggingface_hub>=1,<3"),
    ],
    "text": ["transformers>=5,<6", "sentencepiece<1"],  # XLM-R, tokenizers of Hugging Face
    "tensorboard": ["tensorboard>=2.14,<3"],  # curves beside metrics.jsonl
    "simplejpeg": ["simplejpeg>=1.7,<2"],  # the fastest JPEG decoder
    "video": ["av>=15,<19"],  # PyAV, which brings FFmpeg
    "torchcodec": ["torchcodec"],  # the next; each release fits one of torch
    "wandb": ["wandb<1"],  # the config's `wandb:`
}
ALL = [requirement for requirements in FEATURES.values() for requirement in requirements]

setup(
    name="prepretrain",
    version="0.1.0",
    description="Visual foundation models in two stages: masked autoencoding, then weak supervision",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=[*find_packages(include=["prepretrain", "prepretrain.*"]), *FOLDERS],
    package_dir={"": ".", **FOLDERS},
    package_data={
        "prepretrain": ["py.typed"],
        "prepretrain.reports": ["*.html", "*.css", "*.js"],  # the page of a study
        "prepretrain.configs": ["*.yaml", "**/*.yaml"],
        "prepretrain.cards": ["*.yaml", "*.md"],
    },
    entry_points={
        "console_scripts": [
            "prepretrain = prepretrain.command:launch",
            "prepretrain-plan = prepretrain.command:plan",
            "prepretrain-zoo = prepretrain.command:zoo",
            "prepretrain-report = prepretrain.command:report",
            "prepretrain-scaling = prepretrain.command:scaling",
            "prepretrain-export = prepretrain.command:export",
            "prepretrain-curate = prepretrain.command:curate",
        ]
    },
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.11,<3",
        "torchvision<1",
        "timm>=1.0.31,<1.1",
        "fairscale<0.5",
        "open_clip_torch>=3.3,<4",
        "webdataset<2",
        "submitit>=1.5,<2",
        "fvcore<0.2",
        "omegaconf>=2.4,<3",  # the first that bounds what aliases stand for
        "pyyaml>=6,<7",
        "safetensors<1",
        "pyarrow<27",
        "msgspec>=0.19,<0.23",  # finds a value in JSON in a quarter of the time that pyarrow takes
        "pillow<14",
        "numpy<3",
        "scipy<2",
        "filelock<5",
        "tqdm<5",
        "matplotlib<4",
        "jinja2>=3,<4",
    ],
    extras_require={
        **FEATURES,
        "all": ALL,
        "test": [
            *ALL,
            *("pytest<10", "pytest-timeout<3", "pytest-xdist<4"),
            "moto[server]>=5,<6",  # the store of tests/test_remote.py
            "scikit-learn<2",  # what the probes are compared with
            *("setuptools>=77", "wheel"),  # tests/test_wheel.py builds one
            *("mypy<3", "ruff>=0.15,<0.18"),
        ],
    },
)
