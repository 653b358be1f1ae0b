"""How people say the values of an E2E meaning representation: the table behind the slot error rate.

`PHRASINGS[slot][value]` is a `Phrasing` of regular expressions. They are matched, as whole words, against text brought
into one form by `e2e.normalize`: lower case, no accents or apostrophes; hyphens, slashes and quotes are spaces;
sentence ends are " . " and commas " , "; small numbers are digits; amounts of money read "£20". The restaurant's own
name and its neighbour's are replaced by "@" beforehand: "Café Rouge" is no coffee shop, "Raja Indian Cuisine" no food.

A value is realised when an expression of `says` matches what is left after everything that `unless` matches is cut
out: "not family friendly" does not say familyFriendly[yes], "low prices" do not say customer rating[low].

Price ranges and ratings have three grades, each with a value in words and one in figures ("cheap", "less than £20";
"low", "1 out of 5"). The people who wrote the references use either, so a value is realised by any phrasing of its
grade and hardly ever by another grade's. The expressions were collected from the training references, and a few rare
ones from the development references; the test references were not looked at.
"""

from typing import NamedTuple


class Phrasing(NamedTuple):
    """Regular expressions that say a value, and those to cut out of the text first."""

    says: tuple[str, ...]
    unless: tuple[str, ...] = ()


# Misspelt names that are common in the references.
NAME_VARIANTS = {"crowne plaza hotel": ("crown plaza", "crowne plaza")}

# ----------------------------------------------------------------------------------------------- price range and rating

_PRICE = r"(?:pric(?:e|es|ed|ing|ings|ey)|costs?|costing)"
_RATING = (
    r"(?:rat(?:e|es|ed|ing|ings)|review(?:s|ed)?|score[sd]?|rank(?:s|ed|ing|ings)?|feedback|satisfaction|approval"
    r"|reputation|stars?|recommend(?:s|ed|ations?)?)"
)
_LINK = (
    r"(?:(?:rang(?:e|es|ed|ing)|is|are|was|were|can|be|being|of|from|a|an|the|at|in|on|to|it|as|only|just|side|end|bit"
    r"|little|quite|fairly|very|relatively|rather|somewhat|pretty|considered|customers?) )*"
)
_BEFORE_PRICE = r"(?:(?:in|food|meals?|menu|on|end|range|ranged|side|of|of the|its) )*"
_BEFORE_RATING = r"(?:(?:customers?|consumers?|costumers?|food|quality|service|user|guest|in|on|by|overall) )*"


def _price(word: str) -> tuple[str, str]:
    """`word` said of the price: "low price range", "prices are quite low"."""
    return f"{word} {_BEFORE_PRICE}{_PRICE}", f"{_PRICE} {_LINK}{word}(?! {_BEFORE_RATING}{_RATING})"


def _rating(word: str) -> tuple[str, str]:
    """`word` said of the rating: "low customer rating", "rated very low"."""
    return f"{word} {_BEFORE_RATING}{_RATING}", f"{_RATING} {_LINK}{word}(?! {_BEFORE_PRICE}{_PRICE})"


def _points(n: int) -> tuple[str, ...]:
    """A rating of `n` in figures: "3 out of 5", "3/5", "3 stars", "rated 3"."""
    return (
        rf"{n} ?(?:stars? |points? )?(?:rating )?(?:out ?|our )?(?:(?:of|or|if) ?)?(?:a possible )?5",
        rf"(?<!out of )(?<!out )(?<!\d of ){n} (?:starr?(?:s|ed)?|customer ratings?|ratings?)",
        rf"{_RATING} {_LINK}{n}(?! (?:out|of|stars?|5))",
    )


_MEAN = r"(?:the )?averages?"
_ABOVE_MEAN = rf"(?:above|over|higher than|more than|better than) {_MEAN}"
_BELOW_MEAN = rf"(?:below|under|lower than|less than|cheaper than) {_MEAN}"
_DEGREE = (
    r"(?:low(?:er|est|ly)?|cheap(?:er)?|high(?:er|est|ly)?|averaged?(?:ly)?|medium|mid|middle|moderate(?:ly)?|decent|good"
    r"|great|fair(?:ly)?|reasonabl[ey]|excellent|best|bad|poor|perfect)"
)
_ABOUT_PRICE = (*_price(_DEGREE), rf"{_DEGREE} (?:end|range)(?! {_BEFORE_RATING}{_RATING})")
_ABOUT_RATING = _rating(_DEGREE)

_HARDLY = r"(?:not|isnt|arent|never|nothing|less|without being) (?:(?:at|all|that|too|very|so|overly|really|be|as|a) )*"
_NOT_DEAR = f"{_HARDLY}(?:expensive|pricey|costly)"
_UP_TO = r"(?:less|lower|lesser|cheaper|fewer|under|below|within|up to|no more|not more|maximum|max)"
_UP_TO += r"(?: (?:than|that|then|the|of|a))*"

