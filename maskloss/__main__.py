"""Entry point of `python -m maskloss`, the same as the `maskloss` command."""

from maskloss.cli import main

if __name__ == "__main__":
    main()
