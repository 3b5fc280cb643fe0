"""requirements.lock: every package that `ct_nb[dev]` needs, at the version it was tested with; `--write` makes it from the running environment.

settings.ini pins what ct_nb asks for by name; the lock pins what those ask for in turn. `pip install -c requirements.lock -e '.[dev]'` installs exactly these.
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
HEAD = """# The versions that ct_nb was tested with (Linux, Python 3.11); settings.ini names the ones it asks for itself.
# Made by `python tests/lock_requirements.py --write`; used by `pip install -c requirements.lock -e '.[dev]'`.
# torch is the same version for CPU and CUDA; the CUDA libraries that its GPU build brings along are its own pins.
"""


def asked(root: Path = ROOT) -> list[Requirement]:
    "What settings.ini asks for, for use and for development."
    settings = ConfigParser(delimiters=["="])
    settings.read(root / "settings.ini", encoding="utf-8")
    return [
        Requirement(word)
        for key in ("requirements", "dev_requirements")
        for word in shlex.split(settings["DEFAULT"][key])
    ]


def locked(text: str) -> dict[str, str]:
    "Package → version."
    return dict(line.split("==") for line in text.splitlines() if line and not line.startswith("#"))


def version(name: str) -> str | None:
    "Installed version without the mark of a build, as in 2.13.0+cpu; None where there is none."
    try:
        return distribution(name).version.split("+")[0]
    except PackageNotFoundError:
        return None


def needed(name: str, extras: frozenset = frozenset()) -> list[Requirement]:
    "What an installed package asks for here."
    found = [Requirement(line) for line in distribution(name).requires or []]
    return [
        r
        for r in found
        if r.marker is None or any(r.marker.evaluate({"extra": extra}) for extra in extras or {""})
    ]


def closure() -> dict[str, str]:
    "Everything that settings.ini's packages lead to in the running environment."
    open_ = [r for r in asked() if r.marker is None or r.marker.evaluate()]
    found = {}
    seen = set()
    while open_:
        request = open_.pop()
        name = canonicalize_name(request.name)
        extras = frozenset(request.extras)
        # optional on this platform
        if (name, extras) in seen or (installed := version(name)) is None:
            continue
        seen.add((name, extras))
        found[name] = installed
        open_ += needed(name, extras) + (needed(name) if extras else [])
    return dict(sorted(found.items()))


def faults(requests: list[Requirement], lock: dict[str, str]) -> list[str]:
    """Where settings.ini and the lock disagree, and what installed packages of the lock's versions
    ask for that it does not have or does not satisfy.
    """
    found = []
    for request in requests:
        name = canonicalize_name(request.name)
        if name not in lock:
            found.append(f"requirements.lock has no {name}, which settings.ini asks for")
        elif not request.specifier.contains(lock[name]):
            found.append(
                f"requirements.lock has {name}=={lock[name]}, settings.ini asks for"
                f" {request.specifier}"
            )
    for name in lock:
        if version(name) != lock[name]:
            continue  # another environment than the lock's
        for request in needed(name):
            other = canonicalize_name(request.name)
            if other not in lock and version(other) is not None:
                found.append(f"requirements.lock has no {other}, which {name} asks for")
            elif other in lock and not request.specifier.contains(lock[other], prereleases=True):
                found.append(
                    f"requirements.lock has {other}=={lock[other]}, {name} asks for"
                    f" {request.specifier}"
                )
    return found


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        LOCK.write_text(
            HEAD + "".join(f"{name}=={number}\n" for name, number in closure().items()),
            encoding="utf-8",
        )
    wrong = faults(asked(), locked(LOCK.read_text(encoding="utf-8")))
    sys.exit("\n".join(wrong) or None)