_CHEAP = Phrasing(
    says=(
        r"cheap(?:er|est|ly|ish)?",
        r"inexpensive(?:ly)?",
        r"affordabl[ey]",
        r"economical(?:ly)?",
        r"budgets?",
        r"bargains?",
        r"(?:good|great|excellent) value",
        r"value for money",
        r"low(?:er)? (?:end|range)",
        _NOT_DEAR,
        *_price(r"(?:low(?:er|est|ly)?|good|great|best|competitive|attractive|accessible|reasonabl[ey]|well|fair(?:ly)?)"),
        *_price(_BELOW_MEAN),
        rf"{_UP_TO} £?20",
        r"£?20 (?:and|or) (?:under|less|below|lower)",
        r"£20(?! ?(?:(?:to|and|or|through) )?£?25)",
    ),
    unless=(
        rf"{_HARDLY}(?:the )?(?:cheap(?:est)?|inexpensive)",
        _ABOVE_MEAN,
        r"(?:over|above|more than|from) £?20",
        *_ABOUT_RATING,
    ),
)
_MODERATE = Phrasing(
    says=(
        r"moderate(?:ly)?",
        r"medium",
        r"mid(?:dle|dling|range)?(?: of the road| range[ds]?| level| priced?| cost)",
        r"mid ?rang(?:e|es|ed)",
        r"reasonabl[ey]",
        r"affordabl[ey]",
        r"modest(?:ly)?",
        _NOT_DEAR,
        *_price(r"(?:averaged?(?:ly)?|mid(?:dle|dling)?|fair(?:ly)?|decent(?:ly)?|ok(?:ay)?|normal|well|good|great)"),
        r"£?20 ?(?:(?:to|and|or|through) )?£?25",
        r"£25",
    ),
    unless=(*_price(_ABOVE_MEAN), *_price(_BELOW_MEAN), *_ABOUT_RATING),
)
_DEAR = Phrasing(
    says=(
        r"expensive(?:ly)?",
        r"pric(?:ey|y|ier)",
        r"costly",
        r"(?:up ?scale|up ?market|luxury|luxurious|premium|high class|classy|fancy|fine dining|gourmet)",
        r"(?:high(?:er)?|upper) (?:end|range[ds]?)",
        *_price(r"(?:high(?:er|ish|ly|est)?|upper|big|large)"),
        *_price(_ABOVE_MEAN),
        f"{_ABOVE_MEAN} ranges?",
        rf"{_HARDLY}(?:the )?cheap(?:est)?",
        r"£30",
        r"(?:more|over|above|higher|from|greater)(?: (?:than|then|that))? 30",
    ),
    unless=(_NOT_DEAR, rf"{_UP_TO} £?30", *_ABOUT_RATING),
)

_LOW_RATED = Phrasing(
    says=(
        r"low(?:er|est|ly)?",
        r"(?:poor|poorly|terrible|awful|worst|unpopular)",
        r"(?:not|isnt|arent|doesnt|dont)(?: (?:a|very|so|been|too|have|get|received?|rated?|it|the|particularly))*"
        r" (?:well|good|great|high|highly|best|popular)",
        _BELOW_MEAN,
        *_rating(r"(?:bad|badly|negative)"),
        *_points(1),
    ),
    unless=(*_ABOUT_PRICE, r"low in (?:price|cost)"),
)
_AVERAGE_RATED = Phrasing(
    says=(
        r"average(?:d|ly)?",
        r"(?:mediocre|decent|okay|ok|mixed|satisfactory)",
        *_rating(r"(?:moderate(?:ly)?|fair(?:ly)?|medium|mid|middle|mid ranged?|medium level|normal|reasonabl[ey]|good)"),
        *_points(3),
    ),
    unless=(_ABOVE_MEAN, _BELOW_MEAN, *_ABOUT_PRICE),
)
_HIGHLY_RATED = Phrasing(
    says=(
        r"high(?:ly|er|est)?",
        r"(?:excellent|perfect|top|outstanding|superb|fantastic|amazing)",
        r"(?:popular|rav(?:e|es|ing)|well (?:liked|loved|regarded|respected|received|recommended))",
        r"customers (?:love|like|enjoy)",
        _ABOVE_MEAN,
        *_rating(r"(?:good|great|well|best|positive|favou?rable|wonderful|superior|excellently)"),
        *_points(5),
    ),
    unless=(*_ABOUT_PRICE, r"(?:not|isnt|arent|doesnt|dont|never) (?:\w+ ){0,2}(?:high\w*|popular|well|good|great)"),
)

