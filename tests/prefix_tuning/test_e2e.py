"""The E2E task: reading, linearising, and the two scores; with the proof that the phrasing table tells values apart."""

import gzip
import json
import random
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from prefix_tuning import e2e
from prefix_tuning.e2e_phrasings import PHRASINGS

DATA = Path(__file__).parents[2] / "benchmarks" / "data" / "e2e"
FULL_MR = (
    "name[The Mill], eatType[coffee shop], food[Fast food], priceRange[£20-25], customer rating[3 out of 5], "
    "area[city centre], familyFriendly[yes], near[Café Rouge]"
)
GRADES = (
    {"cheap", "less than £20"},
    {"moderate", "£20-25"},
    {"high", "more than £30"},
    {"low", "1 out of 5"},
    {"average", "3 out of 5"},
    {"high", "5 out of 5"},
)


@pytest.fixture(scope="module")
def dev():
    return e2e.load_e2e(DATA / "dev.jsonl.gz")


def missed(slot, value, text):
    return e2e.slot_errors({slot: value}, text) == [slot]


# ---------------------------------------------------------------------------------------------------------- reading


def test_parse_mr():
    assert list(e2e.parse_mr(FULL_MR).items()) == [
        ("name", "The Mill"),
        ("eatType", "coffee shop"),
        ("food", "Fast food"),
        ("priceRange", "£20-25"),
        ("customer rating", "3 out of 5"),
        ("area", "city centre"),
        ("familyFriendly", "yes"),
        ("near", "Café Rouge"),
    ]
    assert e2e.parse_mr("name[Bar, Grill],near[X]") == {"name": "Bar, Grill", "near": "X"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a meaning representation"),
        ("The Mill is a pub.", "expected a meaning representation"),
        ("name[The Mill", "expected a meaning representation"),
        ("name[The Mill] eatType[pub]", "expected a meaning representation"),
        ("name[The Mill] or so, eatType[pub]", "expected a meaning representation"),
        ("name[The Mill], and eatType[pub] too", "expected a meaning representation"),
        ("name[The Mill], ", "expected a meaning representation"),
        ("name[The Mill], colour[red]", "expected one of the slots .*, got 'colour'"),
        ("name[The Mill], name[Aromi]", "expected each slot once, got 'name' twice"),
        ("name[ ]", "expected a value for each slot, got none for 'name'"),
    ],
)
def test_malformed_mr(text, message):
    with pytest.raises(ValueError, match=message):
        e2e.parse_mr(text)


def test_linearize():
    expected = (
        "name : The Mill | Type : coffee shop | food : Fast food | price : £20-25 | customer rating : 3 out of 5 | "
        "area : city centre | family friendly : yes | near : Café Rouge"
    )
    assert e2e.linearize(FULL_MR) == expected
    backwards = dict(reversed(e2e.parse_mr(FULL_MR).items()))
    assert e2e.linearize(backwards) == expected
    assert e2e.linearize("name[Aromi], near[Ranch]") == "name : Aromi | near : Ranch"


@pytest.mark.parametrize(("split", "mrs", "references"), [("train", 4862, 42061), ("dev", 547, 4672), ("test", 630, 4693)])
def test_shipped_data(split, mrs, references):
    rows = e2e.load_e2e(DATA / f"{split}.jsonl.gz")
    assert len(rows) == mrs
    assert sum(len(row["references"]) for row in rows) == references


def test_shipped_data_names_its_licence():
    assert "CC BY-SA 4.0" in (DATA / "ATTRIBUTION.md").read_text()
    assert "Attribution-ShareAlike 4.0" in (DATA / "LICENSE.CC-BY-SA-4.0.txt").read_text()


