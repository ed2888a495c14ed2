"""The paper's own figures, to show beside: MemoryLLM, arXiv 2602.00398.

Another model (1B parameters, V 128,256, L 24, D 2048) on other text than the user's: shapes of
curves compare, values do not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

__all__ = [
    "DROP",
    "MODEL",
    "PARETO",
    "PRUNING",
    "SOURCE",
    "SPECTRUM",
    "TABLE_1",
    "TABLE_6",
    "TABLE_7",
    "TABLE_8",
    "Paper",
]

SOURCE = "arXiv 2602.00398"
MODEL = "MemoryLLM-1B (V 128,256, L 24, D 2048)"


@dataclass(frozen=True)
class Paper:
    """What the paper shows for a study.

    place: table or figure.   text: what perplexities were measured on.
    says: its finding, in our words.
    columns, rows: the table as printed there; empty where it only has a picture.
    ppl: perplexity by the value of the study's first column; the first entry is the starting
        point that changes are relative to.
    """

    place: str
    text: str
    says: str
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    ppl: Mapping[float, float] = field(default_factory=dict)

    def change(self, value: float) -> float | None:
        """Perplexity over the starting point's, minus 1; None where the paper has no figure."""
        if value not in self.ppl:
            return None
        return self.ppl[value] / next(iter(self.ppl.values())) - 1


_TASKS = ("LAMBADA", "SIQA", "ARC-e", "HellaSwag", "WinoGrande", "BoolQ", "PIQA")


def _rows(text: str) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(cell.strip() for cell in line.split("|")) for line in text.split("\n"))


TABLE_1 = Paper(
    place="Table 1",
    text="wikitext-2",
    says="recall (LAMBADA, SIQA, ARC-e) suffers much more than reasoning as alpha falls",
    columns=("alpha", "perplexity", *_TASKS),
    rows=_rows(
        "1.0 | 24.348 | .3613 | .7830 | .5156 | .3724 | .5233 | .6205 | .7018\n"
        "0.9 | 24.652 | .3643 | .7780 | .5043 | .3749 | .5193 | .6177 | .7035\n"
        "0.8 | 25.517 | .3546 | .7260 | .4414 | .3750 | .5178 | .6159 | .7062\n"
        "0.7 | 27.457 | .3004 | .6700 | .4168 | .3694 | .4988 | .6165 | .7057\n"
        "0.6 | 32.614 | .2002 | .6620 | .3949 | .3614 | .4901 | .6135 | .6980\n"
        "0.5 | 53.707 | .1086 | .5380 | .3170 | .3300 | .5012 | .6131 | .6801"
    ),
    ppl=MappingProxyType(
        {1.0: 24.348, 0.9: 24.652, 0.8: 25.517, 0.7: 27.457, 0.6: 32.614, 0.5: 53.707}
    ),
)
TABLE_6 = Paper(
    place="Table 6",
    text="one A100, bf16 tables on storage, sequence 2048",
    says="a memory model decodes in 0.67 of the time and 0.63 of the memory of a dense one",
    columns=("", "dense", "flex-1", "flex-2", "flex-3", "memory"),
    rows=_rows(
        "memory, GB | 9.541 | 7.025 | 7.409 | 7.825 | 6.041\n"
        "ms/token | 21.50 | 18.75 | 20.28 | 21.47 | 14.42"
    ),
)
TABLE_7 = Paper(
    place="Table 7",
    text="wikitext-2",
    says="8 bits cost nothing, 4 bits 0.4 % of perplexity; its sizes count codes without scales",
    columns=("bits", "size", "perplexity", *_TASKS),
    rows=_rows(
        "16 | 12.6 GB | 24.348 | .3613 | .7830 | .5156 | .3724 | .5233 | .6205 | .7018\n"
        "8 | 6.3 GB | 24.347 | .3615 | .7831 | .5156 | .3722 | .5433 | .6206 | .7021\n"
        "4 | 3.15 GB | 24.439 | .3610 | .7822 | .5157 | .3700 | .5429 | .6214 | .7011"
    ),
    ppl=MappingProxyType({16: 24.348, 8: 24.347, 4: 24.439}),
)
TABLE_8 = Paper(
    place="Table 8",
    text="C4",
    says="half of the rank costs 3.5 % of perplexity and saves half of the storage",
    columns=("rank cut", "r", "ToL params", "size", "storage saved", "perplexity"),
    rows=_rows(
        "0 % | 2048 | 6304.03M | 12.60 GB | 0 % | 18.919\n"
        "10 % | 1843 | 5763.60M | 11.52 GB | 8.57 % | 18.923\n"
        "20 % | 1638 | 5122.51M | 10.24 GB | 18.74 % | 18.958\n"
        "30 % | 1433 | 4481.41M | 8.96 GB | 28.91 % | 19.015\n"
        "40 % | 1228 | 3840.31M | 7.68 GB | 39.08 % | 19.126\n"
        "50 % | 1024 | 3202.35M | 6.40 GB | 49.20 % | 19.586"
    ),
    ppl=MappingProxyType({0: 18.919, 10: 18.923, 20: 18.958, 30: 19.015, 40: 19.126, 50: 19.586}),
)
DROP = Paper(
    place="Figures 4 and 12",
    text="eight tasks (Figure 12)",
    says="only the first few layers of a MemoryLLM matter much and middle ones are nearly free; "
    "dense models show a U shape: the first and the last layers matter",
)
SPECTRUM = Paper(
    place="Figure 13",
    text="",
    says="singular spectra are heavy-tailed, and the last layers are the most compressible",
)
PRUNING = Paper(
    place="Figure 11",
    text="",
    says="MemoryLLM and Flex-MemoryLLM beat a dense model of 1B or 750M parameters that was pruned "
    "to their active size by magnitude, SparseGPT or Wanda",
)
PARETO = Paper(
    place="Tables 7 and 8",
    text="",
    says="8 bits cost nothing, 4 bits 0.4 % and half the rank 3.5 % of perplexity; each stands "
    "alone there, with sizes that count no scales",
)
