"""The E2E NLG task: restaurant descriptions from meaning representations (Novikova et al. 2017, arXiv:1706.09254).

A meaning representation (MR) is text such as "name[The Mill], eatType[pub], near[Café Rouge]". This file reads the
data set, turns its rows into prompts and completions, and scores texts: BLEU against all references of an MR, and the
share of slots a text leaves out.
"""

from __future__ import annotations

import csv
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from statistics import median
from typing import Any, TextIO

from prefix_tuning.e2e_phrasings import NAME_VARIANTS, PHRASINGS
from prefix_tuning.files import json_lines, open_text

# Slot of the data set -> attribute of the linearised prompt (Li & Liang 2021, arXiv:2101.00190), in the prompt's order.
ATTRIBUTES = {
    "name": "name",
    "eatType": "Type",
    "food": "food",
    "priceRange": "price",
    "customer rating": "customer rating",
    "area": "area",
    "familyFriendly": "family friendly",
    "near": "near",
}


def parse_mr(text: str) -> dict[str, str]:
    """The slots of an MR in the order written: "name[Aromi], eatType[pub]" -> {"name": "Aromi", "eatType": "pub"}.

    Raises ValueError for text of another form, an unknown slot, a slot given twice or an empty value.
    """
    if not isinstance(text, str):
        raise TypeError(f"text: expected a str, got {type(text).__name__}")
    slots: dict[str, str] = {}
    end = 0
    for match in re.finditer(r"(?:^|,)\s*([^\[\],]+?)\s*\[([^\[\]]*)\]\s*(?=,|$)", text):
        slot, value = match[1], match[2].strip()
        if match.start() != end:
            break
        if slot not in ATTRIBUTES:
            raise ValueError(f"text: expected one of the slots {', '.join(ATTRIBUTES)}, got {slot!r} in {text!r}")
        if slot in slots:
            raise ValueError(f"text: expected each slot once, got {slot!r} twice in {text!r}")
        if not value:
            raise ValueError(f"text: expected a value for each slot, got none for {slot!r} in {text!r}")
        slots[slot] = value
        end = match.end()
    if not slots or end != len(text):
        raise ValueError(f'text: expected a meaning representation, "slot[value], slot[value], ...", got {text!r}')
    return slots


def linearize(mr: str | Mapping[str, str]) -> str:
    """An MR as the paper writes it: "name : The Mill | Type : pub | price : cheap | near : Café Rouge"."""
    slots = _slots(mr)
    return " | ".join(f"{attribute} : {slots[slot]}" for slot, attribute in ATTRIBUTES.items() if slot in slots)


def load_e2e(path: str | Path) -> list[dict[str, Any]]:
    """Rows {"mr": str, "references": [str, ...]} of an E2E file, in the file's order.

    Reads JSON lines {"mr", "refs"} (.jsonl) and the original CSV with columns mr, ref (.csv, one reference a line; the
    references of equal MRs are gathered), both also gzipped (.gz). Raises ValueError naming file and line.
    """
    path = Path(path)
    suffixes = [suffix.lower() for suffix in path.suffixes]
    kind = suffixes[-2] if suffixes[-1:] == [".gz"] and len(suffixes) > 1 else "".join(suffixes[-1:])
    readers = {".jsonl": _json_rows, ".csv": _csv_rows}
    if kind not in readers:
        raise ValueError(f"path: expected a .jsonl or .csv file (or one of them with .gz), got {path.name!r}")
    grouped: dict[str, list[str]] = {}
    with open_text(path) as file:
        for line, mr, references in readers[kind](file, path):
            try:
                parse_mr(mr)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{path}, line {line}: {error}") from None
            if not references or not all(isinstance(text, str) and text.strip() for text in references):
                raise ValueError(f"{path}, line {line}: expected non-empty reference texts, got {references!r}")
            grouped.setdefault(mr, []).extend(references)
    if not grouped:
        raise ValueError(f"{path}: holds no rows")
    return [{"mr": mr, "references": references} for mr, references in grouped.items()]


def _json_rows(file: TextIO, path: Path) -> Iterator[tuple[int, str, list[str]]]:
    for line, row in json_lines(file, path):
        if not isinstance(row, dict) or not isinstance(row.get("refs"), list) or "mr" not in row:
            raise ValueError(f'{path}, line {line}: expected an object with "mr" and a list "refs", got {row!r:.99}')
        yield line, row["mr"], row["refs"]


def _csv_rows(file: TextIO, path: Path) -> Iterator[tuple[int, str, list[str]]]:
    reader = csv.DictReader(file)
    missing = {"mr", "ref"} - set(reader.fieldnames or ())
    if missing:
        found = ", ".join(reader.fieldnames or ())
        raise ValueError(
            f"{path}, line 1: expected the columns mr and ref of E2E data in a .csv, got {found}; other rows go as JSON lines"
        )
    try:
        for row in reader:
            yield reader.line_num, row["mr"], [row["ref"]]
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.reader.line_num}: not CSV: {error}") from None


