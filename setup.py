"Packaging shim: every value lives in settings.ini; this file only hands it to setuptools."
import shlex
from configparser import ConfigParser
from pathlib import Path

import setuptools

config = ConfigParser(delimiters=["="])
config.read(Path(__file__).parent / "settings.ini", encoding="utf-8")
settings = config["DEFAULT"]

setuptools.setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    keywords=settings["keywords"].split(),
    author=settings["author"],
    license="Apache-2.0",
    packages=setuptools.find_packages(include=[f"{settings['lib_path']}*"]),
    python_requires=f">={settings['min_python']}",
    install_requires=shlex.split(settings["requirements"]),
    extras_require=dict(dev=shlex.split(settings["dev_requirements"])),
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    entry_points=dict(
        console_scripts=shlex.split(settings["console_scripts"]),
        nbdev=[f"{settings['lib_path']}={settings['lib_path']}._modidx:d"],  # lets nbdev resolve `symbol` links
    ),
)
