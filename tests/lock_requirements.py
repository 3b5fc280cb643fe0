"""requirements.lock: the version of every package that `ct_nb[dev]` needs; `--write` makes it from
the running environment.

settings.ini gives ranges; the lock gives the versions that the tests ran with, those of indirect
dependencies too. `make setup` installs them: `pip install -c requirements.lock -e '.[dev]'`.
"""

import shlex
import sys
from configparser import ConfigParser
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements.lock"
EXTRAS = ("notebooks", "dev")
HEAD = """# The versions that ct_nb was tested with (Linux, Python 3.11); the ranges: settings.ini.
# Made by `python tests/lock_requirements.py --write`.
# Used by `pip install -c requirements.lock -e '.[dev]'`.
# torch is the same version for CPU and CUDA; the CUDA libraries of its GPU build are its own pins.
"""


def requirements(extras=EXTRAS, root: Path = ROOT) -> list[Requirement]:
    "What settings.ini lists for the library and for these extras."
    settings = ConfigParser(delimiters=["="])
    settings.read(root / "settings.ini", encoding="utf-8")
    keys = ["requirements", *(f"{extra}_requirements" for extra in extras)]
    return [Requirement(line) for key in keys for line in shlex.split(settings["DEFAULT"][key])]


def lock_versions(text: str) -> dict[str, str]:
    "Package → version of a lock file's text."
    return dict(line.split("==") for line in text.splitlines() if line and not line.startswith("#"))


def installed_version(name: str) -> str | None:
    "Version without a build tag such as +cpu; None where the package is not installed."
    try:
        return distribution(name).version.split("+")[0]
    except PackageNotFoundError:
        return None


def dependencies(name: str, extras=frozenset()) -> list[Requirement]:
    "What an installed package requires on this platform, with these of its extras."
    lines = map(Requirement, distribution(name).requires or [])
    environments = [{"extra": extra} for extra in ("", *extras)]
    return [r for r in lines if r.marker is None or any(map(r.marker.evaluate, environments))]


def closure(extras=EXTRAS) -> dict[str, str]:
    "Installed versions of everything that the library and these extras need, directly or not."
    queue = [r for r in requirements(extras) if r.marker is None or r.marker.evaluate()]
    versions = {}
    visited = set()
    while queue:
        request = queue.pop()
        key = (canonicalize_name(request.name), frozenset(request.extras))
        version = installed_version(request.name)
        if key in visited or version is None:  # None: optional on this platform
            continue
        visited.add(key)
        versions[key[0]] = version
        queue += dependencies(*key)
    return dict(sorted(versions.items()))


def conflicts(requests: list[Requirement], lock: dict[str, str]) -> list[str]:
    """Sentences on requests, of settings.ini or of installed packages at the lock's versions, that
    the lock does not satisfy.
    """
    needs = [("settings.ini", request) for request in requests]
    for name in lock:
        if installed_version(name) == lock[name]:  # else another environment than the lock's
            needs += [(name, request) for request in dependencies(name)]
    sentences = []
    for source, request in needs:
        name = canonicalize_name(request.name)
        optional = source != "settings.ini" and installed_version(name) is None
        if name not in lock:
            if not optional:
                sentences.append(f"requirements.lock has no {name}, which {source} asks for")
        elif not request.specifier.contains(lock[name], prereleases=True):
            sentences.append(
                f"requirements.lock has {name}=={lock[name]}, {source} asks for {request.specifier}"
            )
    return sentences


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        lines = [f"{name}=={version}\n" for name, version in closure().items()]
        LOCK.write_text(HEAD + "".join(lines), encoding="utf-8")
    lock = lock_versions(LOCK.read_text(encoding="utf-8"))
    sys.exit("\n".join(conflicts(requirements(), lock)) or None)
