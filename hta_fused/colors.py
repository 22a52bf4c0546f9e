"""One colour for one thing, in every picture: the trainer's, the paper's and the benchmarks'. Imports nothing.

Green is what this package does, grey what it is measured against: light for the plain rival, dark for the one that is given
the same work or the same bytes. Red and blue are the two copies.
"""

OURS, THEIRS, RIVAL = "#1b7f5c", "#9aa3ad", "#3d4650"
THETA, ETA = "#c8442d", "#2b69b5"
OF_METHOD = {
    "HTA": OURS,
    "SGD": THEIRS,
    "SGD, equal work": RIVAL,
    "local SGD": "#8d5bb3",
    "neither": THEIRS,
    "neither, equal work": RIVAL,
    "dropout": "#e0a458",
    "dropout, equal work": "#a8651b",
    "HTA, masks of an epoch": OURS,
    "HTA, masks of a step": "#6cc2a1",
}
_OTHERS = ("#b0498c", "#4aa3b8", "#7a6a53", "#b5b02b")


def of_method(name: str, number: int = 0) -> str:
    """A method's colour; one that has none of its own takes number `number` of some others."""
    return OF_METHOD.get(name, _OTHERS[number % len(_OTHERS)])
