"""The rule by which a request ends, by the name that scripts from before `rollout/engine/` import."""

from blockroll.rollout.engine.ends import StopRule

__all__ = ["StopRule"]