def test_load_groups_references_in_order(tmp_path):
    rows = [
        {"mr": "name[Aromi]", "references": ["Aromi.", "Go to Aromi,\ntoday."]},
        {"mr": "name[Zizzi]", "references": ["Zizzi."]},
    ]
    table = 'mr,ref\n"name[Aromi]","Aromi."\nname[Zizzi],Zizzi.\nname[Aromi],"Go to Aromi,\ntoday."\n'
    (tmp_path / "e2e.csv").write_text(table, encoding="utf-8-sig")
    lines = "".join(json.dumps({"mr": row["mr"], "refs": row["references"]}) + "\n" for row in rows)
    (tmp_path / "e2e.jsonl").write_text(lines + "\n")
    with gzip.open(tmp_path / "e2e.jsonl.gz", "wt") as file:
        file.write(lines)
    for name in ("e2e.csv", "e2e.jsonl", "e2e.jsonl.gz"):
        assert e2e.load_e2e(tmp_path / name) == rows, name


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("bad.jsonl", '{"mr": "name[A]", "refs": ["A."]}\n{"mr": ', "bad.jsonl, line 2: expected one JSON object a line"),
        ("bad.jsonl", '{"mr": "name[A]"}', 'bad.jsonl, line 1: expected an object with "mr" and a list "refs"'),
        ("bad.jsonl", '["name[A]"]', 'bad.jsonl, line 1: expected an object with "mr"'),
        (
            "bad.jsonl",
            '\n{"mr": "A", "refs": ["A."]}',
            "bad.jsonl, line 2: text: expected a meaning representation",
        ),
        ("bad.jsonl", '{"mr": 3, "refs": ["A."]}', "bad.jsonl, line 1: text: expected a str, got int"),
        ("bad.jsonl", '{"mr": "name[A]", "refs": ["A.", " "]}', "bad.jsonl, line 1: expected non-empty reference"),
        ("bad.jsonl", '{"mr": "name[A]", "refs": []}', "bad.jsonl, line 1: expected non-empty reference"),
        ("bad.jsonl", "[" * 100_000, "bad.jsonl, line 1: maximum recursion depth exceeded"),
        ("bad.jsonl", "", "bad.jsonl: holds no rows"),
        ("bad.csv", "mr,text\nname[A],A.\n", "bad.csv, line 1: expected the columns mr and ref"),
        ("bad.csv", "mr,ref\nname[A],A.\nname[B]\n", "bad.csv, line 3: expected non-empty reference"),
        ("bad.txt", "name[A]", "path: expected a .jsonl or .csv file"),
        ("bad", "name[A]", "path: expected a .jsonl or .csv file"),
    ],
)
def test_bad_files(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError) as error:
        e2e.load_e2e(tmp_path / name)
    assert message in str(error.value)


def test_to_examples():
    rows = [{"mr": "name[Aromi], near[Ranch]", "references": [" Aromi  is\nnear Ranch. ", "Near Ranch: Aromi."]}]
    assert e2e.to_examples(rows) == [
        {"prompt": "name : Aromi | near : Ranch\n", "completion": "Aromi is near Ranch."},
        {"prompt": "name : Aromi | near : Ranch\n", "completion": "Near Ranch: Aromi."},
    ]


# ------------------------------------------------------------------------------------------------------- slot errors


@pytest.mark.parametrize(
    ("slot", "value", "text"),
    [
        ("name", "The Mill", "Try THE MILL!"),
        ("name", "The Mill", "Mill is a pub."),
        ("name", "Browns Cambridge", "Brown's Cambridge is a pub."),
        ("near", "Café Rouge", "It is near cafe rouge."),
        ("near", "La Fenetre", "It is near La Fenêtre."),
        ("near", "Crowne Plaza Hotel", "It is by the Crown Plaza."),
        ("eatType", "pub", "A pub."),
        ("eatType", "coffee shop", "A lovely café."),
        ("food", "Fast food", "Burgers and fries!"),
        ("food", "English", "Serves a British breakfast."),
        ("area", "riverside", "It lies on the river."),
        ("area", "city centre", "In the center of the city."),
        ("priceRange", "cheap", "A low-cost place."),
        ("priceRange", "cheap", "It is not too expensive."),
        ("priceRange", "less than £20", "Dishes under twenty pounds."),
        ("priceRange", "less than £20", "Its price range is below average."),
        ("priceRange", "£20-25", "Prices are £20 - £25."),
        ("priceRange", "£20-25", "Between 20 and 25 pounds."),
        ("priceRange", "moderate", "Average prices."),
        ("priceRange", "moderate", "A mid-range pub."),
        ("priceRange", "high", "The prices are rather high."),
        ("priceRange", "more than £30", "Meals over 30 euros."),
        ("customer rating", "low", "Rated poorly."),
        ("customer rating", "low", "It has a low price range but also a low customer rating."),
        ("customer rating", "1 out of 5", "One star."),
        ("customer rating", "average", "An average restaurant."),
        ("customer rating", "3 out of 5", "It has a 3/5 rating."),
        ("customer rating", "5 out of 5", "Five out of five customers' rating"),
        ("customer rating", "high", "Highly rated."),
        ("familyFriendly", "yes", "Kids are welcome."),
        ("familyFriendly", "yes", "It is not cheap, but family-friendly."),
        ("familyFriendly", "yes", "For adults and children alike."),
        ("familyFriendly", "no", "It isn't family friendly."),
        ("familyFriendly", "no", "No children."),
        ("familyFriendly", "no", "Kids are not welcome."),
        ("familyFriendly", "no", "It is for adults only."),
        ("familyFriendly", "no", "A non-family-friendly pub."),
        ("familyFriendly", "no", "Leave the kids at home."),
    ],
)
def test_realised(slot, value, text):
    assert not missed(slot, value, text)


