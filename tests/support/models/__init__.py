"""Models to test and measure with."""
