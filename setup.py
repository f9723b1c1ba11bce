"""The option files and scripts of recipes/ go into the wheel as the folder hf_immunize/presets."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["hf_immunize*"]), "hf_immunize.presets"],
    package_dir={"hf_immunize.presets": "recipes"},
)
