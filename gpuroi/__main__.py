"""python -m gpuroi."""

from gpuroi.cli import main

if __name__ == "__main__":
    main()
