"""Who drafts: each source of drafts behind the engine's one seam, and the engine that has them at hand."""
