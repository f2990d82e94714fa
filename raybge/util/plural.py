"""Numbers with their nouns."""


def plural(count: int, noun: str) -> str:
    """Return count and noun with the noun's regular plural: «1 step», «2,000 steps», «3 queries», «2 passes»."""
    return f"{count:,} {noun if count == 1 else plural_noun(noun)}"


def plural_noun(noun: str) -> str:
    """Return the regular plural of a noun."""
    if noun.endswith("y") and noun[-2:-1] not in tuple("aeiou"):
        return f"{noun[:-1]}ies"
    return f"{noun}es" if noun.endswith(("s", "x", "ch", "sh")) else f"{noun}s"
