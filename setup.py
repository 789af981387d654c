from setuptools import setup

extras = {
    "test": ["pytest", "ruff", "openai>=1.50"],
    "plot": ["matplotlib"],
    "log": ["tensorboard"],
    "api": ["openai>=1.50"],
    "bench": ["trl", "transformers"],
    "hf": ["safetensors", "huggingface_hub", "transformers", "datasets"],
}

setup(
    name="minirlaif",
    version="0.1.0",
    description="Reinforcement learning from AI feedback, from scratch in PyTorch",
    license="MIT",
    python_requires=">=3.10",
    packages=["minirlaif"],
    install_requires=["torch>=2.4,<2.14", "numpy", "tiktoken", "tqdm"],
    extras_require=extras,
)
