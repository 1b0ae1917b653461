"""Lines that a terminal of 100 columns would break."""

from ftlib.text import WIDTH


def too_wide(printed):
    """Lines of more than WIDTH columns that are not long for the paths and addresses in them."""
    wide = [line for line in printed.splitlines() if len(line) > WIDTH]
    return [line for line in wide if len(" ".join(w for w in line.split() if "/" not in w)) > 60]
