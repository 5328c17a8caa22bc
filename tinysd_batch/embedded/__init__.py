"""The model that ships inside the package, in `model/`: see `model/README.md`, its model card."""
