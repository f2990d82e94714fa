"""Numbers with their nouns."""


def plural(count: int, noun: str) -> str:
    """Return count and noun with the noun's regular plural: «1 step», «2,000 steps»."""
    return f"{count:,} {noun}{'s' * (count != 1)}"
