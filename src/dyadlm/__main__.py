"""`python -m dyadlm` is the console script."""

from dyadlm.cli import main

if __name__ == "__main__":
    main()
