"""Many examples, a chunk at a time."""


def chunk_size(count: int, most: int) -> int:
    """How many of `count` things are taken at once: at most `most`, and where it costs little as many each time.

    Each size is a program that is compiled.

    >>> chunk_size(200, 32), chunk_size(7, 32), chunk_size(211, 32)
    (25, 7, 32)
    """
    most = max(1, min(count, most))
    even = next(size for size in range(most, 0, -1) if count % size == 0)
    return even if 2 * even > most else most
