"""The parts that the Orchestrator is made of; each is one idea, and none of them knows the hardware."""