@pytest.mark.parametrize(
    ("slot", "value", "text"),
    [
        ("name", "The Mill", "The Millers is a pub."),
        ("near", "Ranch", "A branch of the river."),
        ("eatType", "pub", "A public park."),
        ("eatType", "coffee shop", "A restaurant."),
        ("food", "Italian", "Indian food."),
        ("area", "city centre", "Just outside the city centre, on the river."),
        ("priceRange", "cheap", "It is not cheap."),
        ("priceRange", "cheap", "A low rating."),
        ("priceRange", "less than £20", "£20-25 a dish."),
        ("priceRange", "less than £20", "More than £20."),
        ("priceRange", "moderate", "A moderate rating."),
        ("priceRange", "moderate", "Above average prices."),
        ("priceRange", "high", "A high customer rating, cheap food."),
        ("priceRange", "high", "It is not expensive."),
        ("priceRange", "more than £30", "Less than £30."),
        ("customer rating", "low", "Low prices."),
        ("customer rating", "low", "The price range is low."),
        ("customer rating", "average", "Average prices, rated 1 out of 5."),
        ("customer rating", "high", "A high price range."),
        ("customer rating", "high", "It is not highly rated."),
        ("customer rating", "5 out of 5", "Rated 3 out of 5."),
        ("customer rating", "5 out of 5", "It has 1 out of 5 stars."),
        ("familyFriendly", "yes", "It is not family-friendly."),
        ("familyFriendly", "yes", "Adults only; children aren't allowed."),
        ("familyFriendly", "yes", "A friendly pub."),
        ("familyFriendly", "no", "A family-friendly pub for adults and children."),
        ("familyFriendly", "no", "No low prices, but family friendly."),
    ],
)
def test_not_realised(slot, value, text):
    assert missed(slot, value, text)


def test_names_say_no_other_slot():
    mr = "name[The Golden Curry], eatType[coffee shop], food[Indian], near[Café Rouge]"
    assert e2e.slot_errors(mr, "The Golden Curry is near Café Rouge.") == ["eatType", "food"]
    assert e2e.slot_errors(mr, "The Golden Curry, a café with curry, is near Café Rouge.") == []


def test_values_outside_the_table_are_matched_literally():
    assert not missed("food", "Ethiopian", "It serves ethiopian dishes.")
    assert missed("food", "Ethiopian", "It serves Indian dishes.")


def test_slot_error_rate():
    mrs = ["name[Aromi], eatType[pub]", "name[Zizzi], near[Ranch]"]
    assert e2e.slot_error_rate(mrs, ["Aromi is a pub.", "Zizzi is near Ranch."]) == 0
    assert e2e.slot_error_rate(mrs, ["Aromi.", "Nothing."]) == 0.75
    with pytest.raises(ValueError, match="one for each of 2 MRs"):
        e2e.slot_error_rate(mrs, ["Aromi."])
    with pytest.raises(ValueError, match="at least one"):
        e2e.slot_error_rate([], [])


