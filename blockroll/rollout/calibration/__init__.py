"""Whether tokens follow the law that is recorded with them: bets on it, and who places them in an engine."""
