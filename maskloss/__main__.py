"""`python -m maskloss` is `maskloss`."""

from maskloss.cli import main

if __name__ == "__main__":
    main()