def test_reference_slot_error_rate_is_the_median_reference():
    rows = [
        {"mr": "name[Aromi], eatType[pub]", "references": ["Aromi is a pub.", "Aromi.", "Hello."]},
        {"mr": "name[Zizzi], near[Ranch]", "references": ["Zizzi."]},
    ]
    assert e2e.reference_slot_error_rate(rows) == 0.5
    with pytest.raises(ValueError, match="rows"):
        e2e.reference_slot_error_rate([])


def test_human_references_realise_their_slots(dev):
    """The typical reference misses at most 5 % of its slots: the table knows how people speak.

    Over all references it is more, because people leave out: in the 60 MRs below, 228 of the 231 missed slots are in
    truth absent from the text or contradicted by it (read by hand).
    """
    sample = random.Random(0).sample(dev, 60)
    assert e2e.reference_slot_error_rate(dev) <= 0.035
    assert e2e.reference_slot_error_rate(sample) <= 0.042
    everyone = [(row["mr"], text) for row in dev for text in row["references"]]
    assert e2e.slot_error_rate(*zip(*everyone, strict=True)) <= 0.065


def test_wrong_values_are_not_realised(dev):
    """With a wrong value in the MR, the human references miss the slot: the table is not so loose as to match anything.

    Each slot value is swapped for every value of another grade (price, rating) or every other value; names for a name
    drawn at random.
    """
    pick = random.Random(0)
    names = {slot: sorted({e2e.parse_mr(row["mr"]).get(slot, "") for row in dev} - {""}) for slot in ("name", "near")}
    counts = defaultdict(lambda: [0, 0])
    for row in dev:
        mr = e2e.parse_mr(row["mr"])
        for slot, value in mr.items():
            if slot in names:
                wrong = [pick.choice([name for name in names[slot] if name not in mr.values()])]
            else:
                same = next((grade for grade in GRADES if value in grade and grade <= set(PHRASINGS[slot])), {value})
                wrong = [other for other in PHRASINGS[slot] if other not in same]
            for other in wrong:
                for text in pick.sample(row["references"], min(3, len(row["references"]))):
                    count = counts[slot, value if slot not in names else "any", other if slot not in names else "any"]
                    count[0] += slot in e2e.slot_errors({**mr, slot: other}, text)
                    count[1] += 1
    loose = {swap: rejected / total for swap, (rejected, total) in counts.items() if rejected < 0.88 * total}
    assert not loose
    for slot in e2e.ATTRIBUTES:
        rejected, total = (sum(count[i] for swap, count in counts.items() if swap[0] == slot) for i in (0, 1))
        assert rejected >= 0.96 * total, slot


def test_grades_cover_the_table():
    """Every price range and rating of the data has a grade, so that the swaps above leave out near-synonyms alone."""
    assert set(PHRASINGS["priceRange"]) | set(PHRASINGS["customer rating"]) == set().union(*GRADES)


# -------------------------------------------------------------------------------------------------------------- BLEU


def test_corpus_bleu():
    text = "The Mill is a cheap pub near the river."
    other = "A pub by the river is called Aromi today."
    assert e2e.corpus_bleu([text], [[text.upper(), "Else."]]) == pytest.approx(100)
    assert e2e.corpus_bleu([text, other], [["Nothing alike here at all."], ["x", "y z", other]]) < 60
    assert e2e.corpus_bleu([text, other], [[text], ["x", "y z", other]]) == pytest.approx(100)


def test_corpus_bleu_refuses():
    with pytest.raises(ValueError, match="one list for each of 2 texts"):
        e2e.corpus_bleu(["a", "b"], [["a"]])
    with pytest.raises(ValueError, match="non-empty list"):
        e2e.corpus_bleu(["a"], [[]])
    with pytest.raises(ValueError, match="non-empty list"):
        e2e.corpus_bleu(["a"], ["a"])


def test_corpus_bleu_without_sacrebleu(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    with pytest.raises(ImportError, match="pip install sacrebleu"):
        e2e.corpus_bleu(["a"], [["a"]])
