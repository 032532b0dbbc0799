"""What setup.cfg cannot say: the packages that are found, and one (the configs) that lies beside the package."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["ctllm_jax*", "data_prep*"]), "ctllm_jax.configs"],
    package_dir={"ctllm_jax.configs": "configs"},
    package_data={"": ["**/*"]},
    exclude_package_data={"": ["**/__pycache__/*"]},
)
