"""`python -m convoy.cli`, where the console script is not on the path."""

from convoy.cli.main import main

if __name__ == "__main__":
    main()
