"""Models: a Hugging Face causal LM behind the protocol that the engine drives."""
