"""Replicas behind one `generate`: routing, versions, faults, weight updates."""
