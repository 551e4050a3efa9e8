"""What is said while a run trains: knobs, the journal, the boundary at which commands take effect. Without torch."""
