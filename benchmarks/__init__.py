"""What the engine costs, measured. Every figure in a document names the script in here that made it."""
