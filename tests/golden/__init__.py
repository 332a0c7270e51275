"""Rollouts recorded before a change that must not move a number, and how they are recorded.

`python -m tests.golden.record` writes `rollouts.jsonl` anew; only a new law or new coins may do so.
"""
