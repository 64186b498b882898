"""Algorithms by name."""

import difflib

from bilevel.algorithms import LVHBA, Algorithm, ImplicitGradient, KKTRelaxation, Penalty

_ALGORITHMS: tuple[type[Algorithm], ...] = (ImplicitGradient, Penalty, LVHBA, KKTRelaxation)


def algorithms() -> dict[str, type[Algorithm]]:
    """Every algorithm class under its name."""
    return {cls.__name__: cls for cls in _ALGORITHMS}


def algorithm(name: str) -> type[Algorithm]:
    """The algorithm class called ``name``; upper and lower case, ``-`` and ``_`` do not matter.

    Raises:
        ValueError: for an unknown name, with the names there are.
    """

    def plain(text: str) -> str:
        return text.lower().replace("_", "").replace("-", "")

    known = {plain(key): cls for key, cls in algorithms().items()}
    if plain(name) in known:
        return known[plain(name)]
    close = difflib.get_close_matches(plain(name), known, n=1)
    hint = f"; did you mean {known[close[0]].__name__}?" if close else "."
    raise ValueError(f"unknown algorithm {name!r}{hint} Known: {', '.join(algorithms())}")