def to_examples(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """One {"prompt", "completion"} for each reference of each row of `load_e2e`.

    The prompt is the linearised MR and a newline, the completion the reference with its white space made single.
    """
    return [
        {"prompt": linearize(row["mr"]) + "\n", "completion": " ".join(reference.split())}
        for row in rows
        for reference in row["references"]
    ]


def slot_errors(mr: str | Mapping[str, str], text: str) -> list[str]:
    """The slots of `mr` that `text` does not realise, in the MR's order.

    Names (name, near) are looked for literally up to case, accents, punctuation and a leading "The"; every other value
    by `e2e_phrasings.PHRASINGS`, or literally where the table does not hold it.
    """
    slots = _slots(mr)
    text = normalize(text)
    names = {slot: _name_pattern(slots[slot]) for slot in ("name", "near") if slot in slots}
    missed = {slot for slot, pattern in names.items() if not pattern.search(text)}
    for pattern in names.values():
        text = pattern.sub("@", text)
    missed |= {slot for slot, value in slots.items() if slot not in names and not _says(slot, value, text)}
    return [slot for slot in slots if slot in missed]


def slot_error_rate(mrs: Sequence[str | Mapping[str, str]], texts: Sequence[str]) -> float:
    """Slots that the texts miss, by all slots of their MRs: 0 = everything is said, 1 = nothing."""
    if len(mrs) != len(texts) or not mrs:
        raise ValueError(f"texts: expected one for each of {len(mrs)} MRs (at least one), got {len(texts)}")
    missed = sum(len(slot_errors(mr, text)) for mr, text in zip(mrs, texts, strict=True))
    return missed / sum(len(_slots(mr)) for mr in mrs)


def reference_slot_error_rate(rows: Sequence[Mapping[str, Any]]) -> float:
    """The slot error rate of the typical human reference, to hold a model's rate against.

    Of the references of each row of `load_e2e` the median number of missed slots is taken. People leave slots out and
    contradict them, a few of them often, so the mean over all references (`slot_error_rate`) is about twice as high.
    """
    if not rows:
        raise ValueError("rows: expected at least one row, got none")
    missed = sum(median(len(slot_errors(row["mr"], text)) for text in row["references"]) for row in rows)
    return missed / sum(len(_slots(row["mr"])) for row in rows)


def corpus_bleu(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU, 0 to 100, of each text against all of its references, without regard to case (sacrebleu)."""
    if len(texts) != len(references) or not texts:
        raise ValueError(f"references: expected one list for each of {len(texts)} texts, got {len(references)}")
    if not all(references) or any(isinstance(group, str) for group in references):
        raise ValueError(f"references: expected a non-empty list of texts for every text, got {references!r:.99}")
    check_bleu()
    from sacrebleu.metrics import BLEU

    width = max(len(group) for group in references)
    streams = [[group[i] if i < len(group) else None for group in references] for i in range(width)]
    return BLEU(lowercase=True).corpus_score(list(texts), streams).score


def check_bleu() -> None:
    """ImportError with the command to run where the package that computes BLEU is missing."""
    try:
        import sacrebleu.metrics  # noqa: F401
    except ImportError as error:
        raise ImportError("BLEU needs sacrebleu: pip install sacrebleu") from error


_NUMBERS = {"twenty five": "25", "one": "1", "three": "3", "five": "5", "twenty": "20", "thirty": "30"}


def normalize(text: str) -> str:
    """The form `e2e_phrasings` is written against: lower case, plain letters, spaced punctuation, "£20" for amounts."""
    text = unicodedata.normalize("NFKD", text.casefold())
    text = "".join(char for char in text if not unicodedata.combining(char))
    text = re.sub(r"['’`´]", "", text)
    text = re.sub(r"(\d)[.,]00\b", r"\1", text)
    text = re.sub(r"[^\w£$€&.,;!?]|_", " ", text)
    text = re.sub(r"[.;!?]+", " . ", text).replace(",", " , ")
    text = re.sub(rf"\b(?:{'|'.join(_NUMBERS)})\b", lambda match: _NUMBERS[match[0]], text)
    text = re.sub(r"(?:[£$€]|\b(?:l|e|gbp|eur|euros?))\s?(?=\d\d)", "£", text)
    text = re.sub(r"£?\b(20|25|30)\s?(?:l|£|€|gbp|pounds?|euros?|dollars?|quid)(?!\w)", r"£\1", text)
    return " ".join(text.replace("£", " £").split())


def _slots(mr: str | Mapping[str, str]) -> Mapping[str, str]:
    return parse_mr(mr) if isinstance(mr, str) else mr


@lru_cache(maxsize=4096)
def _name_pattern(name: str) -> re.Pattern[str]:
    spellings = (name.casefold(), *NAME_VARIANTS.get(name.casefold(), ()))
    bare = (re.sub(r"^the (?=.)", "", normalize(spelling)) for spelling in spellings)
    said = "|".join(r"\W*".join(map(re.escape, spelling.split())) for spelling in bare)
    return re.compile(rf"(?<!\w)(?:the )?(?:{said})s?(?!\w)")


@lru_cache(maxsize=4096)
def _patterns(slot: str, value: str) -> tuple[re.Pattern[str], re.Pattern[str] | None]:
    phrasing = PHRASINGS.get(slot, {}).get(value)
    if phrasing is None:
        return re.compile(rf"(?<!\w){re.escape(normalize(value))}(?!\w)"), None
    says, unless = (
        re.compile(rf"(?<![\w£])(?:{'|'.join(expressions)})(?!\w)") if expressions else None for expressions in phrasing
    )
    return says, unless


def _says(slot: str, value: str, text: str) -> bool:
    says, unless = _patterns(slot, value)
    return bool(says.search(unless.sub(" . ", text) if unless else text))
