"""Python imports this at its start where the folder is on PYTHONPATH: it hides installed packages, as if they were not.

Environment: HIDDEN names distributions, separated by spaces. ONLY names others: then all are hidden but these and what they depend on.
"""

import os
import re
from importlib import metadata
from importlib.machinery import PathFinder


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def with_dependencies(names: list[str], without: set[str]) -> set[str]:
    """These and what they need on any machine, as far as it is installed. An optional extra is not needed."""
    found, waiting = set(), [normalised(name) for name in names]
    while waiting:
        name = waiting.pop()
        if name in found or name in without:
            continue
        found.add(name)
        try:
            requirements = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        needed = [line for line in requirements if "extra ==" not in line]
        waiting += [normalised(re.match(r"[\w.-]+", line)[0]) for line in needed]
    return found


hidden = {normalised(name) for name in os.environ.get("HIDDEN", "").split()}
only = os.environ.get("ONLY", "").split()
shown = with_dependencies(only, hidden) | {"diffpo", "pip", "setuptools", "wheel"} if only else None


def is_hidden(distributions: list[str]) -> bool:
    names = set(map(normalised, distributions))
    return names <= hidden if shown is None else not names & shown


modules = {module for module, names in metadata.packages_distributions().items() if is_hidden(names)}
find_installed = PathFinder.find_spec


def find_spec(_, name, path=None, target=None):
    return None if path is None and name in modules else find_installed(name, path, target)


PathFinder.find_spec = classmethod(find_spec)
