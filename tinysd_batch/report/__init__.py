"""Output for people: progress, status, plans, contact sheets, quantization reports."""
