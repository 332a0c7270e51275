"""Keys and values of texts: one contract, and a layout for each kind of memory."""
