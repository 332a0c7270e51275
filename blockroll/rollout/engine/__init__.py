"""The core: what decodes requests with one policy, step by step."""
