"""The reading path: one block, the model around it, the methods over it."""
