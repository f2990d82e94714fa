"""The shuffle of `raybge.cluster.shuffle` without Ray, in three partitions."""

from raybge.search import deduplication


def exchange(groups, parts, split, process, join):
    splits = [split(group, 3) for group in groups]
    results = [process([values[part] for _, values in splits]) for part in range(3)]
    pairs = zip(groups, splits, strict=True)
    return [join(group, own, [part[n] for part in results]) for n, (group, (own, _)) in enumerate(pairs)]


def use_local_shuffle(monkeypatch):
    """Deduplicate without Ray, with blocks in groups of two."""
    monkeypatch.setattr(deduplication, "exchange", exchange)
    monkeypatch.setattr(deduplication, "MIN_BLOCKS", 2)
