"Packaging: every value stands in settings.ini; this file hands it to setuptools."

import shlex
from configparser import ConfigParser
from pathlib import Path

import setuptools

config = ConfigParser(delimiters=["="])
config.read(Path(__file__).parent / "settings.ini", encoding="utf-8")
settings = config["DEFAULT"]


def requirements(name):
    return shlex.split(settings[name])


extras = {name: requirements(f"{name}_requirements") for name in ("notebooks", "deepspeed")}
extras["dev"] = [*extras["notebooks"], *requirements("dev_requirements")]

setuptools.setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    keywords=settings["keywords"].split(),
    author=settings["author"],
    license="Apache-2.0",
    packages=setuptools.find_packages(include=[f"{settings['lib_path']}*"]),
    python_requires=f">={settings['min_python']}",
    install_requires=requirements("requirements"),
    extras_require=extras,
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    entry_points=dict(
        console_scripts=shlex.split(settings["console_scripts"]),
        # lets nbdev resolve `symbol` links
        nbdev=[f"{settings['lib_path']}={settings['lib_path']}._modidx:d"],
    ),
)
