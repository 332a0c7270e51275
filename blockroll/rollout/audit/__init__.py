"""A row for every committed token: written, checked, repeated."""