# ------------------------------------------------------------------------------------------------------ family friendly

_KIDS = r"(?:famil\w*|child(?:ren|rens|s)?|kids?|youngsters|little ones|toddlers?)"
_NOT = (
    r"(?:not|no|none?|nor|isnt|arent|un|never|doesnt|dont|wont|cannot|cant|without|lacks|unsuitable|unfriendly|bad|poor"
    r"|leave|rather than|away from)"
)
_UNWELCOME = (
    r"(?:unfriendly|unwelcome|prohibited|forbidden|banned|free|at home"
    r"|(?:not|no|none?|un|isnt|arent|cannot|cant|dont|wont) (?:\w+ )?"
    r"(?:friendly|allowed|welcomed?|permitted|recommended|suitable|accepted|admitted|encouraged|appropriate|enter|visit|for))"
)
_NO_KIDS = (
    rf"{_NOT} (?:(?!(?:but|though|yet|while|and|with|is|has|it)\b)\w+ ){{0,7}}?{_KIDS}(?: (?:or|and) {_KIDS})?",
    rf"{_KIDS} (?:(?:or|and) {_KIDS} )?(?:(?:friendly|is|are|a|it|should|would|were|be) )*{_UNWELCOME}",
    rf"{_KIDS} (?:friendly )?(?:no|not|none)(?= \.|$)",
    r"(?<!\band )(?<!\bor )adults?(?! (?:and|or|as well|alike) )",
    r"(?:mature|grown ?ups?|singles|romantic|couples)",
)

# ---------------------------------------------------------------------------------------------------------------- table

PHRASINGS: dict[str, dict[str, Phrasing]] = {
    "eatType": {
        "coffee shop": Phrasing((r"coffee ?(?:shops?|houses?)?", r"cafes?", r"cafeterias?")),
        "pub": Phrasing((r"pubs?", r"bars?", r"public house", r"taverns?", r"inns?")),
        "restaurant": Phrasing(
            (r"rest[aeu]*r[aeu]*nts?", r"eater(?:y|ies)", r"bistros?", r"diners?", r"din(?:e|es|ing)", r"place to eat")
        ),
    },
    "food": {
        "English": Phrasing((r"english", r"england", r"british", r"fish (?:and|n|&) chips", r"breakfasts?", r"roasts?")),
        "French": Phrasing((r"french", r"france", r"wines?", r"cheeses?", r"croissants?", r"crepes?", r"baguettes?")),
        "Italian": Phrasing((r"ital\w+", r"pastas?", r"pizzas?", r"spaghetti", r"lasagn[ae]", r"noodles?")),
        "Indian": Phrasing((r"indian?", r"curr(?:y|ies)", r"naan", r"tikka")),
        "Chinese": Phrasing((r"chinese?", r"chines", r"china", r"asian", r"oriental", r"dim sum", r"chow mein")),
        "Japanese": Phrasing((r"japan(?:ese)?", r"japenese", r"sushi", r"sashimi", r"ramen", r"asian", r"oriental")),
        "Fast food": Phrasing((r"fast ?foods?", r"fast", r"quick", r"(?:ham)?burgers?", r"fries", r"chips", r"american")),
    },
    "area": {
        "riverside": Phrasing((r"rivers?(?: ?(?:sides?|banks?|fronts?))?", r"water ?(?:front|side)")),
        "city centre": Phrasing(
            (
                r"(?:city|town) ?cent\w+",
                r"cent(?:re|er|ral|rally)",
                r"(?:inner|in|of|within)(?: the)? (?:city|town)",
                r"down ?town",
                r"city",
            ),
            unless=(
                r"(?:outside|outskirts|edge|end|north|south|east|west|out|away|far)(?: (?:of|from|the))*"
                r" (?:city|town|cent(?:re|er))(?: (?:cent(?:re|er)|of (?:the )?(?:city|town)))?",
            ),
        ),
    },
    "priceRange": {
        "cheap": _CHEAP,
        "less than £20": _CHEAP,
        "moderate": _MODERATE,
        "£20-25": _MODERATE,
        "high": _DEAR,
        "more than £30": _DEAR,
    },
    "customer rating": {
        "low": _LOW_RATED,
        "1 out of 5": _LOW_RATED,
        "average": _AVERAGE_RATED,
        "3 out of 5": _AVERAGE_RATED,
        "high": _HIGHLY_RATED,
        "5 out of 5": _HIGHLY_RATED,
    },
    "familyFriendly": {
        "yes": Phrasing((_KIDS, r"all ages?"), unless=_NO_KIDS),
        "no": Phrasing(_NO_KIDS),
    },
}
