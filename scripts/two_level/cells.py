"""The settings that evaluate.py knows by name; no command."""

from __future__ import annotations

from typing import NamedTuple


class Cell(NamedTuple):
    """A setting."""

    source: str
    ways: int
    shots: int
    kind: str
    layers: int
    pooling: str
    head: str
    length: int = 24
    pairs: bool = False  # the loss of pairs, and a head of class means after it

    def __str__(self) -> str:
        layers = f", {self.layers} layers" if self.kind != "head" else ""
        task = f"{self.source}, {self.ways}-way {self.shots}-shot" + ", pairs" * self.pairs
        return f"{task}, {self.kind}{layers}, pooling {self.pooling}, {self.head} head"


_INTENTS, _TYPES, _HEADLINES = ("clinc150", 10, 5), ("trec28", 5, 5), ("huffpost36", 5, 5)
_TITLES, _ONE_SHOT = ("stackoverflow20", 4, 5), ("clinc150", 5, 1)
_MEAN, _CLS = ("unit", "prototype"), ("cls", "random")
CELLS = {
    "A": Cell(*_INTENTS, "lora", 6, *_MEAN),
    "B": Cell(*_INTENTS, "lora", 6, *_CLS),
    "C": Cell(*_TYPES, "lora", 6, *_MEAN),
    "D": Cell(*_HEADLINES, "lora", 6, *_MEAN),
    "E": Cell(*_TITLES, "lora", 6, *_MEAN),
    "F": Cell(*_INTENTS, "full", 6, *_MEAN),
    "G": Cell(*_INTENTS, "full", 6, *_CLS),
    "H": Cell(*_INTENTS, "head", 1, *_MEAN),
    "I": Cell(*_ONE_SHOT, "lora", 6, *_MEAN),
    "J": Cell(*_TYPES, "lora", 6, *_CLS),
    "K": Cell("amazon16_partial", 2, 5, "lora", 6, *_MEAN, length=96),
    "L": Cell(*_INTENTS, "head", 1, *_CLS),
    "M": Cell(*_TYPES, "full", 6, *_MEAN),
    "N": Cell(*_HEADLINES, "lora", 6, "unit", "logistic"),
    "O": Cell(*_HEADLINES, "lora", 6, *_CLS),
    "P": Cell(*_TITLES, "lora", 6, *_CLS),
    "Q": Cell(*_HEADLINES, "full", 6, *_MEAN),
    "R": Cell(*_TYPES, "head", 1, *_MEAN),
    "S": Cell(*_ONE_SHOT, "lora", 6, *_CLS),
    "T": Cell("huffpost36", 5, 1, "lora", 6, *_MEAN),
}
CELLS |= {name.lower(): CELLS[name]._replace(layers=2) for name in "ABCDEIJO"}
CELLS |= {
    "f": Cell("clinc150", 5, 5, "full", 2, *_MEAN),
    "g": Cell("clinc150", 5, 5, "full", 2, *_CLS),
    "m": Cell(*_TYPES, "full", 2, *_MEAN),
    "x": Cell("clinc150", 5, 5, "lora", 2, *_CLS),
}
_SETS = {"intents": "clinc150", "titles": "stackoverflow20", "types": "trec28"}
_SETS |= {"headlines": "huffpost36"}
CELLS |= {
    f"pairs-{name}": Cell(*task, "full", 6, *_MEAN, pairs=True)
    for name, task in (
        ("intents", _INTENTS), ("types", _TYPES), ("headlines", _HEADLINES), ("titles", _TITLES),
    )
}  # fmt: skip
CORE = {
    f"core-{name}-{kind}-{ways}x{shots}-{head}": Cell(
        source, ways, shots, kind, 1 if kind == "head" else 6, pooling, head
    )
    for name, source in _SETS.items()
    for kind in ("head", "lora", "full")
    for ways, shots in ((10, 5), (5, 1))
    for pooling, head in (_MEAN, _CLS)
}
CELLS |= CORE
