"""Lines that a terminal of 100 columns would break."""

from ftlib.text import WIDTH


def too_wide(printed):
    """Lines of more than WIDTH columns that are not JSON, nor long for paths and addresses."""
    lines = printed.splitlines()
    wide = [line for line in lines if len(line) > WIDTH and not line.startswith("{")]
    return [line for line in wide if len(" ".join(w for w in line.split() if "/" not in w)) > 60]
