"""`python -m tinysd_batch`."""

from tinysd_batch.cli import main

if __name__ == "__main__":
    main()
