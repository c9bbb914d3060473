"""The decision: which layouts are legal, which one is best, and why."""
