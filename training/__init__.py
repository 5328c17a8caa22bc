"""How the embedded model is made. Not in the wheel: nothing in the package imports this."""
