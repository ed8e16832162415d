"""Units behind an answer: a known list, read only behind a whole value; anything else is part of the answer.

A unit on one side only is forgiven (MATH's golds have one now and then); two different units never are.
"""

import re

# canonical name: its other spellings. Plurals in -s and -es need none.
_NAMES = {
    "degree": "deg",
    "percent": "% pct",
    "dollar": "$ usd buck",
    "cent": "¢",
    "euro": "€ eur",
    "pound": "£ gbp lb lbs",
    "yen": "¥",
    "rupee": "₹ rs inr",
    "inch": "in inches",
    "foot": "ft feet",
    "yard": "yd yds",
    "mile": "mi",
    "mph": "",
    "millimeter": "mm millimetre",
    "centimeter": "cm cms centimetre",
    "decimeter": "dm decimetre",
    "meter": "m metre",
    "kilometer": "km kms kilometre",
    "gram": "g gm gms",
    "milligram": "mg",
    "kilogram": "kg kgs kilo",
    "ton": "tonne",
    "ounce": "oz",
    "liter": "l L litre",
    "milliliter": "ml millilitre",
    "gallon": "gal",
    "quart": "",
    "pint": "",
    "cup": "",
    "teaspoon": "tsp",
    "tablespoon": "tbsp",
    "acre": "",
    "hectare": "",
    "second": "s sec secs",
    "minute": "min mins",
    "hour": "h hr hrs",
    "day": "",
    "week": "",
    "month": "",
    "year": "yr yrs",
    "radian": "rad rads",
    "unit": "",
    "hertz": "hz",
    "volt": "",
    "watt": "",
    "ohm": "",
    "joule": "",
    "newton": "",
    "bit": "",
    "byte": "",
    # what is counted
    **dict.fromkeys(
        "apple ball book boy card coin combination cookie digit dog egg face game girl integer item light marble "
        "member mark number page pair part path pencil permutation piece plant play point prime problem question "
        "revolution root rotation route row seat set side solution square step stone student subset term ticket "
        "time toy tree triangle value vote way word zero".split(),
        "",
    ),
    "person": "people persons",
    "man": "men",
    "woman": "women",
    "child": "children",
    "factor": "divisor",
    "arrangement": "",
    "vertex": "vertices",
    "penny": "pennies",
    "possibility": "possibilities",
}
NAMES = {spelling: name for name, others in _NAMES.items() for spelling in (name, *others.split())}
_POWERS = {"square": 2, "sq": 2, "squared": 2, "cubic": 3, "cu": 3, "cubed": 3}
_PARTS = re.compile(r"[A-Za-z]+|[%$¢€£¥₹/]|\s+|\.|-|\S")
# Words that may stand bare behind a number: `18 dollars`; not `in` and the like, nor one letter: algebra there.
_ALGEBRA = {"in", "mi", "ml", "hz", "rs", "mg", "gm", "eur"}
BARE = {word for word in NAMES if len(word) > 1 and word.isalpha()} - _ALGEBRA | {*_POWERS, "per"} - {"sq", "cu"}


def _name(word: str) -> str | None:
    low = word.lower()
    for spelling in (word, low, low.removesuffix("s"), low.removesuffix("es")):
        if spelling in NAMES and (len(spelling) > 1 or spelling == word):  # M is no metre, ms none either
            return NAMES[spelling]
    return None


def is_bare_unit(word: str, *, behind: bool, rest: str) -> bool:
    """Return whether `word`, outside \\text{}, is a unit or part of one.

    One of two letters is only where it stands behind a number and a blank, `sq` and `cu` before a unit besides.
    """
    if len(word) == 2 and not behind:
        return False
    if word in ("sq", "cu"):
        following = re.match(r"\s([a-z]{2,})(?![a-zA-Z])", rest)
        return bool(following and following[1] in BARE)
    return word.lower() in BARE or (len(word) > 3 and word.lower() in {*BARE, *map("{}s".format, BARE)})


def unit_of(text: str, power: int = 1) -> str | None:
    """Return the one spelling of the unit that `text` names as a whole, None where it names none.

    power: of the whole, as in \\text{ cm}^2. `square inches` is `inch^2`, `miles per hour` `mile/hour`.
    """
    found: list[str] = []
    pending = 1
    for part in _PARTS.findall(text):
        if part.isspace() or part in ".-":
            continue
        if part.lower() in _POWERS and part.lower() != "square":
            exponent = _POWERS[part.lower()]
            if part.lower().endswith("d") and found:  # "squared" follows its unit
                found[-1] += f"^{exponent}"
            else:
                pending = exponent
        elif part.lower() == "square":  # "square inches", but also "5 squares"
            pending = 2
        elif part == "/" or part.lower() == "per":
            found.append("/")
        elif name := _name(part):
            found.append(name + (f"^{pending}" if pending > 1 else ""))
            pending = 1
        else:
            return None
    if not found:
        return "square" if pending == 2 else None
    if found == ["mile", "/", "hour"]:
        found = ["mph"]
    return "".join(found) + (f"^{power}" if power > 1 and "^" not in found[-1] else "")
