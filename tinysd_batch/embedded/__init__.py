"""The model inside the package, in `model/`; `model/README.md` is its model card."""
