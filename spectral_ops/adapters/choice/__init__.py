"""Which modules of a model a config chooses, and which of those an adapter can be on."""
